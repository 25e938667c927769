"""Bad models and inputs get a clear typed error that names the argument, or simply work; the model is untouched."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropfx
from dropfx.draws.runtime import shared
from tests.catalogue import CASES
from tests.catalogue.arguments import Optional
from tests.catalogue.case import check_step, mlp, pair, recording
from tests.oracle import oracle
from tests.promises.untouched import example_mlp, untouched

# Models


@pytest.mark.parametrize("model", [None, 3, "model", nn.Linear, lambda x: x, torch.ones(2), [nn.Dropout(0.5)]])
@pytest.mark.parametrize("call", [dropfx.compile, dropfx.explain, dropfx.restore])
def test_not_a_module(call: Any, model: object) -> None:
    with pytest.raises(dropfx.DropfxError, match="model") as caught:
        call(model)
    assert isinstance(caught.value, TypeError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_script_module(kind: str) -> None:
    plain = example_mlp().eval()
    model = torch.jit.script(plain) if kind == "script" else torch.jit.trace(plain, torch.randn(2, 64))
    for call in (dropfx.compile, dropfx.explain):
        with pytest.raises(dropfx.DropfxError, match="ScriptModule") as caught:
            call(model)
        assert isinstance(caught.value, TypeError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_module_inside_runs_as_written() -> None:
    """Its neighbours may be rewritten or not."""
    original, compiled = (nn.Sequential(mlp(64, 96, 64).eval(), *mlp(64, 96, 8)) for _ in range(2))
    compiled.load_state_dict(original.state_dict())
    compiled[0] = torch.jit.script(compiled[0])
    dropfx.compile(compiled, min_speedup=0)
    check_step(original, compiled, (torch.randn(4, 64),), left_alone=("3",))


def test_wrapper_of_torch_compile() -> None:
    wrapped = torch.compile(example_mlp(), backend="eager")
    for call in (dropfx.compile, dropfx.explain):
        with pytest.raises(dropfx.DropfxError, match=r"torch\.compile") as caught:
            call(wrapped)
        assert isinstance(caught.value, TypeError)


def test_wrapper_of_data_parallel() -> None:
    wrapped = nn.DataParallel(example_mlp())
    with pytest.raises(dropfx.DropfxError, match="DataParallel") as caught:
        dropfx.compile(wrapped)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("name", ["no_site_at_all", "len_of_shape"])
def test_model_without_dropout_warns_and_stays(name: str) -> None:
    """At once where that can be told; at the latest in the first training call."""
    case = CASES[name]
    original, model = case.make(), case.make()
    for module in [*original.modules(), *model.modules()]:
        if isinstance(module, nn.Dropout):
            module.__class__ = nn.Identity
    args, _ = case.call(4)
    with pytest.warns(UserWarning, match="no dropout"):  # noqa: PT031 - either call may warn
        dropfx.compile(model)
        got = model(*args)
    assert torch.equal(got, original(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*args)


def test_model_without_dropout_is_unchanged() -> None:
    model = CASES["no_site_at_all"].make()
    with untouched(model), pytest.warns(UserWarning, match="no dropout"):
        assert dropfx.compile(model, example_inputs=(torch.randn(2, 64),)) is model


def test_model_with_functional_dropout_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dropfx.compile(CASES["functional"].make(), min_speedup=0)(torch.randn(2, 64))


def test_instance_with_a_forward_of_its_own() -> None:
    """It would hide the compiled forward: a clear error, or it runs as written."""
    model = example_mlp()
    model.forward = types.MethodType(lambda self, x: x * 2.0, model)
    x = torch.randn(2, 64)
    try:
        dropfx.compile(model, min_speedup=0)
    except dropfx.DropfxError as error:
        assert "forward" in str(error)  # noqa: PT017
    assert torch.equal(model(x), 2.0 * x)


def test_child_with_a_forward_of_its_own() -> None:
    models = [mlp(64, 96, 96, 8), mlp(64, 96, 96, 8)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model[3].forward = types.MethodType(lambda self, x: F.linear(x, self.weight) * 2.0, model[3])
    dropfx.compile(models[1], min_speedup=0)
    assert set(check_step(*models, (torch.randn(4, 64),))) == {"2", "5"}


# Inputs


BAD_EXAMPLES = {
    "width": (torch.zeros(2, 63),),
    "dtype": (torch.zeros(2, 64, dtype=torch.float64),),
    "integers": (torch.zeros(2, 64, dtype=torch.int64),),
    "too_many": (torch.zeros(2, 64), torch.zeros(2, 64)),
    "not_a_tensor": ("x",),
    "none": (None,),
}


@pytest.mark.parametrize("inputs", BAD_EXAMPLES)
def test_example_inputs_that_do_not_fit(inputs: str) -> None:
    model = example_mlp()
    with untouched(model):
        with pytest.raises(dropfx.DropfxError, match="inputs") as caught:
            dropfx.compile(model, example_inputs=BAD_EXAMPLES[inputs], min_speedup=0)
        assert isinstance(caught.value, (ValueError, TypeError))
        with pytest.raises(dropfx.DropfxError, match="inputs") as caught:
            dropfx.explain(model, *BAD_EXAMPLES[inputs])
        assert isinstance(caught.value, (ValueError, TypeError))


def test_missing_and_unknown_example_arguments() -> None:
    model = Optional()
    with untouched(model):
        for options in (
            {"example_kwargs": {"scale": True}},
            {"example_inputs": (torch.ones(2, 64),), "example_kwargs": {"no": 1}},
        ):
            with pytest.raises(dropfx.DropfxError, match=r"inputs|kwargs"):
                dropfx.compile(model, **options)
        with pytest.raises(dropfx.DropfxError, match=r"inputs|kwargs"):
            dropfx.explain(model)
        with pytest.raises(dropfx.DropfxError, match=r"inputs|kwargs"):
            dropfx.explain(model, torch.ones(2, 64), kwargs={"no": 1})


@pytest.mark.parametrize("kwargs", ["x", 3, [1]])
def test_example_kwargs_must_be_a_dict(kwargs: object) -> None:
    model = example_mlp()
    with untouched(model), pytest.raises(dropfx.DropfxError, match="kwargs"):
        dropfx.compile(model, example_inputs=(torch.ones(2, 64),), example_kwargs=kwargs)


def test_one_example_tensor_need_not_be_in_a_tuple() -> None:
    """A clear error, or it simply works."""
    model = example_mlp()
    try:
        dropfx.compile(model, example_inputs=torch.zeros(2, 64), min_speedup=0)
    except dropfx.DropfxError as error:
        assert "example_inputs" in str(error)  # noqa: PT017
        return
    with recording() as masks:
        model(torch.zeros(2, 64))
    assert set(masks) == {"2", "5"}


def test_example_inputs_trace_at_once_and_leave_no_trace() -> None:
    case = CASES["batch_norm_before"]
    original, model = case.make(), case.make().eval()
    args, _ = case.call(4)
    before = shared.rewritten
    dropfx.compile(model, example_inputs=args, min_speedup=0)
    traced = shared.rewritten
    assert traced > before
    assert not any(module.training for module in model.modules())
    assert args[0].grad is None
    check_step(original, model.train(), args, input_grad=False)
    assert model[1].num_batches_tracked == 1
    assert shared.rewritten == traced


def test_example_kwargs_trace_at_once() -> None:
    model = dropfx.compile(
        Optional(), example_inputs=(torch.zeros(2, 64),), example_kwargs={"mode": "times"}, min_speedup=0
    )
    traced = shared.rewritten
    model(torch.zeros(2, 64), mode="times")
    assert shared.rewritten == traced


@pytest.mark.parametrize("shape", [(), (64,), (1, 64), (0, 64), (2, 0, 64), (2, 3, 4, 64), (2, 63)])
def test_any_shape_does_what_the_original_does(shape: tuple[int, ...]) -> None:
    """0-d and misfits raise the original's error, the others work; and so does the next call."""
    original, compiled = pair(CASES["mlp"], torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        try:
            original(x)
        except Exception as error:
            with pytest.raises(type(error)):
                compiled(x)
        else:
            assert set(check_step(original, compiled, (x,), dtype=torch.float64)) == {"2", "5"}
        check_step(original, compiled, (torch.randn(3, 64, dtype=torch.float64),), dtype=torch.float64)


def test_one_dim_and_zero_dim_sites() -> None:
    for shape in ((), (1,), (5,)):
        original, compiled = nn.Dropout(0.5), dropfx.compile(nn.Sequential(nn.Dropout(0.5)), min_speedup=0)
        assert compiled(torch.ones(shape)).shape == original(torch.ones(shape)).shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16, torch.complex64])
