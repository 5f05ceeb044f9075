"""``torch.compile(backend="tilewright")`` gives what eager gives, for whatever PyTorch can run."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import tilewright as tw
from tilewright.cache import cache_of, with_cache

from .models import tiny
from .sameness import assert_same, assert_same_call

REFERENCE = {"kernels": "reference"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Dynamo forgets what earlier tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(function: Any, dynamic: bool = True, **options: Any) -> Any:
    return torch.compile(function, backend="tilewright", dynamic=dynamic, options={**REFERENCE, **options})


# What functions may do


def _views_of_inputs(x: Tensor) -> Any:
    return x[1:], x.t(), x, x.unsqueeze(0)[..., 3], x.chunk(2)


def _written_inputs(x: Tensor) -> Any:
    x[1:].mul_(2)
    y = x + 1
    x.t().add_(y.t())
    return x[0], y


def _aliased_outputs(x: Tensor) -> Any:
    y = x + 1
    y[0] = 5
    return y, y[1:], y.t(), y, (x * 2).split(2)


def _nested(x: Tensor) -> Any:
    return {"a": [x * 2, None], "b": (3, "text", 1.5, True), "c": {"d": (x.sum(),), "n": x.shape[0] * 2}}


def _integers(x: Tensor) -> Any:
    i = x.mul(3).long()
    return i // 2, i % 3, (i > 1) & (i < 5), ~(i > 0), i.sum(), i.to(torch.uint8) + 1, i.int() << 1


def _no_elements(x: Tensor) -> Any:
    none = x[:0]
    return none, none.sum(0), none.mean(0), none @ x.t(), x[:, :0] @ x[:, :0].t(), torch.cat([x, none]) + 1


def _sometimes_no_elements(x: Tensor) -> Any:
    rest = x[8:]
    return rest * 2, rest.sum(0), rest @ x.t()


def _shrinking(x: Tensor) -> Any:
    half = x.shape[0] // 2
    return x[:half] - x[half : 2 * half], x.new_ones(max(2000 - 100 * x.shape[0], 1)).cumsum(0) + x.sum()


def _layouts(x: Tensor) -> Any:
    return x.t() + 1, (x.t() + 1)[1], x.t().contiguous(), (x + 1)[:1].expand(3, -1)


def _constants(x: Tensor) -> Any:
    return x + torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(3), torch.arange(4) + 1


def _random(x: Tensor) -> Any:
    return x + torch.rand_like(x), torch.rand_like(x) - torch.rand_like(x)


def _graph_breaks(x: Tensor) -> Any:
    y = x * 2
    torch._dynamo.graph_break()
    z = y.t() + 1
    if z.sum() > 0:
        return z[0], y
    return z[1], -y


def _sizes_of_data(x: Tensor) -> Any:
    return x[x > 0] * 2, x * x.sum().item()


def _no_tensor_out(x: Tensor) -> Any:
    return 3, None


def _control_flow(x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


def _complex(x: Tensor) -> Any:
    return torch.view_as_real(torch.view_as_complex(x.reshape(x.shape[0], 2, 2).contiguous()).exp())


def _sorted(x: Tensor) -> Any:
    values, order = x.sort(0)
    return values + 1, order


FUNCTIONS = [
    _views_of_inputs, _written_inputs, _aliased_outputs, _nested, _integers, _no_elements, _sometimes_no_elements,
    _shrinking, _layouts, _constants, _graph_breaks, _sizes_of_data, _no_tensor_out, _control_flow, _complex,
    _sorted,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:PyTorch runs this graph")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: Callable[..., Any]) -> None:
    """Without parameters, at sizes within the first plan and beyond it, and with a layout of its own."""
    fast = _compiled(function)
    for x in (torch.randn(6, 4), torch.randn(19, 4), torch.randn(4, 6).t(), torch.randn(9, 8)[:, ::2]):
        assert_same_call(function, fast, x)


def test_random_numbers() -> None:
    fast = _compiled(_random)
    for rows in (3, 5):
        assert_same_call(_random, fast, torch.randn(rows, 4))


@pytest.mark.parametrize("number", [(2, 5, -3, 0), (2.5, -1.5)])
def test_numbers_as_arguments(number: tuple[float, ...]) -> None:
    def function(x: Tensor, n: float) -> Any:
        return x * n + n, n, x.sum() - max(n, 0)

    fast = _compiled(function)
    for n in number:
        assert_same_call(function, fast, torch.randn(3, 4), n)


def test_arguments_that_share_memory() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y

    fast = _compiled(function)
    whole = torch.randn(6, 4)
    for args in ((whole, whole), (whole[1:], whole[:-1]), (whole, whole.clone())):
        assert_same_call(function, fast, *args)


def test_inputs_without_elements_and_without_dims() -> None:
    def function(x: Tensor) -> Any:
        return x + 1, x.sum(), x.exp()

    fast = _compiled(function)
    for x in (torch.randn(0, 4), torch.randn(4, 0), torch.tensor(2.0), torch.tensor(3)):
        assert_same_call(function, fast, x)


def test_an_index_beyond_its_table_is_refused() -> None:
    table = torch.randn(7, 4)
    fast = _compiled(lambda index: nn.functional.embedding(index, table))
    assert torch.equal(fast(torch.tensor([6, 0, 3])), table[[6, 0, 3]])
    with pytest.raises(tw.InputError, match="index is 7, but its table has 7 entries"):
        fast(torch.tensor([6, 7, 3]))


# Modules


class _Counts(nn.Module):
    """Updates its buffers: a counter in place, a mean that is assigned anew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        self.calls.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.norm(self.linear(x)) - self.mean, self.calls


