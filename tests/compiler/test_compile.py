"""compile(): options, what it leaves in the dump folder, what the report counts, and that depth costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tilewright as tw
from tilewright.costs import eager_peak, step_cost
from tilewright.dump import Dump
from tilewright.ir.module import Op, make_attrs
from tilewright.ir.parser import parse_module
from tilewright.ir.program import Step
from tilewright.ir.types import Value, tensor_type
from tilewright.reference_executor import ReferenceExecutor
from tilewright.report import Report, size_text

from .models import tiny

REFERENCE: dict[str, Any] = {"backend": "reference", "max_length": 64}


@pytest.fixture(scope="module")
def fast() -> Any:
    return tw.compile(tiny("llama"), batch_sizes=(4, 1), **REFERENCE)


# Options

BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no batch": ({"batch_sizes": ()}, tw.OptionError, r"batch_sizes=\(1, 4\)"),
    "zero batch": ({"batch_sizes": (0, 1)}, tw.OptionError, "positive integers"),
    "float batch": ({"batch_sizes": (1.5,)}, tw.OptionError, "positive integers"),
    "text batch": ({"batch_sizes": "14"}, tw.OptionError, "positive integers"),
    "zero length": ({"max_length": 0}, tw.OptionError, "positive integer"),
    "length": ({"max_length": 300}, tw.OptionError, "more than the 256 positions.*max_length=256"),
    "weights": ({"weights": "int3"}, tw.OptionError, "leave weights out"),
    "autotune": ({"autotune": "max"}, tw.OptionError, "off, cached, full"),
    "backend": ({"backend": "cuda"}, tw.OptionError, "triton, cpp, reference"),
    "dump": ({"dump": "/dev/null/folder"}, tw.OptionError, "cannot be made a folder"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_name_the_remedy(case: str) -> None:
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match=message):
        tw.compile(tiny("llama"), **options)


def test_bad_models() -> None:
    with pytest.raises(tw.OptionError, match=r"nn\.Module"):
        tw.compile("llama")  # type: ignore[arg-type]
    with pytest.raises(tw.CaptureError, match="example_inputs"):
        tw.compile(nn.Linear(2, 2).eval(), backend="reference")
    with pytest.raises(tw.CaptureError, match="eval"):
        tw.compile(tiny("llama").train(), backend="reference")


def test_max_length_defaults_to_what_the_model_has() -> None:
    fast = tw.compile(tiny("llama", layers=1), backend="reference")
    with pytest.raises(tw.InputError, match="max_length=256"):
        fast(torch.ones(1, 257, dtype=torch.long))


# Plain modules and encoders


class _Pair(nn.Module):
    """Nested inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, pair: tuple[Tensor, Tensor], scale: dict[str, Tensor]) -> dict[str, Any]:
        total = self.linear(pair[0] + pair[1]) * scale["by"]
        return {"total": total, "parts": [pair[0].relu(), total.sum(-1)]}


def test_a_plain_module_keeps_its_calling_convention() -> None:
    model = _Pair().eval()
    example = ((torch.randn(3, 8), torch.randn(3, 8)), {"by": torch.randn(3, 1)})
    fast = tw.compile(model, example_inputs=example, batch_sizes=(5,), backend="reference")
    for rows in (1, 5):
        pair, scale = (torch.randn(rows, 8), torch.randn(rows, 8)), {"by": torch.randn(rows, 1)}
        torch.testing.assert_close(fast(pair, scale=scale), model(pair, scale))
    with pytest.raises(tw.InputError, match="dtype"):
        fast((pair[0].double(), pair[1]), scale)
    with pytest.raises(tw.InputError, match="shape"):
        fast((pair[0][:, :7], pair[1]), scale)
    with pytest.raises(tw.InputError, match="shape"):
        fast((pair[0][:2], pair[1]), scale)
    with pytest.raises(tw.InputError, match="arguments do not fit"):
        fast(pair)
    with pytest.raises(tw.InputError, match="tensor"):
        fast((1.0, pair[1]), scale)


