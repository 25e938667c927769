"""`dropfx.explain`: what is rewritten, why not, and nothing else changed."""

from __future__ import annotations

import copy
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropfx
from tests.catalogue import CASES
from tests.catalogue.case import Case, mlp, recording
from tests.catalogue.test_equivalence import every

ALL = {"min_speedup": 0}
TRACEABLE = (
    "mlp",
    "functional",
    "qkv",
    "embedding",
    "tied",
    "residual_add",
    "gated",
    "shared_dropout",
    "alexnet",
    "vgg16",
)
WRITES = (
    "counter",
    "list_append",
    "dict_write",
    "activation_list",
    "buffer_assigned",
    "inplace_buffer",
    "inplace_input",
)
AWKWARD = (*WRITES, "batch_norm_before", "random_branch", "checkpoint", "weight_norm_middle", "spectral_norm_middle")

# Tensors that are no leaves sit in these models; PyTorch can't copy them.
NOT_COPIED = [name for name in CASES if name.startswith(("weight_norm_by_hook", "pruned"))]


def explained(name: str, batch: int = 4, **options: Any) -> dict[str, Any]:
    """Site name -> its report, at min_speedup 0."""
    case = CASES[name]
    args, kwargs = case.call(batch)
    report = dropfx.explain(case.make(), *args, options={**ALL, **options}, kwargs=kwargs)
    return {site.name: site for site in report.sites}


@pytest.mark.parametrize("name", TRACEABLE)
def test_names_and_order_of_sites(name: str) -> None:
    assert tuple(explained(name)) == CASES[name].rewritten


def test_fields_of_a_rewritten_site() -> None:
    site = explained("mlp")["5"]
    assert (site.name, site.rate, site.pattern, site.rewritten, site.reason) == ("5", 0.3, "block", True, "")
    assert abs(site.drawn_rate - 0.3) <= 0.02
    assert 0 < site.flops_compact < site.flops_dense
    assert site.predicted_speedup > 0
    assert explained("mlp", pattern="slice")["5"].pattern == "slice"


@pytest.mark.filterwarnings("ignore:None of the inputs", "ignore:.*no dropout")
@pytest.mark.parametrize("name", every([n for n in CASES if n not in NOT_COPIED and not n.startswith("hook_")], 48))
def test_sites_agree_with_what_is_recorded(name: str) -> None:
    """Exactly the sites explained as rewritten have a mask, and every other one has a reason of one line."""
    case = CASES[name]
    args, kwargs = case.call(4)
    sites = explained(name)
    for site in sites.values():
        assert site.rewritten == (site.reason == "")
        assert "\n" not in site.reason
        assert 0.0 <= site.rate <= 1.0
    if name.startswith("rand"):  # which layers run is drawn anew
        return
    if name == "no_site_at_all":
        assert not sites
        return
    with recording() as masks:
        dropfx.compile(case.make(), **ALL)(*copy.deepcopy(args), **kwargs)
    assert {site.name for site in sites.values() if site.rewritten} == set(masks)
    assert set(case.rewritten) <= set(masks)


@pytest.mark.parametrize(
    ("name", "site", "words"),
    [
        ("attention_long", "attn_drop", "attention|softmax|contract"),
        ("batch_norm_after", "1", "batch|statistic"),
    ],
)
def test_reasons_of_refusals(name: str, site: str, words: str) -> None:
    found = explained(name)[site]
    assert not found.rewritten
    assert any(word in found.reason.lower() for word in words.split("|")), found.reason


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_inside_of_attention_has_a_row(need_weights: bool, rate: float) -> None:
    attention = nn.MultiheadAttention(64, 4, dropout=rate, batch_first=True)
    x = torch.randn(2, 5, 64)
    report = dropfx.explain(attention, x, x, x, kwargs={"need_weights": need_weights}, options=ALL)
    live = {site.name: (site.rate, site.rewritten, "attention" in site.reason) for site in report.sites if site.rate}
    name = ":dropout_1" if need_weights else ":scaled_dot_product_attention"
    assert live == ({name: (rate, False, True)} if rate else {})


