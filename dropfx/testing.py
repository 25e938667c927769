"""For tests of users' own models: what was drawn, and whether the compiled model is exact given the draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dropfx.draws.runtime import Masks, backward_under, numbers_of_their_own, recording
from dropfx.errors import InvalidInput, InvalidModel, NotEquivalent
from dropfx.explain import options_for
from dropfx.frontend.compile import check_inputs, check_model
from dropfx.frontend.compiled_module import State
from dropfx.frontend.dtensor import TENSOR_PARALLEL, tensor_parallel
from dropfx.frontend.packed_sequence import opened
from dropfx.frontend.swapped_class import swap
from dropfx.frontend.trial import copy_inputs, generators_kept, seed_others, training_copy
from dropfx.graph.dropout_ops import DROPOUT_FUNCTIONS, DROPOUT_MODULES, RECURRENT_FUNCTIONS
from dropfx.ops.recurrent.layered import layered

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 2e-3),
    torch.bfloat16: (5e-2, 1e-2),
}
"""dtype -> (rtol, atol); under autocast those of its dtype. atol is multiplied by the largest magnitude in the compared
tensor, for a gradient by the largest in all gradients: a gradient that is zero but for rounding (of a bias before a
batch normalisation) has no magnitude of its own."""

_KINKS = (
    "A unit within rounding of the kink of a ReLU or a maximum may have fallen on either side; the same check in "
    "float64, of a copy by `.double()` with inputs of that dtype, tells such a difference from a fault."
)


def record() -> AbstractContextManager[list[Masks]]:
    """Context manager: record what compiled models draw.

    Yields:
        A list that gets one dict for each compiled forward: site name -> dense multiplier, 0 or the scale,
        broadcastable to the tensor that the site drops. Sites that run as written are not in it.
    """
    return recording()


def assert_equivalent(
    model: nn.Module,
    *inputs: Any,
    options: dict[str, Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Check on your own model that it is exact given the draw (docs/design.md, promise 2).

    Two copies of the model run in training mode on the same inputs and random numbers: a compiled one, and an original
    one in which `dropout(x) := x * recorded mask`. Outputs, buffers and the gradients of all parameters and floating
    inputs are compared. The model itself does not change. A unit within rounding of the kink of a ReLU or a maximum
    may fall on either side, and its gradient with it: often in half precision, among millions of units in float32 too.
    Check such models in float64.

    Args:
        model: any module, compiled or not.
        inputs, kwargs: of one training call.
        options: options of `dropfx.compile`; those of a compiled model are the default.
        rtol, atol: override TOLERANCES.

    Raises:
        InvalidModel (TypeError): as `explain` does, and for tensor-parallel models, which run as written.
        NotEquivalent (AssertionError): names each tensor that differs and by how much.
    """
    check_model(model)
    checked = options_for(model, options)
    check_inputs(model, inputs, kwargs or {})
    if tensor_parallel(model, (inputs, kwargs)):
        raise InvalidModel(f"model: it runs as written, so there is nothing to compare: {TENSOR_PARALLEL}")
    compiled, reference = training_copy(model, share=False), training_copy(model, share=False)
    swap(compiled, State(checked, quiet=True))
    with generators_kept():
        seed = torch.seed()
        with record() as masks, numbers_of_their_own():
            ours = _step(compiled, seed, inputs, kwargs or {})
        with _masked(reference, masks[0] if masks else {}, checked.pattern.drops_weights):
            theirs = _step(reference, seed, inputs, kwargs or {})
    largest = max(
        (float(v.abs().max()) for k, v in theirs.items() if "gradient" in k and v is not None and v.numel()),
        default=0.0,
    )
    wrong = [
        text
        for name, expected in theirs.items()
        if (text := _difference(name, ours.get(name), expected, largest if "gradient" in name else 0.0, rtol, atol))
    ]
    if wrong:
        rounded = any(v is not None and v.is_floating_point() and v.dtype is not torch.float64 for v in theirs.values())
        lines = ["the compiled model and the original under the same masks differ:", *wrong]
        raise NotEquivalent("\n".join([*lines, _KINKS] if rounded else lines))


def _step(model: nn.Module, seed: int, inputs: Any, kwargs: Any) -> dict[str, Tensor | None]:
    """Forward and backward; everything that must agree, by name."""
    args, named = copy_inputs((inputs, kwargs))
    torch.manual_seed(seed)
    seed_others(seed % 2**32)
    try:
        out = model(*args, **named)
    except Exception as error:
        raise InvalidInput(f"inputs: {type(model).__name__}.forward fails on them: {error}") from error
    found: dict[str, Tensor | None] = {}
    total: Any = 0
    generator = torch.Generator().manual_seed(seed % 2**63)
    for index, leaf in enumerate(pytree.tree_leaves(opened(out))):
        if isinstance(leaf, Tensor):
            found[f"output {index}"] = leaf.detach()
            if leaf.requires_grad:
                weights = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
                total = total + (leaf * weights.to(leaf)).sum()
    if isinstance(total, Tensor):
        total.backward()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[f"gradient of {name}"] = gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
    for index, leaf in enumerate(pytree.tree_leaves(opened((args, named)))):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            found[f"gradient of input {index}"] = leaf.grad
    found.update({f"buffer {name}": buffer for name, buffer in model.named_buffers()})
    return found


