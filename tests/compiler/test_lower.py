"""Lowering: every rule against eager PyTorch, whole models through the reference evaluator, and typed errors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tilewright.aten_rules import RULES
from tilewright.cache import with_cache
from tilewright.capture import capture
from tilewright.ir.errors import LoweringError
from tilewright.ir.module import Module
from tilewright.ir.parser import parse_module
from tilewright.ir.reference import evaluate
from tilewright.lower import lower

from .aten_cases import CASES, Case, case, f, i
from .models import DECODERS, tiny

# --- every rule ---------------------------------------------------------------------------------------------------


_HERE = "a tensor goes here"


class _Call(nn.Module):
    """One ATen call whose tensors are the module's inputs. A call without tensors adds its result to the input."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        leaves, self.spec = pytree.tree_flatten(case.args(3))
        self.leaves = [_HERE if isinstance(x, Tensor) else x for x in leaves]

    def forward(self, tensors: list[Tensor]) -> Any:
        given = iter(tensors)
        args = pytree.tree_unflatten([next(given) if x is _HERE else x for x in self.leaves], self.spec)
        out = self.case.op(*args, **dict(self.case.kwargs))
        return out if _HERE in self.leaves else out + tensors[0]


def _inputs(case: Case, n: int, dtype: torch.dtype) -> list[Tensor]:
    tensors = [x for x in pytree.tree_leaves(case.args(n)) if isinstance(x, Tensor)] or [f(1)]
    return [x.to(dtype) if x.dtype == torch.float32 else x.clone() for x in tensors]


def _ids() -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for each in CASES:
        seen[each.target] += 1
        names.append(f"{each.target}-{seen[each.target]}")
    return names


@pytest.mark.parametrize("case", CASES, ids=_ids())
def test_rule_in_float32(case: Case) -> None:
    _check(case, torch.float32, rtol=1e-5, atol=1e-6)


_FLOATS = [
    n for n, each in enumerate(CASES) if any(x.is_floating_point() for x in _inputs(each, 3, torch.float32))
]


@pytest.mark.parametrize("case", [CASES[n] for n in _FLOATS], ids=[_ids()[n] for n in _FLOATS])
def test_rule_in_bfloat16(case: Case) -> None:
    _check(case, torch.bfloat16, rtol=2**-7, atol=2**-8)


def _check(case: Case, dtype: torch.dtype, **tolerance: float) -> None:
    """The rule's IR gives what eager gives, at the batch of the export and at another one."""
    module = _Call(case).eval()
    inputs = _inputs(case, 3, dtype)
    captured = capture(module, (inputs,))
    assert case.name in [str(n.target) for n in captured.main.exported.graph.nodes]
    ir = lower(captured)
    assert not [op for op in ir.main.ops if op.opcode == "call_torch"]
    assert parse_module(str(ir)) == ir
    for given in (inputs, _inputs(case, 5, dtype)) if captured.symbols else (inputs,):
        dims = {"B": given[0].shape[0]} if captured.symbols else {}
        got = evaluate(ir, given, captured.tensors, dims)
        expected = pytree.tree_leaves(module(given))
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, **tolerance, equal_nan=True)


_EMPTY = ("empty.memory_format", "empty_like.default", "new_empty.default")


@pytest.mark.parametrize("target", _EMPTY)
def test_uninitialised_tensors_are_zeros(target: str) -> None:
    first = {"empty.memory_format": [2, 3], "empty_like.default": f(2, 3), "new_empty.default": f(2, 3)}[
        target
    ]
    args = (first, [2, 3]) if target.startswith("new") else (first,)
    module = _Call(case(target, lambda n: args)).eval()
    captured = capture(module, ([f(2, 3)],))
    (got,) = evaluate(lower(captured), [torch.ones(2, 3)], captured.tensors, {"B": 2})
    assert torch.equal(got, torch.zeros(2, 3) if isinstance(first, Tensor) else torch.ones(2, 3))


def test_every_rule_has_a_case() -> None:
    assert {each.target for each in CASES} | set(_EMPTY) == set(RULES)


# --- whole models -------------------------------------------------------------------------------------------------