def test_buffers_are_updated() -> None:
    model = _Counts().eval()
    twin = copy.deepcopy(model)
    fast = _compiled(twin)
    for rows in (3, 5, 40):
        assert_same_call(model, fast, torch.randn(rows, 4), rtol=1e-5, atol=1e-5)
    assert_same(model.state_dict(), twin.state_dict())
    assert model.calls == 3


def test_weights_may_change() -> None:
    """In place, by assignment, and between modules that share their code."""
    first, second = nn.Linear(4, 4).eval(), nn.Linear(4, 4).eval()
    fast = [_compiled(m) for m in (first, second)]
    x = torch.randn(3, 4)
    for _ in range(2):
        for model, compiled in zip((first, second), fast, strict=True):
            assert_same_call(model, compiled, x)
        with torch.no_grad():
            first.weight.mul_(2)
        second.weight = nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Any) -> None:
    model = _Counts().eval()
    fast, x = _compiled(model), torch.randn(3, 4)
    expected = copy.deepcopy(model)(x)[0]
    with mode():
        torch.testing.assert_close(fast(x)[0], expected)


def test_training_is_refused_and_the_model_still_trains() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    fast = _compiled(model)
    with pytest.raises(BackendCompilerFailed, match="no_grad") as error:
        fast(x)
    assert isinstance(error.value.inner_exception, tw.CaptureError)
    model(x).sum().backward()
    assert model.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"kernel": "cpp"}, None, "unknown options kernel; this backend has kernels, autotune, dump"),
        ({"kernels": "cuda"}, None, "triton, cpp, reference"),
        ({"autotune": "max"}, None, "off, cached, full"),
        ({}, "max-autotune", "'autotune': 'full'"),
    ],
)
def test_bad_options_name_the_remedy(options: dict[str, Any], mode: str | None, message: str) -> None:
    if mode is None:
        fast = torch.compile(torch.sin, backend="tilewright", options=options)
    else:
        fast = torch.compile(torch.sin, backend="tilewright", mode=mode)
    with pytest.raises(BackendCompilerFailed, match=message) as error:
        fast(torch.ones(3))
    assert isinstance(error.value.inner_exception, tw.OptionError)


def test_without_gradients_nothing_has_to_be_switched_off() -> None:
    model, x = nn.Linear(4, 4).requires_grad_(False), torch.randn(3, 4)
    torch.testing.assert_close(_compiled(model)(x), model(x))