def test_an_encoder_takes_many_short_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as make the tokens that memory is planned for, and longer ones in more goes; nobody names a batch."""
    model = tiny("bert", layers=1)
    fast = tw.compile(model, backend="reference", max_length=32)
    batches: list[int] = []
    run = ReferenceExecutor.run

    def counted(self: Any, inputs: Any, dims: dict[str, int], *rest: Any) -> None:
        batches.append(dims["B"])
        run(self, inputs, dims, *rest)

    monkeypatch.setattr(ReferenceExecutor, "run", counted)
    for rows, length, goes in ((100, 5, [100]), (70, 32, [64, 6]), (130, 17, [64, 64, 2])):
        ids = torch.randint(1, 128, (rows, length))
        mask = torch.ones_like(ids)
        mask[rows // 2, length // 2 :] = 0
        with torch.no_grad():
            expected = model(ids, attention_mask=mask)
        batches.clear()
        result = fast(ids, attention_mask=mask)
        assert batches == goes
        torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_an_encoder_runs_large_batches_in_several_goes() -> None:
    model = tiny("bert", layers=1)
    fast = tw.compile(model, batch_sizes=(2,), **REFERENCE)
    ids = torch.randint(1, 128, (300, 6))
    mask = torch.ones_like(ids)
    mask[3, 4:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
    result = fast(ids, attention_mask=mask)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


# IR, dump, report


def test_ir_of_every_stage(fast: Any) -> None:
    assert fast.ir() == fast.ir("decode") == fast.ir("decode_b1") != fast.ir("decode_b4")
    lowered = parse_module(fast.ir("lowered"))
    assert {f.name for f in lowered.functions} == {"main", "layer0"}
    assert "kernel" not in fast.ir("prefill.canonicalize2")
    assert "kernel" in fast.ir("prefill.fuse")
    assert "arena" in fast.ir("prefill.plan")
    with pytest.raises(tw.OptionError, match=r"no stage 'decoed'; there are lowered, decode_b1\.last_tokens"):
        fast.ir("decoed")


def test_dump(tmp_path: Path) -> None:
    fast = tw.compile(tiny("llama", layers=1), dump=tmp_path / "new" / "folder", **REFERENCE)
    folder = tmp_path / "new" / "folder"
    names = sorted(p.name for p in (folder / "decode_b1").glob("*.ir"))
    assert names[0] == "01_last_tokens.ir"
    assert names[-1].endswith("_fuse.ir")
    assert len(names) == int(names[-1][:2])
    assert (folder / "decode_b1" / names[-1]).read_text() == fast.ir("decode")
    assert (folder / "00_lowered.ir").read_text() == fast.ir("lowered")
    assert (folder / "prefill" / "plan.txt").read_text() == fast.ir("prefill.plan")
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(fast.report().to_dict()))


def test_dumped_sources_and_a_folder_that_vanishes(tmp_path: Path) -> None:
    dump = Dump(tmp_path)
    dump.sources({"decode_b1.cpp": "// kernels"})
    assert (tmp_path / "kernels" / "decode_b1.cpp").read_text() == "// kernels"
    (tmp_path / "report.txt").mkdir()
    with pytest.raises(tw.OptionError, match=r"report\.txt.*another folder"):
        dump.report(Report())
    Dump(None).sources({"decode_b1.cpp": "// kernels"})


def test_report(fast: Any) -> None:
    report = fast.report()
    assert [p.name for p in report.phases] == ["decode_b1", "decode_b4", "prefill"]
    decode = report.phase("decode")
    assert report.kernels_per_layer == decode.kernels_per_layer <= 6
    assert decode.launches >= 2 * decode.kernels_per_layer
    assert report.arena_bytes == decode.arena_bytes > 0
    config_bytes = 2 * 2 * 2 * 16 * 4 * 64  # layers, k and v, KV heads, head size, float32, max_length
    assert report.memory.kv_per_sequence == config_bytes
    # Every weight of the model is held once: as it is, or in a joint buffer.
    held = sum(p.nbytes for p in fast.parameters())
    buffers = sum(b.nbytes for b in fast.buffers())
    assert held <= report.memory.shared + report.memory.merged <= held + buffers
    assert report.memory.prepared == 0
    # A decode step has to read each weight once, less the rows of the embedding that it does not look up.
    assert held * 0.95 < decode.bytes < held * 1.5
    matrices = sum(p.numel() for p in fast.parameters() if p.ndim == 2)
    attention = 2 * 2 * 4 * 64 * (16 + 16)  # layers, multiply and add, heads, context, head sizes of k and v
    assert 2 * matrices + attention < decode.flops < 1.1 * (2 * matrices + attention)
    assert report.fallbacks == ()
    text = str(report)
    assert "decode_b4" in text
    assert size_text(decode.arena_bytes) in text
    assert {stage for stage, _ in report.seconds} == {"capture", "lower", "passes", "plan", "kernels"}


def test_fallbacks_are_reported() -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sort(x.exp(), dim=1).values + 1

    model = Sorts().eval()
    x = torch.randn(3, 5)
    fast = tw.compile(model, example_inputs=(x,), backend="reference")
    torch.testing.assert_close(fast(x[:1]), model(x[:1]))
    (fallback,) = fast.report().fallbacks
    assert "sort" in fallback.target
    assert "test_compile.py" in fallback.source
    assert fallback.calls == 1
    assert "Ops that PyTorch runs" in str(fast.report())


def test_depth_costs_nothing() -> None:
    """IR ops, kernels and exports of 4 and 32 layers are the same but for one call per layer."""
    reports, texts = {}, {}
    for depth in (4, 32):
        fast = tw.compile(tiny("llama", layers=depth), **REFERENCE)
        reports[depth], texts[depth] = fast.report(), fast.ir("decode")
    for few, many in zip(reports[4].phases, reports[32].phases, strict=True):
        assert (few.kernels, few.kernels_per_layer) == (many.kernels, many.kernels_per_layer)
        assert few.arena_bytes == many.arena_bytes
        assert many.launches - few.launches == 28 * few.kernels_per_layer
    assert len(texts[32].splitlines()) - len(texts[4].splitlines()) == 28


# Costs


def _step(text: str) -> Step:
    module = parse_module(text)
    (op,) = [o for o in module.main.ops if o.opcode != "param"]
    return Step(op, tuple(range(len(op.operands))), tuple(range(len(op.results))))


def test_costs_of_single_ops() -> None:
    x, w = Value("x", tensor_type("f32", ["S", 8])), Value("w", tensor_type("f32", [16, 8]))
    y = Value("y", tensor_type("f32", ["S", 16]))
    product = step_cost(Step(Op("matmul", (x, w), (), (y,)), (0, 1), (2,)), {"S": 3})
    assert (product.bytes, product.flops) == (4 * (3 * 8 + 16 * 8 + 3 * 16), 2 * 3 * 8 * 16)
    index = Value("i", tensor_type("i64", ["S"]))
    rows = Value("r", tensor_type("f32", ["S", 8]))
    looked_up = step_cost(
        Step(Op("gather", (w, index), make_attrs({"axis": 0}), (rows,)), (0, 1), (2,)), {"S": 3}
    )
    assert (looked_up.bytes, looked_up.flops) == (2 * 4 * 3 * 8 + 8 * 3, 0)


def test_eager_peak_counts_live_values() -> None:
    """y, z and u are alive together at the third op; the input is not counted, and the view is free."""
    text = """
symbol S [1, 64]

func @main(%x: f32[S, 4]) -> (%w) {
  %y = exp %x : f32[S, 4]
  %v = view %y {map = (i0, i1) -> (i0, i1)} : f32[S, 4]
  %z = neg %v : f32[S, 4]
  %u = add %y, %z : f32[S, 4]
  %w = exp %u : f32[S, 4]
}
"""
    assert eager_peak(parse_module(text), {"S": 10}) == 3 * 10 * 4 * 4
