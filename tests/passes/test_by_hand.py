"""drop_identities, expand_cats, join_cats and keep_layouts on graphs built by hand."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from dropfx.graph.notes import Form, UnitAxis, notes
from dropfx.graph.pass_infra import Context
from dropfx.passes.drop_identities import drop_identities
from dropfx.passes.expand_cats import expand_cats
from dropfx.passes.join_cats import join_cats
from dropfx.passes.keep_layouts import keep_layouts
from tests.passes.by_hand import Built, changed, context, names

# -- drop_identities ------------------------------------------------------------------------------------------------

IDENTITIES: dict[str, Any] = {
    "cat of one": (torch.cat, lambda x: ([x], -1)),
    "expand to its own": ("expand", lambda x: (x, -1, -1)),
    "repeated once": ("repeat", lambda x: (x, 1, 1)),
    "padded by nothing": (F.pad, lambda x: (x, (0, 0))),
    "ellipsis": (operator.getitem, lambda x: (x, Ellipsis)),
    "to its width": (operator.getitem, lambda x: (x, (slice(None), slice(0, 8)))),
}
OTHERS: dict[str, Any] = {
    "cat of two": (torch.cat, lambda x: ([x, x], -1)),
    "expand to more": ("expand", lambda x: (x, 2, 4, 8)),
    "repeated": ("repeat", lambda x: (x, 1, 2)),
    "padded": (F.pad, lambda x: (x, (0, 1))),
    "shorter": (operator.getitem, lambda x: (x, (slice(None), slice(0, 7)))),
    "rows, whose number the trace has by chance": (operator.getitem, lambda x: (x, slice(0, 4))),
}


def identity(target: Any, args: Any, pinned: bool = False) -> tuple[Built, fx.GraphModule]:
    """tanh(identity(linear(x, W)))"""
    built = Built()
    x, weight = built.input("x", 4, 6), built.input("weight", 8, 6, parameter=True)
    h = built.call(F.linear, x, weight)
    made = built.call(target, *args(h))
    if pinned:
        notes(h)["pinned"] = True
    return built, built.module(built.call(torch.tanh, made))


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_goes(name: str) -> None:
    built, module = identity(*IDENTITIES[name])
    expected = built.run(module)
    assert changed(drop_identities(module, context()))
    assert names(module) == ["linear", "tanh"]
    torch.testing.assert_close(built.run(module), expected)
    assert not changed(drop_identities(module, context()))


@pytest.mark.parametrize("name", OTHERS)
def test_what_changes_something_stays(name: str) -> None:
    _, module = identity(*OTHERS[name])
    before = names(module)
    assert not changed(drop_identities(module, context()))
    assert names(module) == before


def test_what_is_written_to_keeps_its_copy() -> None:
    _, module = identity(*IDENTITIES["cat of one"], pinned=True)
    assert not changed(drop_identities(module, context()))
    assert names(module) == ["linear", "cat", "tanh"]


# -- expand_cats and join_cats --------------------------------------------------------------------------------------


def joined(dropped: bool = True, dim: int = -1) -> tuple[Built, fx.GraphModule]:
    """linear(cat([dropout(h), c], dim), W, b)"""
    built = Built()
    x, c = built.input("x", 4, 6), built.input("c", 4, 8)
    h = built.call(F.linear, x, built.input("inner", 8, 6, parameter=True))
    weight = built.input("weight", 5, 16 if dim == -1 else 8, parameter=True)
    bias = built.input("bias", 5, parameter=True)
    first = built.call(F.dropout, h, 0.5, True) if dropped else built.call(torch.tanh, h)
    return built, built.module(built.call(F.linear, built.call(torch.cat, [first, c], dim), weight, bias))


def products(module: fx.GraphModule) -> list[fx.Node]:
    """The Linears behind the first one."""
    return [node for node in module.graph.nodes if node.target is F.linear][1:]


def test_a_product_is_taken_apart_and_made_whole_again() -> None:
    built, module = joined()
    expected = built.run(module)
    assert changed(expand_cats(module, context()))
    assert names(module)[-6:] == ["split_with_sizes", "getitem", "getitem", "linear", "linear", "add"]
    torch.testing.assert_close(built.run(module), expected)
    assert changed(join_cats(module, context()))
    module.graph.eliminate_dead_code()
    assert names(module) == ["linear", "dropout", "cat", "linear"]
    torch.testing.assert_close(built.run(module), expected)


def test_products_of_which_one_is_gathered_stay_apart() -> None:
    _, module = joined()
    expand_cats(module, context())
    first = products(module)[0]
    notes(first)["reads"] = {first.args[0]: Form(0, UnitAxis(-1))}
    assert not changed(join_cats(module, context()))
    assert len(products(module)) == 2


@pytest.mark.parametrize(
    ("given", "options"),
    [
        pytest.param({"dropped": False}, {}, id="nothing is dropped"),
        pytest.param({"dim": 0}, {}, id="rows are joined"),
        pytest.param({}, {"pattern": "tile"}, id="tiles are dropped in whole weights"),
    ],
)
def test_a_product_that_stays_whole(given: dict[str, Any], options: dict[str, Any]) -> None:
    _, module = joined(**given)
    assert not changed(expand_cats(module, context(**options)))
    assert len(products(module)) == 1


def test_a_weight_that_is_written_to_is_not_cut() -> None:
    _, module = joined()
    notes(products(module)[0].args[1])["pinned"] = True
    assert not changed(expand_cats(module, context()))


# -- keep_layouts ---------------------------------------------------------------------------------------------------


def turned(target: Any, *args: Any) -> tuple[Built, fx.GraphModule, Context]:
    """dropout(h), where the model's h lay with its first two axes exchanged; a draw of another site is there."""
    built = Built()
    x = built.input("x", 4, 3, 8)
    h = built.call("transpose", built.call("contiguous", built.call("transpose", x, 0, 1)), 0, 1)
    module = built.module(built.call(target, h, *args))
    made = context()
    made.draws[0] = {}
    return built, module, made


def test_a_dropout_draws_in_the_order_of_the_model() -> None:
    built, module, made = turned(F.dropout, 0.5, True)
    expected = built.run(module)
    (copy,) = module.graph.find_nodes(op="call_method", target="contiguous")
    copy.replace_all_uses_with(copy.args[0])  # as if the layer before it had been turned
    assert not torch.equal(built.run(module)[0], expected[0])
    assert changed(keep_layouts(module, made))
    torch.testing.assert_close(built.run(module), expected)
    assert names(module)[-4:] == ["permute", "contiguous", "permute", "dropout"]


def test_a_mask_by_hand_is_drawn_in_the_order_of_the_model() -> None:
    built, module, made = turned("bernoulli", 0.5)
    (mask,) = module.graph.find_nodes(op="call_method", target="bernoulli")
    notes(mask)["val"] = notes(mask.args[0])["val"]  # it was drawn in place
    assert changed(keep_layouts(module, made))
    assert names(module)[-4:] == ["permute", "contiguous", "bernoulli", "permute"]
    assert built.run(module)[0].stride() == notes(mask)["val"].stride()


@pytest.mark.parametrize("target", [torch.relu, F.dropout1d], ids=["draws nothing", "drops channels"])
def test_other_operations_are_left(target: Any) -> None:
    _, module, made = turned(target)
    assert not changed(keep_layouts(module, made))


def test_where_nothing_was_rewritten_nothing_moves() -> None:
    _, module, _ = turned(F.dropout, 0.5, True)
    assert not changed(keep_layouts(module, context()))