def _difference(
    name: str, ours: Tensor | None, theirs: Tensor | None, scale: float, rtol: float | None, atol: float | None
) -> str | None:
    if theirs is None or ours is None:
        # a gradient of exact zeros and no gradient say the same
        present = ours if theirs is None else theirs
        return None if present is None or not present.any() else f"  {name}: only one of the two models has it"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"  {name}: got {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(theirs.shape)}"
    device = theirs.device.type
    lowered = theirs.dtype == torch.float32 and torch.is_autocast_enabled(device)
    computed = torch.get_autocast_dtype(device) if lowered else theirs.dtype
    relative, absolute = TOLERANCES.get(computed, (0.0, 0.0))
    if theirs.numel() and theirs.dtype in TOLERANCES:
        absolute *= max(float(theirs.detach().abs().max()), scale, 1e-30)
    relative, absolute = relative if rtol is None else rtol, absolute if atol is None else atol
    if torch.allclose(ours, theirs, rtol=relative, atol=absolute, equal_nan=True):
        return None
    worst = float((ours.double() - theirs.double()).abs().max())
    return f"  {name}: largest difference {worst:.3g}, allowed {absolute:.3g} + {relative:.3g} * |expected|"


class _Substitute(TorchFunctionMode):
    """Replaces a dropout by the product with its recorded mask; where tiles are drawn, of the Linears' weights."""

    def __init__(self, masks: Masks, stack: list[nn.Module], names: dict[nn.Module, str], tiles: bool) -> None:
        super().__init__()
        self._masks, self._stack, self._names = masks, stack, names
        self.calls: Counter[str] = Counter()
        self._functional: Counter[str] = Counter()
        self._draws: Counter[str] = Counter()
        self._recurrences: Counter[str] = Counter()
        self._tiles = tiles
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._tiled: list[tuple[Tensor, list[Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return backward_under(self, *args, **kwargs)
        if func is F.linear and self._tiled:
            return self._tiled_linear(*args, **kwargs)
        if func in RECURRENT_FUNCTIONS:
            return self._recurrent(func, args)
        if func in _BERNOULLI:
            return self._drawn(func, *args, **kwargs)
        if func in _UNIFORM:
            return self._uniform(func, args, kwargs)
        if func in _BELOW and args and id(args[0]) in self._rows:
            return self._rows[id(args[0])][1]
        if func not in DROPOUT_FUNCTIONS or func is torch.dropout:
            return func(*args, **kwargs)
        name = self._name()
        x = args[0] if args else kwargs["input"]
        if self._tiles and (weights := _of_weights(self._masks, name)):
            inplace = kwargs.get("inplace", args[3] if len(args) > 3 else False)
            dropped = x if inplace else x.view_as(x)  # known again by identity
            self._tiled.append((dropped, weights))
            return dropped
        mask = self._masks.get(name)
        if mask is None:
            return func(*args, **kwargs)
        inplace = kwargs.get("inplace", args[3] if len(args) > 3 else False)
        return x.mul_(mask.to(x.dtype)) if inplace else x * mask.to(x.dtype)

    def _drawn(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A draw of a mask that the model makes by hand: where one was recorded, times the p by which it divides it."""
        mask = self._masks.get(self._draw_name("bernoulli"))
        if mask is None:
            found: Tensor = func(input, *args, **kwargs)
            return found
        probabilities = input if func is not Tensor.bernoulli_ else 0.5
        keep = kwargs.get("p", args[0] if args else probabilities)
        drawn = mask != 0 if _of_rows(mask) else mask * keep
        return (input if func is Tensor.bernoulli_ else torch.empty_like(input)).copy_(drawn)

    def _uniform(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Numbers in [0, 1) of which a model makes a mask of rows: those of kept rows lie above any threshold."""
        mask = self._masks.get(self._draw_name("rand"))
        if mask is None:
            found: Tensor = func(*args, **kwargs)
            return found
        # nothing is drawn: what draws behind it draws as in the rewritten model
        drawn = (torch.zeros if func is torch.rand else torch.zeros_like)(*args, **kwargs)
        kept = (mask != 0).view(drawn.shape)
        drawn.masked_fill_(kept, 1 - torch.finfo(drawn.dtype).eps)
        self._rows[id(drawn)] = drawn, kept  # where it is kept below a threshold
        return drawn

    def _draw_name(self, kind: str) -> str:
        path = self._names[self._stack[-1]]
        self._draws[f"{path}:{kind}"] += 1
        return f"{path}:{kind}_{self._draws[f'{path}:{kind}']}"

    def _recurrent(self, func: Any, args: tuple[Any, ...]) -> Any:
        """torch.lstm or its kin, with the masks of the dropouts between its layers, or of the weights after them."""
        packed = isinstance(args[3], (list, tuple))  # the data comes with its batch sizes
        layers, rate, train = args[4 + packed : 7 + packed]
        names = self._gap_names(layers - 1)
        weights = list(args[2 + packed])
        tiled = [bool(masks) for masks in self._mask_inputs(args[0], names, weights, layers, args[7 + packed])]
        args = (*args[: 2 + packed], weights, *args[3 + packed :])
        if not any(tiled) and not any(name in self._masks for name in names):
            return func(*args)

        def between(x: Tensor, gap: int) -> Tensor:
            """A layer's output under the mask of the dropout after it, or by PyTorch's dropout without one."""
            if tiled[gap]:
                return x
            mask = self._masks.get(names[gap])
            return torch.dropout(x, rate, train) if mask is None else x * mask.to(x.dtype)

        return layered(func, args, between)

    def _mask_inputs(
        self, x: Tensor, names: list[str], weights: list[Tensor], layers: int, bidirectional: bool
    ) -> list[list[Tensor]]:
        """Where tiles are drawn, mask the weights of the layers' inputs in place of these; the masks of each gap."""
        places = 2 if bidirectional else 1
        each = len(weights) // (layers * places)
        behind = [masks for dropped, masks in self._tiled if x is dropped]
        gaps = [_of_weights(self._masks, name) if self._tiles else [] for name in names]
        for layer, masks in enumerate([behind, *([list(gap)] for gap in gaps)]):
            for place in range(layer * places, (layer + 1) * places):
                for remaining in filter(None, masks):
                    weight = weights[place * each]
                    weights[place * each] = weight * remaining.pop(0).to(weight.dtype)
        return gaps

    def _gap_names(self, gaps: int) -> list[str]:
        """Names of the dropouts after the layers of the recurrent module that is running."""
        path = self._names[self._stack[-1]]
        self._recurrences[path] += 1
        names = [f"{path}.dropout[{gap}]" if path else f"dropout[{gap}]" for gap in range(gaps)]
        return names if self._recurrences[path] == 1 else [f"{name}#{self._recurrences[path]}" for name in names]

    def _tiled_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for dropped, masks in self._tiled:
            # a Linear that nobody reads has none
            if (input is dropped or weight is dropped) and masks and masks[0].shape == weight.shape:
                weight = weight * masks.pop(0).to(weight.dtype)
        return F.linear(input, weight, bias)

    def restart(self) -> None:
        """Count calls anew: activation checkpointing repeats a forward in backward."""
        self.calls.clear()
        self._functional.clear()
        self._draws.clear()
        self._recurrences.clear()
        self._tiled.clear()
        self._rows.clear()

    def _name(self) -> str:
        module = self._stack[-1]
        path = self._names[module]
        if type(module) in DROPOUT_MODULES:
            calls = self.calls[path]
            return path if calls == 1 else f"{path}#{calls}"
        self._functional[path] += 1
        return f"{path}:dropout_{self._functional[path]}"


_BERNOULLI = (torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_)
_UNIFORM = (torch.rand, torch.rand_like)
_BELOW = (torch.lt, Tensor.lt, Tensor.__lt__, torch.le, Tensor.le, Tensor.__le__)


def _of_rows(mask: Tensor) -> bool:
    return mask.dim() > 1 and mask.size(-1) == 1


def _of_weights(masks: Masks, name: str) -> list[Tensor]:
    """Masks of the weights that drop tiles for a site: `name`, or `name[0]`, `name[1]`, ..."""
    numbered = (masks.get(f"{name}[{index}]") for index in range(len(masks)))
    return [masks[name]] if name in masks else [mask for mask in numbered if mask is not None]


@contextmanager
def _masked(model: nn.Module, masks: Masks, tiles: bool) -> Iterator[None]:
    """The model with its dropouts replaced by the masks of the same names."""
    names = {module: name for name, module in model.named_modules()}
    stack = [model]
    mode = _Substitute(masks, stack, names, tiles)

    def enter(module: nn.Module, args: Any) -> None:
        """The module's call begins."""
        stack.append(module)
        mode.calls[names[module]] += 1

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        """The module's call ends, by an error too."""
        stack.pop()
        if module is model:
            mode.restart()

    handles = [module.register_forward_pre_hook(enter, prepend=True) for module in names]
    handles += [module.register_forward_hook(leave, always_call=True) for module in names]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
