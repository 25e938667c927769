"""A vision transformer with stochastic depth, trained with PyTorch's masks and then with the dropped samples skipped.

python examples/vision_transformer.py --data DIR [--epochs N] [--drop-path P] [--seeds N]
"""

import argparse
import statistics
import time

import images
import torch
from torch import nn
from torch.nn import functional as F

import dropfx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder of idx files, such as Fashion-MNIST's (default: the embedded MNIST-5k)")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--depth", type=int, default=6)
parser.add_argument("--units", type=int, default=128)
parser.add_argument("--drop-path", type=float, default=0.3)
parser.add_argument("--samples", type=int, help="training images (default: all)")
parser.add_argument("--seeds", type=int, default=1)
args = parser.parse_args()


class DropPath(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = 1 - args.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    def __init__(self, units: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(units), nn.LayerNorm(units), heads
        self.qkv, self.proj = nn.Linear(units, 3 * units), nn.Linear(units, units)
        self.mlp = nn.Sequential(nn.Linear(units, 4 * units), nn.GELU(), nn.Linear(4 * units, units))
        self.drop_path = DropPath()

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    def __init__(self, units: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, units, 7, 7)
        self.places = nn.Parameter(torch.randn(1, 16, units) * 0.02)
        self.blocks = nn.Sequential(*(Block(units) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(units), nn.Linear(units, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixels.view(-1, 1, 28, 28)).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


train_x, train_y, test_x, test_y = images.load(args.data)
train_x, train_y = train_x[: args.samples], train_y[: args.samples]


def train(skip: bool, seed: int) -> tuple[float, float]:
    """Test accuracy and seconds of an epoch."""
    torch.manual_seed(seed)
    model = VisionTransformer(args.units, args.depth)
    if skip:
        dropfx.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = args.epochs * -(-len(train_x) // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seconds = []
    for _ in range(args.epochs):
        start = time.perf_counter()
        for batch in torch.randperm(len(train_x)).split(args.batch):
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds.append(time.perf_counter() - start)
    model.eval()
    with torch.no_grad():
        right = sum(
            (model(x).argmax(1) == y).sum().item() for x, y in zip(test_x.split(500), test_y.split(500), strict=True)
        )
    return right / len(test_x), statistics.median(seconds)


ways = {"PyTorch's masks": False, "samples skipped": True}
results = {way: [train(skip, seed) for seed in range(args.seeds)] for way, skip in ways.items()}
for way, runs in results.items():
    accuracies = ", ".join(f"{accuracy:.1%}" for accuracy, _ in runs)
    print(f"{way}: test accuracy {accuracies}; {statistics.median(s for _, s in runs):.2f} s an epoch")
masked, skipped = results.values()
apart = [100 * (after[0] - before[0]) for before, after in zip(masked, skipped, strict=True)]
print(f"accuracy with skipping: {statistics.mean(apart):+.2f} points", end="")
if args.seeds > 1:
    print(f" (standard error {statistics.stdev(apart) / args.seeds**0.5:.2f}, {args.seeds} seeds)", end="")
print(f"; speed-up of an epoch {statistics.median(b[1] / a[1] for b, a in zip(masked, skipped, strict=True)):.2f}x")
