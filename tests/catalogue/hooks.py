"""Models with hooks on the root, on containers and on leaves; every hook counts its calls on its module."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn

from tests.catalogue.case import case, mlp


def count(module: nn.Module, name: str) -> None:
    if not hasattr(module, "hook_calls"):
        module.hook_calls = Counter()
    module.hook_calls[name] += 1


def calls(model: nn.Module) -> dict[str, Any]:
    return {path: dict(module.__dict__.get("hook_calls", {})) for path, module in model.named_modules()}


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    count(module, "forward")
    return 2.0 * output


def double_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    count(module, "pre")
    return (2.0 * args[0],)


def double_gradient(module: nn.Module, grad_input: tuple[Tensor | None, ...], grad_output: Any) -> Any:
    count(module, "backward")
    return tuple(None if grad is None else 2.0 * grad for grad in grad_input)


def double_gradient_before(module: nn.Module, grad_output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    count(module, "pre_backward")
    return tuple(2.0 * grad for grad in grad_output)


def only_count(module: nn.Module, args: Any, *rest: Any) -> None:
    count(module, "only_count")


HOOKS = {
    "forward": lambda module: module.register_forward_hook(double_output),
    "pre": lambda module: module.register_forward_pre_hook(double_input),
    "backward": lambda module: module.register_full_backward_hook(double_gradient),
    "pre_backward": lambda module: module.register_full_backward_pre_hook(double_gradient_before),
    "only_count": lambda module: module.register_forward_hook(only_count),
    "kwargs": lambda module: module.register_forward_pre_hook(only_count, with_kwargs=True),
    "always": lambda module: module.register_forward_hook(only_count, always_call=True),
}


class Nested(nn.Module):
    """Two containers of an MLP with a site each, and a site between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = mlp(64, 96, 64), nn.Dropout(0.5), mlp(64, 96, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x)))


PLACES = {
    "root": ("", ("body.2", "drop", "head.2"), ()),
    "container": ("body", ("head.2", "drop"), ("body.2",)),
    "leaf": ("body.0", ("body.2", "head.2", "drop"), ()),
    "dropout": ("body.2", ("head.2", "drop"), ("body.2",)),
}


def nested_with_hook(path: str, hook: str) -> nn.Module:
    model = Nested()
    HOOKS[hook](model.get_submodule(path))
    return model


for place, (path, rewritten, optional) in PLACES.items():
    for hook in HOOKS:
        if place == "leaf" and "backward" in hook:  # which ends the graph, and the rest of `body` runs as written
            rewritten, optional = PLACES["container"][1:]
        add = case(f"hook_{hook}_{place}", rewritten=rewritten, optional=optional, state=calls)
        add(lambda path=path, hook=hook: nested_with_hook(path, hook))