def test_linear_of_attention_skips_the_units_that_are_dropped_behind_it() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.25, batch_first=True)
    report = dropfx.explain(layer, torch.randn(2, 5, 64), options=ALL)
    assert [site.name for site in report.sites if site.rewritten] == ["dropout1", "dropout", "dropout2"]


@pytest.mark.parametrize(("name", "words"), [("random_branch", "random"), ("data_branch", "branch")])
def test_what_ends_a_graph_is_named(name: str, words: str) -> None:
    """A dropout before a branch on data has no Linear in its graph; the report says what ended that."""
    case = CASES[name]

    class WithSite(type(case.make())):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Any:
            return super().forward(self.extra(x))

    args, _ = case.call(4)
    report = dropfx.explain(WithSite(), *args, options=ALL)
    (site,) = (site for site in report.sites if site.name == "extra")
    assert not site.rewritten
    assert words in report.opaque[""].lower(), report.opaque


@pytest.mark.parametrize("name", NOT_COPIED)
def test_model_that_cannot_be_copied(name: str) -> None:
    """A clear error, or a report; either way the model is compiled and works."""
    try:
        sites = explained(name)
    except dropfx.DropfxError as error:
        assert "cop" in str(error)  # noqa: PT017
        return
    assert set(sites) == {"2", "5"}


def test_predicted_gain_below_the_minimum_is_left_alone() -> None:
    model, x = mlp(256, 1024, 1024, 10), torch.randn(512, 256)
    report = dropfx.explain(model, x, options={"min_speedup": 1e6})
    assert [site.rewritten for site in report.sites] == [False, False]
    assert all("speed" in site.reason for site in report.sites), report.sites[0].reason
    dropfx.compile(model, min_speedup=1e6)
    with recording() as masks:
        torch.manual_seed(0)
        y = model(x)
    dropfx.restore(model)
    torch.manual_seed(0)
    assert not masks
    assert torch.equal(y, model(x))


def test_default_minimum_leaves_tiny_layers_alone_and_rewrites_large_ones() -> None:
    tiny = dropfx.explain(mlp(4, 8, 4, p=0.5), torch.randn(2, 4)).sites
    large = dropfx.explain(mlp(1024, 2048, 2048, 10, p=0.5), torch.randn(512, 1024)).sites
    assert not any(site.rewritten for site in tiny)
    assert all(site.rewritten for site in large), [site.reason for site in large]
    assert all(site.predicted_speedup >= 1.05 for site in large)