def _decode_both(model: PreTrainedModel, mask: Tensor, steps: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Logits of Hugging Face and of the lowered module over a prefill and decode steps, at the valid positions."""
    captured = capture(model)
    ir = lower(captured)
    ids = i(*mask.shape, low=1, high=128)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, state, past = DynamicCache(config=model.config), {}, 0
    pairs = []
    for step in steps:
        seen = slice(past, past + step)
        given = {
            "input_ids": ids[:, seen],
            "position_ids": positions[:, seen],
            "attention_mask": mask[:, : past + step],
        }
        with torch.no_grad():
            theirs = model(**given, **with_cache(model.forward, cache)).logits
        dims = {"B": len(mask), "S": step, "T": past + step}
        given["attention_mask"] = given["attention_mask"].bool()
        (ours,) = evaluate(ir, given, captured.tensors, dims, state)
        pairs.append((ours[mask[:, seen] == 1], theirs[mask[:, seen] == 1]))
        past += step
    return pairs


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_prefill_and_decode_with_left_padding(family: str) -> None:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = 0
    mask[2, :4] = 0
    for ours, theirs in _decode_both(tiny(family), mask, (5, 1, 1, 2)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_in_bfloat16_are_as_close_to_float64_as_eager(family: str) -> None:
    model = tiny(family).bfloat16()
    exact = tiny(family).bfloat16().double()
    mask = torch.ones(2, 8, dtype=torch.long)
    truth = [theirs for _, theirs in _decode_both(exact, mask, (7, 1))]
    for (ours, theirs), true in zip(_decode_both(model, mask, (7, 1)), truth, strict=True):
        ours_off, theirs_off = (ours.double() - true).abs().mean(), (theirs.double() - true).abs().mean()
        assert ours_off <= 1.5 * theirs_off + 1e-3


def test_encoder() -> None:
    model = tiny("bert")
    captured = capture(model)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    ids, kinds = i(3, 7, low=1, high=128), i(3, 7, low=0, high=2)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask, token_type_ids=kinds)
    given = {"input_ids": ids, "attention_mask": mask.bool(), "token_type_ids": kinds}
    hidden, pooled = evaluate(lower(captured), given, captured.tensors, {"B": 3, "S": 7})
    torch.testing.assert_close(hidden[mask == 1], theirs.last_hidden_state[mask == 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, theirs.pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_ir_does_not_grow_with_depth(family: str) -> None:
    shallow, deep = (lower(capture(tiny(family, layers=n))) for n in (4, 12))
    assert [f.name for f in shallow.functions] == [f.name for f in deep.functions] == ["main", "layer0"]
    assert shallow.function("layer0").ops == deep.function("layer0").ops
    without_calls = [[op.opcode for op in m.main.ops if op.opcode != "call"] for m in (shallow, deep)]
    assert without_calls[0] == without_calls[1]
    assert not [
        op
        for module in (shallow, deep)
        for fn in module.functions
        for op in fn.ops
        if op.opcode == "call_torch"
    ]


def test_provenance_and_slots() -> None:
    layer = lower(capture(tiny("llama"))).function("layer0")
    assert [p.name for p in layer.params][:2] == ["hidden_states", "attention_mask"]
    matmuls = [op for op in layer.ops if op.opcode == "matmul"]
    assert [op.loc.module for op in matmuls[:3]] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    ]
    assert all(op.loc.source.startswith("modeling_llama.py:") for op in matmuls)
    (attention,) = (op for op in layer.ops if op.opcode == "attention")
    assert attention.attr("slot") == "self_attn"


def test_an_encoder_keeps_no_state() -> None:
    layer = lower(capture(tiny("bert"))).function("layer0")
    assert [op.attr("slot") for op in layer.ops if op.opcode == "attention"] == [""]


# --- what has no rule, and what cannot be compiled -----------------------------------------------------------------


def _run(module: nn.Module, *inputs: Tensor) -> tuple[Module, tuple[Tensor, ...]]:
    captured = capture(module.eval(), inputs)
    ir = lower(captured)
    dims = {"B": len(inputs[0])} if captured.symbols else {}
    return ir, evaluate(ir, list(inputs), captured.tensors, dims)


class _Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, order = x.sort(-1)
        return values.cumprod(1, dtype=torch.float64) * order.repeat(
            1, x.shape[0] - x.shape[0] + 1
        ) + x.new_zeros(x.shape[0], 1)


def test_ops_without_a_rule_are_left_to_torch() -> None:
    x = f(3, 4)
    ir, (got,) = _run(_Sorted(), x)
    torches = [op.attr("target") for op in ir.main.ops if op.opcode == "call_torch"]
    assert torches == ["aten.sort.default", "aten.cumprod.default"]
    torch.testing.assert_close(got, _Sorted()(x))


class _LargestIntegers(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(x, 2)


def test_the_largest_of_integers_are_left_to_torch() -> None:
    x = torch.arange(24).reshape(3, 8) * 5 % 7
    ir, got = _run(_LargestIntegers(), x)
    assert [op.attr("target") for op in ir.main.ops if op.opcode == "call_torch"] == ["aten.topk.default"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, x.topk(2), strict=True))


class _RunningSums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) + x.cumsum(0)


@pytest.mark.parametrize(
    ("columns", "is_bounded", "torches"), [(1024, True, 1), (1025, True, 2), (4, False, 1)]
)
def test_running_sums_of_long_rows_are_left_to_torch(columns: int, is_bounded: bool, torches: int) -> None:
    """Ours take the square of the row's length: of a batch that may be large, and of one without a known end."""
    x = f(3, columns)
    captured = capture(_RunningSums().eval(), (x,))
    ir = lower(captured, is_bounded)
    assert sum(op.opcode == "call_torch" for op in ir.main.ops) == torches
    (got,) = evaluate(ir, [x], captured.tensors, {"B": 3})
    torch.testing.assert_close(got, _RunningSums()(x), rtol=1e-4, atol=1e-4)


class _SizedFallback(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linspace(0, 1, x.shape[0]).unsqueeze(1) + x


def test_fallbacks_take_symbolic_sizes() -> None:
    x = f(4, 2)
    ir, (got,) = _run(_SizedFallback(), x)
    assert [op.attr("target") for op in ir.main.ops if op.opcode == "call_torch"] == ["aten.linspace.default"]
    torch.testing.assert_close(got, _SizedFallback()(x))


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] += 1
        return y.relu_()


def test_writes_to_local_tensors_are_made_functional() -> None:
    x = f(3, 4)
    _, (got,) = _run(_InPlace(), x)
    torch.testing.assert_close(got, _InPlace()(x))


class _Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def test_writes_to_buffers_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"writes to .*count"):
        lower(capture(_Counter().eval(), (f(3, 4),)))


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": x * self.scale, "none": None, "rows": (x.sum(1) + torch.tensor(0.5), 7)}


def test_plain_attributes_literals_and_constants_in_the_output() -> None:
    x = f(3, 4)
    module = _Nested().eval()
    captured = capture(module, (x,))
    assert captured.output_constants == {1: None, 3: 7}
    got = evaluate(lower(captured), [x], captured.tensors, {"B": 3})
    torch.testing.assert_close(list(got), [module(x)["a"], module(x)["rows"][0]])


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 1},
        {"stride": 1, "padding": "same"},
        {"stride": 2, "padding": 1},
        {"stride": 2, "dilation": 2},
        {"stride": 2, "groups": 2},
    ],
    ids=str,
)
def test_convolutions_whose_patches_overlap_or_are_not_dense_are_left_to_torch(
    options: dict[str, Any],
) -> None:
    module = nn.Conv2d(4, 6, 2, **options).eval()
    captured = capture(module, (f(3, 4, 8, 8),))
    ir = lower(captured)
    (target,) = [op.attr("target") for op in ir.main.ops if op.opcode == "call_torch"]
    assert target.startswith("aten.conv2d.")
    (got,) = evaluate(ir, [f(5, 4, 8, 8)], captured.tensors, {"B": 5})
    torch.testing.assert_close(got, module(f(5, 4, 8, 8)))
