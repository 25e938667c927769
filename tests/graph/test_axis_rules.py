"""How far a region reaches through one operation: which of the two Linears around the site skip work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dropfx
from tests.catalogue import CASES
from tests.catalogue.axes import BEFORE_ONLY, BOTH, NEITHER
from tests.catalogue.products import LINEARS, TWO_DIMS


def products_reached(name: str) -> tuple[float, float]:
    """FLOPs of the Linears that the site makes compact, and of all."""
    case = CASES[name]
    args, kwargs = case.call(4)
    report = dropfx.explain(case.make(), *args, options={"min_speedup": 0}, kwargs=kwargs)
    assert report.sites[0].rewritten, report.sites[0].reason
    return sum(site.flops_dense for site in report.sites), report.flops_dense


@pytest.mark.parametrize(
    "name",
    [
        *(f"{side}_{name}" for name in BOTH for side in ("before", "after")),
        *(f"before_{name}" for name in BEFORE_ONLY if name not in ("cat_dense", "stack_dense")),
        *(f"product_{name}" for name in (*LINEARS, *TWO_DIMS)),
    ],
)
def test_both_linears_skip_work(name: str) -> None:
    reached, all_of_them = products_reached(name)
    assert reached == all_of_them


def test_layer_with_a_transposed_weight_is_a_producer_and_a_consumer() -> None:
    case = CASES["conv1d"]
    (x,), _ = case.call(4)
    report = dropfx.explain(case.make(), x.requires_grad_(), options={"min_speedup": 0})
    assert [(site.name, site.rewritten) for site in report.sites] == [("drop", True), ("resid_drop", True)]
    both, second = (site.flops_dense for site in report.sites)
    assert (both, 2 * second) == (report.flops_dense, report.flops_dense)


@pytest.mark.parametrize(
    "name",
    [
        *(f"after_{name}" for name in BEFORE_ONLY),
        *(f"before_{name}" for name in NEITHER),
        *(f"after_{name}" for name in NEITHER if name != "select_unit"),  # whose result only scales the units
    ],
)
def test_one_of_the_linears_skips_work(name: str) -> None:
    reached, all_of_them = products_reached(name)
    assert 0 < reached < all_of_them


class Ends(nn.Module):
    """A dropout that no Linear is next to."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.drop, self.norm = op, nn.Dropout(0.5), nn.LayerNorm(64)
        self.conv = nn.Conv1d(64, 64, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return self.norm(y) + y.sigmoid() if self.op == "norm" else y.chunk(2, -1)[0]


@pytest.mark.parametrize(
    ("op", "words"), [("norm", "layer_norm, sigmoid"), ("chunk", "chunk, which cuts or moves the units")]
)
def test_reason_names_what_is_next_to_the_site(op: str, words: str) -> None:
    report = dropfx.explain(Ends(op), torch.randn(2, 3, 64), options={"min_speedup": 0})
    assert report.sites[0].reason.endswith(f"(before it: conv1d of 2 groups; after it: {words})")


def test_attention_is_the_reason_also_where_no_pattern_fits() -> None:
    """Five keys are too few for any pattern at this rate; no other pattern would help."""
    case = CASES["attention"]
    (site,) = (s for s in dropfx.explain(case.make(), *case.call(4)[0]).sites if s.name == "attn_drop")
    assert "attention" in site.reason


def test_site_inside_of_a_function_is_named_by_its_module() -> None:
    case = CASES["scaled_dot_product"]
    model = nn.Sequential(case.make(), case.make())
    sites = dropfx.explain(model, *case.call(4)[0], options={"min_speedup": 0}).sites
    fused = "scaled_dot_product_attention"
    assert [s.name for s in sites] == [f"0:{fused}", "0.resid_drop", f"1:{fused}", "1.resid_drop"]