@pytest.mark.parametrize("pattern", ["block", "tile"])
def test_the_sites_share_what_the_step_gains(pattern: str) -> None:
    model = mlp(256, 2048, 2048, 256, p=0.5)
    report = dropfx.explain(model, torch.randn(256, 256), options={"pattern": pattern})
    assert all(site.seconds_saved > 0 for site in report.sites)
    gained = report.seconds_written - report.seconds_planned
    assert sum(site.seconds_saved for site in report.sites) == pytest.approx(gained)
    left_alone = dropfx.explain(model, torch.randn(256, 256), options={"pattern": pattern, "min_speedup": 1e3})
    assert all(site.seconds_saved == 0 for site in left_alone.sites)


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_flops_of_one_site(p: float) -> None:
    """Both Linears around the site multiply the kept share only."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(p), nn.Linear(128, 64))
    (site,) = dropfx.explain(model, torch.randn(8, 64, requires_grad=True), options=ALL).sites
    assert site.flops_dense == pytest.approx(2 * 3 * 2 * 8 * 64 * 128, rel=0.35)  # with or without the input's gradient
    assert site.flops_compact / site.flops_dense == pytest.approx(1.0 - site.drawn_rate, abs=0.02)


def test_flops_grow_with_the_batch() -> None:
    few, many = explained("mlp", batch=4)["2"], explained("mlp", batch=8)["2"]
    assert many.flops_dense == 2 * few.flops_dense
    assert many.flops_compact == 2 * few.flops_compact


# The model stays as it was


def snapshot(model: nn.Module, case: Case) -> list[Any]:
    flags = [(type(m), m.training, set(m.__dict__), len(m._forward_hooks)) for m in model.modules()]
    parameters = [(id(p), p.requires_grad, p._version, p.grad) for p in model.parameters()]
    values = [value.tolist() for value in model.state_dict().values()]
    return [
        flags,
        parameters,
        values,
        copy.deepcopy(case.state(model)),
        random.getstate(),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("name", [*TRACEABLE, *AWKWARD])
@pytest.mark.parametrize("mode", every(["mixed", "eval"], 2))
def test_model_flags_and_generators_stay(name: str, mode: str) -> None:
    case = CASES[name]
    model = case.make().train(mode != "eval")
    if mode == "mixed":
        for module in list(model.modules())[1::2]:
            module.training = False
    args, kwargs = case.call(4)
    given = copy.deepcopy((args, kwargs))
    before = snapshot(model, case)
    dropfx.explain(model, *args, options=ALL, kwargs=kwargs)
    assert snapshot(model, case) == before
    for value, same in zip(tensors((args, kwargs)), tensors(given), strict=True):
        assert torch.equal(value, same)
        assert value.grad is None


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def test_hooks_of_the_model_may_count_nothing() -> None:
    seen: list[int] = []
    model = mlp(64, 96, 8)
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(module is model))
    dropfx.explain(model, torch.randn(2, 64), options=ALL)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]


@pytest.mark.parametrize("mode", [True, False])
def test_training_graph_is_analysed_whatever_the_mode(mode: bool) -> None:
    model, x = mlp(64, 96, 96, 8).train(mode), torch.randn(4, 64)
    assert [site.rewritten for site in dropfx.explain(model, x, options=ALL).sites] == [True, True]


@pytest.mark.parametrize("traced", [False, True])
def test_compiled_model_is_explained_and_stays_compiled(traced: bool) -> None:
    model, x = dropfx.compile(mlp(64, 96, 96, 8), **ALL), torch.randn(4, 64)
    if traced:
        model(x)
    kind = type(model)
    sites = dropfx.explain(model, x, options={**ALL, "pattern": "slice"}).sites
    assert [site.pattern for site in sites] == ["slice", "slice"]
    assert type(model) is kind
    with recording() as masks:
        model(x)
    assert set(masks) == {"2", "5"}


def test_without_gradients_the_training_graph_is_the_same() -> None:
    model, x = mlp(64, 96, 96, 8), torch.randn(4, 64)
    want = dropfx.explain(model, x, options=ALL).to_dict()
    with torch.no_grad():
        assert dropfx.explain(model, x, options=ALL).to_dict() == want


# The report


@pytest.fixture
def report() -> Any:
    case = CASES["attention"]
    return dropfx.explain(case.make(), *case.call(4)[0], options=ALL)


def test_text_has_a_row_for_each_site(report: Any) -> None:
    lines = str(report).splitlines()
    for site in report.sites:
        (row,) = (line for line in lines if site.name in line.split() or f" {site.name} " in line)
        assert f"{site.rate:g}" in row
    refused = next(site for site in report.sites if not site.rewritten)
    assert refused.reason.split()[0] in str(report)


def test_dict_is_json(report: Any) -> None:
    loaded = json.loads(json.dumps(report.to_dict()))
    assert [site["name"] for site in loaded["sites"]] == [site.name for site in report.sites]
    fields = {"name", "rate", "drawn_rate", "pattern", "rewritten", "reason"}
    fields |= {"flops_dense", "flops_compact", "predicted_speedup", "seconds_saved"}
    assert all(fields <= set(site) for site in loaded["sites"])


def test_plot_writes_a_picture(report: Any, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    report.plot(str(tmp_path / "again.png"))


@pytest.mark.parametrize("show", [str, repr, lambda report: report.to_dict()])
def test_report_of_a_model_without_sites(show: Callable[[Any], object]) -> None:
    report = dropfx.explain(CASES["no_site_at_all"].make(), torch.randn(2, 64))
    assert len(report.sites) == 0
    assert show(report)
