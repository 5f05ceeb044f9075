"""Moves of a random function that compute element by element, or make numbers to compute with."""

from __future__ import annotations

import math

from sympy import Integer

from tilewright.ir.index import sym
from tilewright.ir.ops import broadcast
from tilewright.ir.types import DType, TensorType, Value, concrete, tensor_type

from .draft import LARGEST, LIMIT, RandomFunction, Spec


def unary(fn: RandomFunction) -> Value | None:
    x = fn.floats()
    if x is None:
        return None
    spec, no = fn.specs[x], False
    opcode = fn.pick(
        (
            "neg",
            "abs",
            "exp",
            "log",
            "sqrt",
            "rsqrt",
            "sin",
            "cos",
            "tanh",
            "erf",
            "sigmoid",
            "floor",
            "round",
            "pow",
            "div",
        )
    )
    match opcode:
        case "neg":
            return fn.add("neg", x, spec=Spec(-spec.high, -spec.low, spec.raw))
        case "abs":
            return fn.add("abs", x, spec=Spec(0, spec.size, spec.raw))
        case "exp":
            x = fn.bounded(x, 4)
            return fn.add("exp", x, spec=Spec(0, math.exp(fn.specs[x].high), no))
        case "floor" | "round":
            if not spec.raw:
                return None
            integer = math.floor if opcode == "floor" else round
            return fn.add(opcode, x, spec=Spec(integer(spec.low), integer(spec.high)))
        case "sin" | "cos" | "tanh" | "erf":
            return fn.add(opcode, x, spec=Spec(-1, 1, no))
        case "sigmoid":
            return fn.add("sigmoid", x, spec=Spec(0, 1, no))
    positive = offset_from_zero(fn, x)
    high = fn.specs[positive].high
    match opcode:
        case "log":
            return fn.add("log", positive, spec=Spec(-1, max(math.log(high), 1), no))
        case "sqrt":
            return fn.add("sqrt", positive, spec=Spec(0, math.sqrt(high), no))
        case "rsqrt":
            return fn.add("rsqrt", positive, spec=Spec(0, 1.5, no))
        case "pow":
            exponent = fn.pick((2.0, 0.5, -0.5, 1.0, 3.0))
            return fn.add(
                "pow", positive, fn.const(exponent, x.dtype), spec=Spec(0, max(high**exponent, 2), no)
            )
    return fn.add("div", fn.const(1.0, x.dtype), positive, spec=Spec(0, 2, no))


def offset_from_zero(fn: RandomFunction, x: Value) -> Value:
    """``|x| + 0.5``"""
    size = fn.specs[x].size
    absolute = fn.add("abs", x, spec=Spec(0, size))
    return fn.add("add", absolute, fn.const(0.5, x.dtype), spec=Spec(0.5, size + 0.5, False))


def _partner(fn: RandomFunction, x: Value) -> Value:
    """A second operand of x's dtype that broadcasts with it: x itself, a constant, a weight, or another value."""
    kind = fn.pick(("value", "value", "value", "const", "weight", "same"))
    if kind == "value":
        other = fn.choose(lambda v: v.dtype is x.dtype and _fits(fn, v, x))
        if other is not None:
            return other
    if kind == "weight" and x.dtype.is_float:
        tail = [Integer(1) if d.free_symbols or fn.number(0, 3) == 0 else d for d in x.shape]
        return fn.weight(TensorType(x.dtype, tuple(tail[fn.number(0, len(tail)) :])))
    if kind == "const" or kind == "weight":
        if x.dtype is DType.bool:
            return fn.const(bool(fn.number(0, 1)), x.dtype)
        options = (2.0, -0.5, 1.0, 0.0, 0.25) if x.dtype.is_float else (0, 1, 2, 3)
        return fn.const(fn.pick(options), x.dtype)  # type: ignore[arg-type]
    return x


def _fits(fn: RandomFunction, v: Value, x: Value) -> bool:
    pairs = zip(reversed(v.shape), reversed(x.shape), strict=False)
    if not all(a == b or a == 1 or b == 1 for a, b in pairs):
        return False
    return fn.numel(broadcast([v.shape, x.shape])) <= LARGEST


