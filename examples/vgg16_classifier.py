"""The classifier head of VGG16 (25088-4096-4096-10, 120 million weights) on feature maps of real images.

VGG16's convolutions are replaced by one fixed layer of random filters that gives maps of the same shape, [512, 7, 7]:
nothing is downloaded, and the head trains for real. `dropfx.compile(head)` is the only line that is new.

python examples/vgg16_classifier.py [--data DIR] [--epochs N] [--small]
"""

import argparse
import time

import images
import torch
from torch import nn

import dropfx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of idx files, such as Fashion-MNIST's (default: the embedded MNIST-5k)")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--small", action="store_true", help="32 feature maps, 256 units, 1,000 images: for a quick look")
args = parser.parse_args()

torch.manual_seed(0)
train_x, train_y, test_x, test_y = images.load(args.data)
maps, units, size = (32, 256, 32) if args.small else (512, 4096, 128)
if args.small:
    train_x, train_y, test_x, test_y = train_x[:1000], train_y[:1000], test_x[:500], test_y[:500]

# 28x28 pixels to 7x7 positions: filters of 8x8 pixels, 4 apart
filters = nn.Conv2d(1, maps, kernel_size=8, stride=4, padding=2).requires_grad_(False)
features = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), filters, nn.ReLU(), nn.Flatten())

head = nn.Sequential(
    nn.Linear(maps * 7 * 7, units),
    nn.ReLU(True),
    nn.Dropout(0.5),
    nn.Linear(units, units),
    nn.ReLU(True),
    nn.Dropout(0.5),
    nn.Linear(units, 10),
)
dropfx.compile(head)

optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
for epoch in range(args.epochs):
    start = time.perf_counter()
    head.train()
    for batch in torch.randperm(len(train_x)).split(size):
        loss = nn.functional.cross_entropy(head(features(train_x[batch])), train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start

    head.eval()
    with torch.no_grad():
        hits = [head(features(x)).argmax(1) == y for x, y in zip(test_x.split(500), test_y.split(500), strict=True)]
    accuracy = torch.cat(hits).float().mean().item()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}, {seconds:.2f} s")
