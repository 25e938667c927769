"""An MLP on MNIST on several processes, with DDP or FSDP2; `dropfx.compile(model)` is the only line that is new.

torchrun --nproc-per-node 2 examples/distributed.py [--with ddp|fsdp] [--data DIR] [--epochs N]
"""

import argparse

import images
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dropfx

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--with", dest="wrapper", choices=("ddp", "fsdp"), default="ddp")
parser.add_argument("--data", help="folder of idx files, such as Fashion-MNIST's (default: the embedded MNIST-5k)")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--hidden", type=int, default=2048)
args = parser.parse_args()

on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)  # one seed for all ranks: the same weights and order of images, yet draws of their own
train_x, train_y, test_x, test_y = (part.to(device) for part in images.load(args.data))

model = nn.Sequential(
    nn.Linear(784, args.hidden),
    nn.ReLU(),
    nn.Dropout(0.5),
    nn.Linear(args.hidden, args.hidden),
    nn.ReLU(),
    nn.Dropout(0.5),
    nn.Linear(args.hidden, 10),
).to(device)
dropfx.compile(model)
model = DistributedDataParallel(model) if args.wrapper == "ddp" else fully_shard(model)

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
order = torch.Generator().manual_seed(0)
for epoch in range(args.epochs):
    model.train()
    shuffled = torch.randperm(len(train_x), generator=order)
    for batch in shuffled[: len(shuffled) // 128 * 128].split(128):
        mine = batch[rank::world]
        loss = nn.functional.cross_entropy(model(train_x[mine]), train_y[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():  # FSDP2 gathers weights in every forward: all ranks evaluate
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")

dist.destroy_process_group()