def test_input_of_another_dtype_than_the_weights(dtype: torch.dtype) -> None:
    compiled = dropfx.compile(example_mlp(), min_speedup=0)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            compiled(torch.zeros(2, 64, dtype=dtype))
        compiled(torch.zeros(2, 64))


def test_model_and_input_of_another_dtype_than_before() -> None:
    original, compiled = pair(CASES["mlp"])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        args, _ = CASES["mlp"].call(4, dtype)
        with recording() as masks:
            y = compiled.to(dtype)(*args)
        assert y.dtype == dtype
        assert set(masks) == {"2", "5"}
    check_step(original, compiled.load_state_dict(original.state_dict()) and compiled, args)


@pytest.mark.parametrize("inputs", [((),), ((torch.zeros(2, 64),) * 2,)])
def test_wrong_number_of_arguments_is_the_originals_error(inputs: tuple[Any]) -> None:
    compiled = dropfx.compile(example_mlp(), min_speedup=0)
    with pytest.raises(TypeError):
        compiled(*inputs[0])
    with pytest.raises(TypeError):
        compiled(torch.zeros(2, 64), unknown=1)
    compiled(torch.zeros(2, 64))


class Failing(nn.Module):
    """Raises on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(64, 96, 8)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        h = self.mlp(x)
        if fail:
            raise KeyError("the model's own")
        return h


def test_errors_of_the_model_are_its_own() -> None:
    compiled = dropfx.compile(Failing(), min_speedup=0)
    for _ in range(2):
        with pytest.raises(KeyError, match="the model's own"):
            compiled(torch.zeros(2, 64), fail=True)
        with recording() as masks:
            compiled(torch.zeros(2, 64))
        assert set(masks) == {"mlp.2"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_pass_through(value: float) -> None:
    """No error; where a unit is kept they are seen."""
    compiled = dropfx.compile(example_mlp(), min_speedup=0)
    x = torch.zeros(2, 64)
    x[0] = value
    y = compiled(x)
    assert not torch.isfinite(y[0]).any()
    assert torch.isfinite(y[1]).all()
    oracle.run(compiled, (x,))