# One compilation for all sizes


def test_a_changed_size_compiles_nothing() -> None:
    model = tiny("bert", layers=1)
    fast = _compiled(model, kernels="cpp")
    graphs = []
    with torch.no_grad():
        for batch, length in ((2, 7), (3, 5), (2, 60), (5, 33), (2, 6)):
            ids = torch.randint(1, 128, (batch, length))
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            expected = model(ids, attention_mask=mask).last_hidden_state
            found = fast(ids, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            graphs.append((counters["stats"]["unique_graphs"], len(tw.reports())))
    assert len(set(graphs)) == 1


def test_a_decoder_with_a_cache() -> None:
    model = tiny("llama", layers=1)
    fast = _compiled(model)
    ids = torch.randint(1, 128, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected, found = (m(ids, attention_mask=mask, use_cache=True) for m in (model, fast))
        torch.testing.assert_close(
            found.logits[mask.bool()], expected.logits[mask.bool()], rtol=1e-4, atol=1e-5
        )
        longer = torch.cat([mask, mask[:, -1:]], 1)
        steps = [
            m(ids[:, :1], attention_mask=longer, **with_cache(model.forward, cache_of(o))).logits
            for m, o in ((model, expected), (fast, found))
        ]
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-5)


# What users see


def test_fallbacks_are_reported() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.sort(x.exp(), dim=1).values + 1

    fast = _compiled(function)
    before = tw.reports()
    fast(torch.randn(3, 5))
    (report,) = (r for r in tw.reports() if r not in before)
    (fallback,) = report.fallbacks
    assert "sort" in fallback.target
    assert "test_torch_compile.py" in fallback.source
    assert report.phase("forward").kernels == 2
    assert report.backend == "reference"


def test_graphs_that_pytorch_runs_are_reported() -> None:
    fast = _compiled(_complex)
    with pytest.warns(UserWarning, match=r"PyTorch runs this graph: .*complex64"):
        fast(torch.randn(3, 4))
    assert tw.reports()[-1].backend == "PyTorch"
    assert "complex64" in tw.reports()[-1].notes[0]


def test_reports_go_with_their_graphs() -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1

    before = len(tw.reports())
    fast = _compiled(function)
    fast(torch.randn(3))
    assert len(tw.reports()) == before + 1
    torch._dynamo.reset()
    del fast
    assert len(tw.reports()) <= before


def test_dump(tmp_path: Any) -> None:
    _compiled(lambda x: x.exp() + 1, dump=tmp_path)(torch.randn(3))
    (folder,) = tmp_path.iterdir()
    assert "exp" in (folder / "00_lowered.ir").read_text()
    assert (folder / "report.txt").exists()


def test_a_failed_build_leaves_eager_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("TILEWRIGHT_CXX", "/nowhere/g++")
    model, x = nn.Linear(4, 4).requires_grad_(False), torch.randn(3, 4)
    fast = torch.compile(model, backend="tilewright", options={"kernels": "cpp"})
    with pytest.raises(BackendCompilerFailed) as error:
        fast(x)
    assert isinstance(error.value.inner_exception, tw.CompilerNotFoundError)
    expected = model(x)
    monkeypatch.delenv("TILEWRIGHT_CXX")
    torch.testing.assert_close(fast(x), expected)


def test_generated_kernels() -> None:
    """The C++ backend, tuned: growing sizes, a view of an input, and a buffer."""
    model = _Counts().eval()
    twin = copy.deepcopy(model)
    fast = _compiled(twin, kernels="cpp", autotune="full")
    for rows in (3, 5, 100):
        assert_same_call(model, fast, torch.randn(rows, 4), rtol=1e-5, atol=1e-5)
    assert tw.reports()[-1].backend == "cpp"


def test_the_backend_needs_no_import() -> None:
    """Torch finds it by its entry point."""
    code = (
        "import torch; f = torch.compile(lambda x: x + 1, backend='tilewright', options={'kernels': 'reference'}); "
        "print(f(torch.ones(2)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "tensor([2., 2.])", result.stderr
