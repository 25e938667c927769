"""Tensor-parallel models: their ranks work on one result, must drop alike, and are left alone as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dropfx
from tests.distributed import steps
from tests.distributed.harness import WORLD, Checks
from tests.distributed.steps import batch, gradients, make, same

checks = Checks()


def parallel(model: nn.Module) -> nn.Module:
    """The second block's Linears by columns and by rows; all else is the same on all ranks."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model.blocks[1], init_device_mesh("cpu", (WORLD,)), plan)
    return model


def step(model: nn.Module, x: Tensor) -> Tensor:
    """A step on the same rows on every rank, in which nothing may be rewritten."""
    torch.manual_seed(5)
    model.zero_grad()
    with steps.recording() as masks:
        y = model(x)
    assert not masks
    y.square().sum().backward()
    return y.detach()


def check_left_alone(model: nn.Module, original: nn.Module) -> None:
    x = batch()[0]
    for _ in range(2):
        assert torch.equal(step(model, x), step(original, x))
        same(gradients(model), gradients(original), 0.0)
    assert not any("_dropfx" in part.__dict__ for part in model.modules() if part is not model)


@checks
def parallelised_then_compiled() -> None:
    model = dropfx.compile(parallel(make()), min_speedup=0)
    check_left_alone(model, parallel(make()))
    report = dropfx.explain(model, batch()[0])
    assert {site.name for site in report.sites} == steps.SITES
    assert all("tensor-parallel" in site.reason and not site.rewritten for site in report.sites)
    assert "tensor-parallel" in str(report)
    with pytest.raises(dropfx.DropfxError, match="tensor-parallel"):
        dropfx.testing.assert_equivalent(model, batch()[0])
    dropfx.compile(model, example_inputs=batch()[0], min_speedup=0)
    check_left_alone(model, parallel(make()))


@checks
def compiled_then_parallelised() -> None:
    """After a step in which it was compiled."""
    model = dropfx.compile(make(), min_speedup=0)
    assert set(steps.forward_backward(model, batch())[2]) == steps.SITES
    check_left_alone(parallel(model), parallel(make()))


@checks
def parallelised_and_sharded() -> None:
    """FSDP2 gathers parts of the parallel parameters."""
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))

    def build() -> nn.Module:
        model = make()
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model.blocks[1], mesh["tensor"], plan)
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])

    check_left_alone(dropfx.compile(build(), min_speedup=0), build())


@checks
def inputs_and_parameters_that_are_distributed() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    model = dropfx.compile(distribute_module(make(), mesh), min_speedup=0)
    x = distribute_tensor(batch()[0], mesh, [Replicate()])
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with steps.recording() as masks:
        y = model(x).full_tensor()
    assert not masks
    torch.testing.assert_close(y, make().eval()(batch()[0]))
    assert "tensor-parallel" in str(dropfx.explain(model, x))


@checks
def under_dynamo() -> None:
    check_under_dynamo("eager")


def check_under_dynamo(inner: str) -> None:
    x = batch()[0]
    model = torch.compile(parallel(make()), backend="dropfx", options={"inner": inner, "min_speedup": 0})
    original = torch.compile(parallel(make()), backend=inner)
    for _ in range(2):
        assert torch.equal(step(model, x), step(original, x))
        same(gradients(model), gradients(original), 0.0)
