"""An MLP on MNIST, trained as always; `dropfx.compile(model)` is the only line that is new.

python examples/mnist_mlp.py [--data DIR] [--epochs N]
"""

import argparse
import time

import images
import torch
from torch import nn

import dropfx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of idx files, such as Fashion-MNIST's (default: the embedded MNIST-5k)")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--hidden", type=int, default=2048)
args = parser.parse_args()

torch.manual_seed(0)
train_x, train_y, test_x, test_y = images.load(args.data)

model = nn.Sequential(
    nn.Linear(784, args.hidden),
    nn.ReLU(),
    nn.Dropout(0.5),
    nn.Linear(args.hidden, args.hidden),
    nn.ReLU(),
    nn.Dropout(0.5),
    nn.Linear(args.hidden, 10),
)
dropfx.compile(model)

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for epoch in range(args.epochs):
    start = time.perf_counter()
    model.train()
    for batch in torch.randperm(len(train_x)).split(128):
        loss = nn.functional.cross_entropy(model(train_x[batch]), train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start

    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}, {seconds:.2f} s")