def binary(fn: RandomFunction) -> Value | None:
    x = fn.choose(lambda v: v.dtype is not DType.bool)
    if x is None:
        return None
    y = _partner(fn, x)
    if fn.number(0, 1):
        x, y = y, x
    a, b = fn.specs[x], fn.specs[y]
    opcode = fn.pick(("add", "sub", "mul", "maximum", "minimum", "div"))
    raw = a.raw and b.raw
    match opcode:
        case "add":
            return fn.add("add", x, y, spec=fn.combined(a, b, lambda p, q: p + q))
        case "sub":
            return fn.add("sub", x, y, spec=fn.combined(a, b, lambda p, q: p - q))
        case "mul":
            return fn.add("mul", x, y, spec=fn.combined(a, b, lambda p, q: p * q))
        case "maximum" | "minimum":
            spec = fn.combined(a, b, max if opcode == "maximum" else min, raw)
            return fn.add(opcode, x, y, spec=spec)
    if x.dtype.is_float:
        return fn.add("div", x, offset_from_zero(fn, y), spec=Spec(-2 * a.size, 2 * a.size, False))
    divisor = fn.const(fn.number(1, 4), x.dtype)
    opcode = fn.pick(("div", "mod"))
    if opcode == "div":
        return fn.add("div", x, divisor, spec=Spec(math.floor(min(a.low, 0)), max(a.high, 0)))
    return fn.add("mod", x, divisor, spec=Spec(0, 3))


def integer(fn: RandomFunction) -> Value | None:
    """New integers: positions, dims, or integers of a float that no rewrite rounds."""
    kind = fn.pick(("iota", "dim", "cast"))
    if kind == "iota":
        n = fn.pick((sym("S"), sym("B"), Integer(4), Integer(6)))
        high = concrete((n,), fn.highs)[0] - 1  # type: ignore[arg-type]
        return fn.add("iota", type=tensor_type("i64", [n]), spec=Spec(0, high))  # type: ignore[list-item]
    if kind == "dim":
        expr = fn.pick((sym("S"), sym("B"), sym("B") * sym("S"), sym("S") + 1))
        high = concrete((expr,), fn.highs)[0]  # type: ignore[arg-type]
        return fn.add("dim", type=tensor_type("i64"), spec=Spec(1, high), expr=expr)
    x = fn.choose(lambda v: fn.specs[v].raw)
    return None if x is None else fn.cast(x, DType(fn.pick(("i64", "i32"))))


def compare(fn: RandomFunction) -> Value | None:
    x = fn.choose(lambda v: fn.specs[v].raw)
    if x is None:
        return None
    y = _partner(fn, x)
    if not fn.specs[y].raw:
        return None
    if x.dtype is DType.bool:
        z = fn.add(fn.pick(("and", "or", "xor", "eq", "ne")), x, y, spec=Spec(0, 1))  # type: ignore[arg-type]
        return fn.add("not", z, spec=Spec(0, 1)) if fn.number(0, 1) else z
    return fn.add(fn.pick(("eq", "ne", "lt", "le", "gt", "ge")), x, y, spec=Spec(0, 1))  # type: ignore[arg-type]


def select(fn: RandomFunction) -> Value | None:
    x = fn.floats(lambda v: v.type.rank >= 1)
    if x is None:
        return None
    condition = fn.choose(lambda v: v.dtype is DType.bool and _fits(fn, v, x))
    if condition is None:
        last = fn.add("iota", type=TensorType(DType.i64, x.shape[-1:]), spec=Spec(0, LIMIT))
        condition = fn.add("ge", last, fn.const(fn.number(0, 2), DType.i64), spec=Spec(0, 1))
    y = _partner(fn, x)
    if not _fits(fn, condition, y) or fn.numel(broadcast([condition.shape, x.shape, y.shape])) > LARGEST:
        return None
    a, b = fn.specs[x], fn.specs[y]
    spec = Spec(min(a.low, b.low), max(a.high, b.high), a.raw and b.raw)
    return fn.add("where", condition, x, y, spec=spec)


def cast(fn: RandomFunction) -> Value | None:
    """To another float dtype and back, or from an integer or boolean to float."""
    x = fn.choose(lambda v: True)
    if x is None:
        return None
    if not x.dtype.is_float or x.dtype is not fn.dtype:
        return fn.cast(x, fn.dtype)
    other = fn.pick((DType.f32, DType.bf16, DType.f64))
    narrowed = fn.cast(x, other)  # type: ignore[arg-type]
    return narrowed if fn.number(0, 2) == 0 else fn.cast(narrowed, fn.dtype)
