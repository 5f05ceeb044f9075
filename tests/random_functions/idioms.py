"""Moves of a random function that take several ops: what models are made of, and an op that PyTorch runs."""

from __future__ import annotations

import math

import sympy
from sympy import Integer

from tilewright.ir.index import sym
from tilewright.ir.types import DType, TensorType, Value, concrete, tensor_type

from .draft import LIMIT, RandomFunction, Spec
from .pointwise import offset_from_zero
from .products import project


def row_scale(fn: RandomFunction) -> Value | None:
    """x times one number a row: what may be moved past a matmul."""
    x = fn.floats(lambda v: v.type.rank >= 2)
    if x is None:
        return None
    square = fn.add("mul", x, x, spec=Spec(0, fn.specs[x].size ** 2, False))
    total = fn.bounded(fn.reduced(square, "sum", (x.type.rank - 1,), keepdim=True))
    factor = fn.add("rsqrt", offset_from_zero(fn, total), spec=Spec(0, 1.5, False))
    scaled = fn.add("mul", x, factor, spec=Spec(-1.5 * fn.specs[x].size, 1.5 * fn.specs[x].size, False))
    return project(fn, scaled, fn.number(1, 4)) if fn.number(0, 1) else scaled


def softmax(fn: RandomFunction) -> Value | None:
    x = fn.floats(lambda v: v.type.rank >= 1)
    if x is None:
        return None
    axes = (x.type.rank - 1,)
    size = fn.specs[x].size
    top = fn.reduced(x, "max", axes, keepdim=True)
    e = fn.add("exp", fn.add("sub", x, top, spec=Spec(-2 * size, 0, False)), spec=Spec(0, 1, False))
    total = fn.reduced(e, "sum", axes, keepdim=True)
    return fn.add("div", e, total, spec=Spec(0, 1, False))


def norm(fn: RandomFunction) -> Value | None:
    """LayerNorm with a weight."""
    x = fn.floats(lambda v: v.type.rank >= 1 and v.shape[-1].is_Integer)
    if x is None:
        return None
    axes, size, n = (x.type.rank - 1,), fn.specs[x].size, int(x.shape[-1])
    inverse = fn.const(1 / n, x.dtype)
    mean = fn.reduced(x, "sum", axes, keepdim=True)
    mean = fn.add("mul", mean, inverse, spec=Spec(-size, size, False))
    centred = fn.add("sub", x, mean, spec=Spec(-2 * size, 2 * size, False))
    square = fn.add("mul", centred, centred, spec=Spec(0, 4 * size**2, False))
    variance = fn.reduced(square, "sum", axes, keepdim=True)
    variance = fn.add("mul", variance, inverse, spec=Spec(0, 4 * size**2, False))
    shifted = fn.add("add", variance, fn.const(0.125, x.dtype), spec=Spec(0.125, 4 * size**2 + 1, False))
    scale = fn.add("rsqrt", shifted, spec=Spec(0, 3, False))
    y = fn.add("mul", centred, scale, spec=Spec(-math.sqrt(n), math.sqrt(n), False))
    weight = fn.weight(TensorType(x.dtype, x.shape[-1:]))
    return fn.add("mul", y, weight, spec=fn.specs[y])


def spelled_attention(fn: RandomFunction) -> Value | None:
    """Two products and a softmax between, with a factor, biases and masks; heads as a dim or as more of a batch."""
    s, b = sym("S"), sym("B")
    x = fn.floats(lambda v: v.type.rank == 3 and v.shape[:2] == (b, s) and v.shape[2].is_Integer)
    if x is None:
        return None
    heads, d = Integer(fn.number(1, 2)), Integer(fn.pick((2, 4)))
    merged = bool(fn.number(0, 1))

    def heads_of() -> Value:
        flat = fn.reshape(fn.bounded(project(fn, x, int(heads * d)), 4), (b, s, heads, d))
        apart = fn.permute(flat, (0, 2, 1, 3))
        return fn.reshape(apart, (b * heads, s, d)) if merged else apart

    q, k, v = heads_of(), heads_of(), heads_of()
    spec = Spec(-64, 64, False)
    scores = fn.add("matmul", q, k, spec=spec)
    for _ in range(fn.number(0, 2)):
        other = fn.reshape(fn.bounded(fn.add("matmul", k, q, spec=spec), 4), scores.shape)
        match fn.number(0, 4):
            case 0:
                scores = fn.add("mul", scores, fn.const(fn.pick((0.5, 0.25)), scores.dtype), spec=spec)
            case 4:
                each = (Integer(1) if merged else heads, Integer(1), Integer(1))
                temperature = fn.weight(TensorType(scores.dtype, each))
                scores = fn.add("mul", scores, temperature, spec=Spec(-72, 72, False))
            case 1:
                scores = fn.add(fn.pick(("add", "sub")), scores, other, spec=Spec(-72, 72, False))
            case 2 if merged:
                scores, merged = fn.reshape(scores, (b, heads, s, s)), False
            case _:
                hidden = fn.add("gt", other, fn.const(1.0, other.dtype), spec=Spec(0, 1))
                low = fn.const(-1e4, scores.dtype)
                scores = fn.add("where", hidden, low, scores, spec=Spec(-1e4, 72, False))
    wide = fn.cast(scores, DType.f32) if scores.dtype in (DType.f16, DType.bf16) else scores
    axes = (wide.type.rank - 1,)
    top = fn.reduced(wide, "max", axes, keepdim=True)
    e = fn.add("exp", fn.add("sub", wide, top, spec=Spec(-2e4, 0, False)), spec=Spec(0, 1, False))
    weights = fn.add("div", e, fn.reduced(e, "sum", axes, keepdim=True), spec=Spec(0, 1, False))
    weights = fn.reshape(fn.cast(weights, v.dtype), (*v.shape[:-2], s, s))
    columns = fn.permute(v, (*range(v.type.rank - 2), v.type.rank - 1, v.type.rank - 2))
    return fn.add("matmul", weights, columns, spec=Spec(-4, 4, False))


