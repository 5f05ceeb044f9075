"""The closed set of ops: attributes, and the result types that follow from operands and attributes.

| op | operands -> result | attributes |
|---|---|---|
| param | -> weight or buffer; relative to the call's scope inside a called function | name |
| const | -> rank-0 constant | value |
| iota | -> i64[n], counting from 0 | (the result type gives n) |
| dim | -> i64[], the size of a dim expression at run time | expr |
| pointwise (``pointwise.POINTWISE``) | numpy broadcasting; operands of one dtype | |
| reduce | x -> x without (or with size-1) ``axes`` | kind, axes, keepdim |
| view | x -> result[i] = x[map(i)] | map (the result type gives the shape) |
| concat | xs -> joined along ``axis`` | axis |
| gather | table, index -> table with ``axis`` replaced by the index's shape | axis |
| matmul | a[.., M, K], b[N, K] or b[.., N, K] -> [.., M, N]; float32 accumulation | (activation_group, wide) |
| quantize | x[N, K] -> codes, scale (and, for 4 bits, minimum: of weights only, at load) | bits, group |
| dequantize | codes, scale (, minimum) -> float[N, K] | bits, group |
| attention | q[B,H,S,D], k, v[B,G,S,D], extras -> [B,H,S,Dv] | scale, causal, ..., slot; see ``attention.py`` |
| append | x[B,G,S,D] -> the slot's whole cache [B,G,T,D], ending in x | slot |
| attention_split | q, k, v [B,G,T,D], extras -> acc f32[B,H,S,P,Dv], max, sum f32[B,H,S,P] | as attention; splits |
| call | values -> the callee's returns | callee, scope |
| call_torch | tensors -> tensors; run by PyTorch at run time | target, template |
| experts | x[.., K], ids[.., k], scores[.., k], weights and biases of experts -> [.., K] | see ``experts.py`` |
| causal_conv1d | x[B,S,C], weight[K,C] (, bias[C]) -> [B,S,C], state[B,K-1,C] | slot; see ``recurrent.py`` |
| selective_scan | x, dt[B,S,C], decay[N,C], input, output[B,S,N] -> [B,S,C], state[B,N,C] | slot; see there |
| linear_attention | q, k[B,S,G,N], v[B,S,H,D], decay (, beta) -> [B,S,H,D], state[B,H,N,D] | slot; see there |
| experts_order | ids[..] -> order i32[P], block_expert i32[N] | experts, block; see ``experts_grouped.py`` |
| grouped_matmul | x[R, K], order, block_expert, w[E, M, K] (, bias) -> [R * divisor, M] | see there |
| kernel | outer values used -> body values used outside | name |

``matmul`` may carry ``activation_group``: runs of that many values of a's rows, or equal parts of such runs, may then
be rounded to int8, each with a scale of its own, so that a kernel can multiply integers. Codes and scales are those of
``quantization``. With ``wide`` its result is the float32 of the accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import sympy

from .attention import (
    ATTENTION_ATTRS,
    ATTENTION_OPTIONAL,
    infer_append,
    infer_attention,
    infer_attention_split,
)
from .checks import arity, need
from .errors import VerifyError
from .experts import EXPERTS_ATTRS, infer_experts
from .experts_grouped import GROUPED_ATTRS, ORDER_ATTRS, infer_experts_order, infer_grouped_matmul
from .module import Module, Op
from .pointwise import POINTWISE
from .quantization import CODES
from .recurrent import infer_causal_conv1d, infer_linear_attention, infer_selective_scan
from .types import DType, TensorType

Inferred = tuple[TensorType, ...] | None
T = TypeVar("T")


@dataclass(frozen=True)
class OpSpec:
    """Attributes (name -> kind), those that must be there, and type inference of one op.

    Kinds: int, float, bool, str, ints, names, number, expr, map. ``infer`` gives the result types, or None where the
    declared type is itself the information (param, cast, view, ...). It raises VerifyError on misuse.
    """

    attrs: Mapping[str, str]
    infer: Callable[[Op, Module | None], Inferred]
    optional: frozenset[str] = frozenset()


def broadcast(shapes: Iterable[tuple[sympy.Expr, ...]]) -> tuple[sympy.Expr, ...]:
    """The numpy broadcast of shapes. Raises VerifyError when two dims differ and neither is 1."""
    shapes = list(shapes)
    rank = max((len(s) for s in shapes), default=0)
    out: list[sympy.Expr] = [sympy.Integer(1)] * rank
    for shape in shapes:
        for n, dim in enumerate(shape, start=rank - len(shape)):
            if out[n] == 1:
                out[n] = dim
            elif dim != 1 and sympy.expand(dim - out[n]) != 0:
                raise VerifyError(f"shapes do not broadcast: {' and '.join(map(str, shapes))}")
    return tuple(out)


def _declared(*dtypes: DType, rank: int | None = None) -> Callable[[Op, Module | None], Inferred]:
    def infer(op: Op, module: Module | None) -> Inferred:
        arity(op, 0)
        need(not dtypes or op.result.dtype in dtypes, op, f"cannot have dtype {op.result.dtype.value}")
        need(rank is None or op.result.type.rank == rank, op, f"result must have rank {rank}")
        return None

    return infer


def _pointwise(op: Op, module: Module | None) -> Inferred:
    row = POINTWISE[op.opcode]
    arity(op, row.arity)
    shape = broadcast(v.shape for v in op.operands)
    typed = op.operands[1:] if row.rule == "select" else op.operands
    dtype = typed[0].dtype
    need(all(v.dtype == dtype for v in typed), op, "operands must have one dtype")
    need(row.rule != "select" or op.operands[0].dtype is DType.bool, op, "condition must be bool")
    need(op.opcode == "cast" or dtype is not DType.f8, op, "f8 is for storage: cast it to compute with it")
    fits = {"float": dtype.is_float, "int": not dtype.is_float, "bool": dtype is DType.bool, "any": True}
    need(fits[row.domain], op, f"does not take {dtype.value}")
    if row.rule == "any":
        return (TensorType(op.result.dtype, shape),)
    return (TensorType(DType.bool if row.rule == "bool" else dtype, shape),)


REDUCTIONS = ("sum", "max", "min", "prod", "any", "all")


def _reduce(op: Op, module: Module | None) -> Inferred:
    arity(op, 1)
    (x,) = op.operands
    axes = op.attr("axes")
    need(op.attr("kind") in REDUCTIONS, op, f"unknown kind {op.attr('kind')!r}")
    need(op.attr("kind") not in ("any", "all") or x.dtype is DType.bool, op, "any and all take bool")
    need(x.dtype is not DType.f8, op, "f8 is for storage: cast it to compute with it")
    need(axes == tuple(sorted(set(axes))) and all(0 <= a < x.type.rank for a in axes), op, f"bad axes {axes}")
    if op.attr("keepdim"):
        shape = tuple(sympy.Integer(1) if n in axes else d for n, d in enumerate(x.shape))
    else:
        shape = tuple(d for n, d in enumerate(x.shape) if n not in axes)
    return (TensorType(x.dtype, shape),)


def _view(op: Op, module: Module | None) -> Inferred:
    arity(op, 1)
    index_map = op.attr("map")
    need(len(index_map.exprs) == op.operands[0].type.rank, op, "map does not give one index per operand dim")
    need(index_map.rank == op.result.type.rank, op, "map does not take one index per result dim")
    return (TensorType(op.operands[0].dtype, op.result.shape),)


def _concat(op: Op, module: Module | None) -> Inferred:
    need(op.operands, op, "takes at least one operand")
    axis, first = op.attr("axis"), op.operands[0]
    need(0 <= axis < first.type.rank, op, f"bad axis {axis}")
    for v in op.operands:
        same = v.type.rank == first.type.rank and v.dtype == first.dtype
        same = same and all(
            a == b for n, (a, b) in enumerate(zip(v.shape, first.shape, strict=True)) if n != axis
        )
        need(same, op, f"operands differ outside axis {axis}: {v.type} and {first.type}")
    shape = list(first.shape)
    shape[axis] = sympy.expand(sum(v.shape[axis] for v in op.operands))
    return (TensorType(first.dtype, tuple(shape)),)


def _gather(op: Op, module: Module | None) -> Inferred:
    arity(op, 2)
    table, index = op.operands
    axis = op.attr("axis")
    need(0 <= axis < table.type.rank, op, f"bad axis {axis}")
    need(index.dtype.is_int, op, "index must be integer")
    return (TensorType(table.dtype, table.shape[:axis] + index.shape + table.shape[axis + 1 :]),)


def _matmul(op: Op, module: Module | None) -> Inferred:
    arity(op, 2)
    a, b = op.operands
    need(a.type.rank >= 1 and b.type.rank >= 2, op, "a needs rank 1 or more, b rank 2 or more")
    need(
        a.dtype.is_float and a.dtype == b.dtype and a.dtype is not DType.f8,
        op,
        f"needs one float dtype, got {a.dtype.value}, {b.dtype.value}",
    )
    need(a.shape[-1] == b.shape[-1], op, f"K differs: {a.type} and {b.type}")
    need(b.type.rank == 2 or a.shape[:-2] == b.shape[:-2], op, f"batch dims differ: {a.type} and {b.type}")
    group = op.attr("activation_group", 1)
    need(group >= 1 and a.shape[-1] % group == 0, op, f"K of {a.type} is no multiple of {group}")
    dtype = DType.f32 if op.attr("wide") and a.dtype is not DType.f64 else a.dtype
    return (TensorType(dtype, (*a.shape[:-1], b.shape[-2])),)


def _quantized(op: Op, rows: sympy.Expr, columns: sympy.Expr) -> tuple[TensorType, ...]:
    """The types that codes, scale and minimum of a matrix have."""
    bits, group = op.attr("bits"), op.attr("group")
    need(bits in CODES, op, f"has forms of {' and '.join(map(str, CODES))} bits, not {bits}")
    need(group >= 1 and group % CODES[bits].run == 0, op, f"bad group {group}")
    need(rows.is_Integer and columns.is_Integer and columns % group == 0, op, "K must be a multiple of group")
    return CODES[bits].types(rows, columns, group)


def _quantize(op: Op, module: Module | None) -> Inferred:
    arity(op, 1)
    (w,) = op.operands
    need(w.type.rank == 2 and w.dtype.is_float, op, "takes a float matrix")
    return _quantized(op, *w.shape)


def _dequantize(op: Op, module: Module | None) -> Inferred:
    result = op.result.type
    need(result.rank == 2 and result.dtype.is_float, op, "gives a float matrix")
    expected = _quantized(op, *result.shape)
    arity(op, len(expected))
    found = tuple(v.type for v in op.operands)
    need(found == expected, op, f"takes {', '.join(map(str, expected))}, not {', '.join(map(str, found))}")
    return None


def _call(op: Op, module: Module | None) -> Inferred:
    if module is None:
        return None
    names = {f.name for f in module.functions}
    need(op.attr("callee") in names, op, f"no function @{op.attr('callee')} in the module")
    callee = module.function(op.attr("callee"))
    need(
        [v.type for v in op.operands] == [p.type for p in callee.params],
        op,
        f"operands do not fit @{callee.name}",
    )
    return tuple(v.type for v in callee.returns)


def _alone(infer: Callable[[Op], tuple[TensorType, ...]]) -> Callable[[Op, Module | None], Inferred]:
    """Inference that needs to know nothing but the op."""
    return lambda op, module: infer(op)


def _any(op: Op, module: Module | None) -> Inferred:
    return None


OPS: dict[str, OpSpec] = {
    "param": OpSpec({"name": "str"}, _declared()),
    "const": OpSpec({"value": "number"}, _declared(rank=0)),
    "iota": OpSpec({}, _declared(DType.i64, rank=1)),
    "dim": OpSpec({"expr": "expr"}, _declared(DType.i64, rank=0)),
    **{name: OpSpec({}, _pointwise) for name in POINTWISE},
    "reduce": OpSpec({"kind": "str", "axes": "ints", "keepdim": "bool"}, _reduce),
    "view": OpSpec({"map": "map"}, _view),
    "concat": OpSpec({"axis": "int"}, _concat),
    "gather": OpSpec({"axis": "int"}, _gather),
    "matmul": OpSpec(
        {"activation_group": "int", "wide": "int"}, _matmul, frozenset({"activation_group", "wide"})
    ),
    "quantize": OpSpec({"bits": "int", "group": "int"}, _quantize),
    "dequantize": OpSpec({"bits": "int", "group": "int"}, _dequantize),
    "attention": OpSpec({**ATTENTION_ATTRS, "slot": "str"}, _alone(infer_attention), ATTENTION_OPTIONAL),
    "append": OpSpec({"slot": "str"}, _alone(infer_append)),
    "attention_split": OpSpec(
        {**ATTENTION_ATTRS, "splits": "int"}, _alone(infer_attention_split), ATTENTION_OPTIONAL
    ),
    "experts": OpSpec(EXPERTS_ATTRS, _alone(infer_experts), frozenset(EXPERTS_ATTRS) - {"activation"}),
    "experts_order": OpSpec(ORDER_ATTRS, _alone(infer_experts_order)),
    "grouped_matmul": OpSpec(
        GROUPED_ATTRS, _alone(infer_grouped_matmul), frozenset({"divisor", "transposed"})
    ),
    "causal_conv1d": OpSpec({"slot": "str"}, _alone(infer_causal_conv1d)),
    "selective_scan": OpSpec({"slot": "str"}, _alone(infer_selective_scan)),
    "linear_attention": OpSpec({"slot": "str"}, _alone(infer_linear_attention)),
    "call": OpSpec({"callee": "str", "scope": "str"}, _call),
    "call_torch": OpSpec({"target": "str", "template": "str"}, _any),
    "kernel": OpSpec({"name": "str"}, _any),
}


def infer_types(op: Op, module: Module | None = None) -> Inferred:
    """Result types from operands and attributes, or None where they are declared.

    Raises VerifyError for an unknown op or a misuse. ``op.results`` must hold the declared types for ops whose
    type is information of its own (param, const, iota, dim, view, cast, call_torch, kernel).
    """
    spec = OPS.get(op.opcode)
    if spec is None:
        raise VerifyError(f"unknown op {op.opcode!r}; the ops are {', '.join(sorted(OPS))}")
    if missing := set(spec.attrs) - spec.optional - {name for name, _ in op.attrs}:
        raise VerifyError(f"{op.opcode}: missing attributes {sorted(missing)}")
    if unknown := {name for name, _ in op.attrs} - set(spec.attrs):
        raise VerifyError(f"{op.opcode}: unknown attributes {sorted(unknown)}")
    return spec.infer(op, module)