def rotary(fn: RandomFunction) -> Value | None:
    """x * cos + rotate_half(x) * sin, the angles from positions."""
    x = fn.floats(lambda v: v.type.rank >= 2 and v.shape[-1].is_Integer and v.shape[-1] % 2 == 0)
    if x is None:
        return None
    axis, half = x.type.rank - 1, int(x.shape[-1]) // 2
    size = fn.specs[x].size
    positions = fn.add("iota", type=TensorType(DType.i64, x.shape[-2:-1]), spec=Spec(0, LIMIT))
    angle = fn.reshape(fn.cast(positions, x.dtype), (x.shape[-2], Integer(1)))
    frequency = fn.weight(tensor_type(x.dtype, [2 * half]))
    angle = fn.add("mul", angle, frequency, spec=Spec(-LIMIT, LIMIT, False))
    cos, sin = (fn.add(name, angle, spec=Spec(-1, 1, False)) for name in ("cos", "sin"))
    back = fn.slice(x, axis, half, half)
    back = fn.add("neg", back, spec=Spec(-size, size, False))
    turned = fn.add("concat", back, fn.slice(x, axis, 0, half), spec=Spec(-size, size, False), axis=axis)
    straight = fn.add("mul", x, cos, spec=Spec(-size, size, False))
    turned = fn.add("mul", turned, sin, spec=Spec(-size, size, False))
    return fn.add("add", straight, turned, spec=Spec(-2 * size, 2 * size, False))


def gated(fn: RandomFunction) -> Value | None:
    """silu(gate(x)) * up(x), the two halves of one product."""
    x = fn.floats(lambda v: v.type.rank >= 1 and v.shape[-1].is_Integer and fn.numel(v.shape[:-1]) <= 256)
    if x is None:
        return None
    n = fn.number(1, 4)
    both = fn.bounded(project(fn, x, 2 * n), 8)
    axis = both.type.rank - 1
    gate, up = (fn.slice(both, axis, start, n) for start in (0, n))
    gate = fn.add("mul", gate, fn.add("sigmoid", gate, spec=Spec(0, 1, False)), spec=fn.specs[both])
    return fn.add("mul", gate, up, spec=Spec(-64, 64, False))


def attention(fn: RandomFunction) -> Value | None:
    """Projections of x to heads, attention with grouped keys, and back to [B, S, H * D]."""
    s, b = sym("S"), sym("B")
    x = fn.floats(lambda v: v.type.rank == 3 and v.shape[:2] == (b, s) and v.shape[2].is_Integer)
    if x is None:
        return None
    groups, d = fn.number(1, 2), Integer(fn.pick((2, 4)))
    heads = groups * fn.number(1, 2)

    def heads_of(count: int, size: sympy.Expr) -> Value:
        flat = fn.bounded(project(fn, x, count * int(size)), 4)
        return fn.permute(fn.reshape(flat, (b, s, Integer(count), size)), (0, 2, 1, 3))

    dv = Integer(fn.pick((2, 4))) if fn.number(0, 3) == 0 else d
    q, k, v = heads_of(heads, d), heads_of(groups, d), heads_of(groups, dv)
    slot = f"kv{len(fn.slots)}" if fn.stateful and fn.number(0, 2) else ""
    length = sym("T") if slot else s
    if slot:
        fn.slots |= {f"{slot}.k": k.type, f"{slot}.v": v.type}
    extras: dict[str, Value] = {}
    masks = [m for m in fn.builder.params if m.dtype is DType.bool and m.shape == (b, length)]
    if masks and fn.number(0, 1):
        extras["mask"] = masks[0]
    for name, dtype in (("sinks", q.dtype), ("slopes", DType.f32)):
        if fn.number(0, 3) == 0:
            extras[name] = fn.weight(TensorType(dtype, q.shape[1:2]))
    if fn.number(0, 3) == 0:
        columns = Integer(fn.pick((1, 3, 5)))
        extras["distances"] = fn.weight(TensorType(DType.f32, (q.shape[1], columns)))
    if not slot and fn.number(0, 3) == 0:
        keys = heads_of(heads, d)
        bias = fn.bounded(fn.add("matmul", q, keys, spec=Spec(-64, 64, False)), 4)
        extras["bias"] = fn.slice(bias, 1, 0, 1) if fn.number(0, 1) else bias
    causal = bool(fn.number(0, 1))
    out = fn.add(
        "attention", q, k, v, *extras.values(), extras=tuple(extras) or None, spec=Spec(-4, 4, False),
        scale=float(d) ** -0.5, causal=causal, window=fn.pick((0, 0, 2, 3)),
        softcap=float(fn.pick((0, 0, 5))), slot=slot, ahead=None if causal else fn.pick((None, None, 1, 3)),  # type: ignore[arg-type]
    )  # fmt: skip
    flat = fn.permute(out, (0, 2, 1, 3))
    return fn.reshape(flat, (b, s, heads * dv))


def torch(fn: RandomFunction) -> Value | None:
    """An op without a rule of its own, run by PyTorch."""
    x = fn.floats(lambda v: v.type.rank >= 1)
    if x is None:
        return None
    n = concrete(x.shape[-1:], fn.highs)[0]
    spec = Spec(-n * fn.specs[x].size, n * fn.specs[x].size, False)
    template = '[[{"t": 0}, -1], {}]'
    return fn.add("call_torch", x, type=x.type, spec=spec, target="aten.cumsum.default", template=template)
