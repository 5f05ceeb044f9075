"""Elementwise rules. Each computes in the type that eager PyTorch computes in, and rounds where eager rounds."""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewright.ir.types import DType, Value

from .aten_rules import Context, Number, Operand, Result, Rule, rule

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def _exact(number: Operand, dtype: DType) -> bool:
    """True when a Python number (if it is one) loses nothing in ``dtype``."""
    if isinstance(number, Value) or not isinstance(number, int | float) or not dtype.is_float:
        return True
    return bool(torch.tensor(float(number), dtype=torch.float64).to(dtype.torch).double() == float(number))


def _binary(ctx: Context, opcode: str, x: Operand, y: Operand) -> Value:
    """One op in the result type. PyTorch keeps a Python number exact beside half-precision tensors, so do we."""
    dtype = ctx.out.dtype
    wide = dtype if _exact(x, dtype) and _exact(y, dtype) else ctx.wide(dtype)
    return ctx.cast(ctx.apply(opcode, ctx.value(x, wide), ctx.value(y, wide)), dtype)


def _scaled(ctx: Context, x: Operand, alpha: Number) -> Operand:
    if alpha == 1:
        return x
    return _binary(ctx, "mul", x, alpha) if isinstance(x, Value) else x * alpha


@rule("add.Tensor", "add.Scalar")
def _add(ctx: Context, x: Operand, y: Operand, alpha: Number = 1) -> Result:
    if ctx.out.dtype is DType.bool:
        return ctx.apply("or", ctx.value(x, DType.bool), ctx.value(y, DType.bool))
    return _binary(ctx, "add", x, _scaled(ctx, y, alpha))


@rule("sub.Tensor", "sub.Scalar", "subtract.Tensor", "subtract.Scalar")
def _sub(ctx: Context, x: Operand, y: Operand, alpha: Number = 1) -> Result:
    return _binary(ctx, "sub", x, _scaled(ctx, y, alpha))


@rule("rsub.Tensor", "rsub.Scalar")
def _rsub(ctx: Context, x: Operand, y: Operand, alpha: Number = 1) -> Result:
    return _binary(ctx, "sub", y, _scaled(ctx, x, alpha))


@rule("mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar")
def _mul(ctx: Context, x: Operand, y: Operand) -> Result:
    if ctx.out.dtype is DType.bool:
        return ctx.apply("and", ctx.value(x, DType.bool), ctx.value(y, DType.bool))
    return _binary(ctx, "mul", x, y)


@rule(
    "div.Tensor", "div.Scalar", "divide.Tensor", "divide.Scalar", "true_divide.Tensor", "true_divide.Scalar",
)  # fmt: skip
def _div(ctx: Context, x: Operand, y: Operand) -> Result:
    return _binary(ctx, "div", x, y)


@rule("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(ctx: Context, x: Operand, y: Operand, rounding_mode: str | None = None) -> Result:
    if rounding_mode == "trunc":
        return None
    return _floor_divide(ctx, x, y) if rounding_mode == "floor" else _binary(ctx, "div", x, y)


@rule("floor_divide.default", "floor_divide.Scalar")
def _floor_divide(ctx: Context, x: Operand, y: Operand) -> Result:
    if not ctx.out.dtype.is_float:
        return _binary(ctx, "div", x, y)
    wide = ctx.wide(ctx.out.dtype)
    return ctx.cast(_floor_divide_floats(ctx, ctx.value(x, wide), ctx.value(y, wide)), ctx.out.dtype)


def _floor_divide_floats(ctx: Context, x: Value, y: Value) -> Value:
    """As PyTorch does: less its remainder x is a multiple of y, so that the quotient is close to an integer, while that
    of x itself may have been rounded up to the next one: 1 // 0.1 is 9."""
    quotient = ctx.apply("div", x, y)
    size = ctx.apply("mod", ctx.apply("abs", x), ctx.apply("abs", y))
    rest = ctx.apply("where", ctx.apply("lt", x, 0), ctx.apply("neg", size), size)
    multiple = ctx.apply("div", ctx.apply("sub", x, rest), y)
    opposite = ctx.apply("ne", ctx.apply("lt", rest, 0), ctx.apply("lt", y, 0))
    below = ctx.apply("and", ctx.apply("ne", rest, 0), opposite)
    multiple = ctx.apply("sub", multiple, ctx.cast(below, x.dtype))
    floor = ctx.apply("floor", multiple)
    above = ctx.apply("gt", ctx.apply("sub", multiple, floor), 0.5)
    nearest = ctx.apply("add", floor, ctx.cast(above, x.dtype))
    zero = ctx.apply("mul", quotient, 0)  # with the sign of the quotient
    nearest = ctx.apply("where", ctx.apply("eq", multiple, 0), zero, nearest)
    return ctx.apply("where", ctx.apply("eq", y, 0), quotient, nearest)


@rule("remainder.Tensor", "remainder.Scalar")
def _remainder(ctx: Context, x: Operand, y: Operand) -> Result:
    return _binary(ctx, "mod", x, y)


@rule("maximum.default", "max.other")
def _maximum(ctx: Context, x: Value, y: Value) -> Result:
    return _binary(ctx, "maximum", x, y)


@rule("minimum.default", "min.other")
def _minimum(ctx: Context, x: Value, y: Value) -> Result:
    return _binary(ctx, "minimum", x, y)


@rule("clamp.default", "clamp.Tensor")
def _clamp(ctx: Context, x: Value, min: Operand | None = None, max: Operand | None = None) -> Result:
    dtype = ctx.out.dtype
    y = ctx.cast(x, ctx.wide(dtype))
    if min is not None:
        y = ctx.apply("maximum", y, ctx.value(min, y.dtype))
    if max is not None:
        y = ctx.apply("minimum", y, ctx.value(max, y.dtype))
    return ctx.cast(y, dtype)


@rule("clamp_min.default", "clamp_min.Tensor")
def _clamp_min(ctx: Context, x: Value, min: Operand) -> Result:
    return _clamp(ctx, x, min, None)


@rule("clamp_max.default", "clamp_max.Tensor")
def _clamp_max(ctx: Context, x: Value, max: Operand) -> Result:
    return _clamp(ctx, x, None, max)


@rule("hardtanh.default")
def _hardtanh(ctx: Context, x: Value, min_val: float = -1, max_val: float = 1) -> Result:
    return _clamp(ctx, x, min_val, max_val)


@rule("relu6.default")
def _relu6(ctx: Context, x: Value) -> Result:
    return _clamp(ctx, x, 0, 6)


# --- powers -------------------------------------------------------------------------------------------------------


@rule("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(ctx: Context, x: Operand, y: Operand) -> Result:
    if not ctx.out.dtype.is_float and y != 2:
        return None
    wide = ctx.wide(ctx.out.dtype)
    base = ctx.value(x, wide)
    if isinstance(y, int | float) and float(y) in _POWERS:
        return ctx.cast(_power(ctx, base, float(y)), ctx.out.dtype)
    return ctx.cast(ctx.apply("pow", base, ctx.value(y, wide)), ctx.out.dtype)


_POWERS = (0.5, 1.0, 2.0, 3.0, -0.5, -1.0, -2.0)


def _power(ctx: Context, x: Value, exponent: float) -> Value:
    if exponent == 0.5:
        return ctx.apply("sqrt", x)
    if exponent == -0.5:
        return ctx.apply("rsqrt", x)
    product = x
    for _ in range(int(abs(exponent)) - 1):
        product = ctx.apply("mul", product, x)
    return product if exponent > 0 else ctx.apply("div", 1, product)


@rule("square.default")
def _square(ctx: Context, x: Value) -> Result:
    return ctx.apply("mul", x, x)


@rule("reciprocal.default")
def _reciprocal(ctx: Context, x: Value) -> Result:
    return _binary(ctx, "div", 1, x)


# --- one operand --------------------------------------------------------------------------------------------------


def _same_name(name: str) -> Rule:
    def lower(ctx: Context, x: Value) -> Result:
        return ctx.apply(name, ctx.cast(x, ctx.out.dtype))

    return lower


for _name in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "erf", "sigmoid"):
    rule(f"{_name}.default")(_same_name(_name))


@rule("floor.default")
def _floor(ctx: Context, x: Value) -> Result:
    return ctx.apply("floor", x) if x.dtype.is_float else x


@rule("round.default")
def _round(ctx: Context, x: Value) -> Result:
    return ctx.apply("round", x) if x.dtype.is_float else x


@rule("ceil.default")
def _ceil(ctx: Context, x: Value) -> Result:
    return ctx.apply("neg", ctx.apply("floor", ctx.apply("neg", x))) if x.dtype.is_float else x


@rule("sign.default")
def _sign(ctx: Context, x: Value) -> Result:
    if x.dtype is DType.bool:
        return x
    up = ctx.cast(ctx.apply("gt", x, 0), x.dtype)
    return ctx.apply("sub", up, ctx.cast(ctx.apply("lt", x, 0), x.dtype))


# --- activations: PyTorch's kernels compute them in float32 and round once ----------------------------------------


@rule("relu.default")
def _relu(ctx: Context, x: Value) -> Result:
    return ctx.apply("maximum", x, 0)


@rule("silu.default")
def _silu(ctx: Context, x: Value) -> Result:
    y = ctx.cast(x, ctx.wide(x.dtype))
    return ctx.cast(ctx.apply("mul", y, ctx.apply("sigmoid", y)), x.dtype)


@rule("gelu.default")
def _gelu(ctx: Context, x: Value, approximate: str = "none") -> Result:
    y = ctx.cast(x, ctx.wide(x.dtype))
    if approximate == "tanh":
        cube = ctx.apply("mul", ctx.apply("mul", y, y), y)
        inner = ctx.apply("mul", ctx.apply("add", y, ctx.apply("mul", cube, 0.044715)), _SQRT_2_OVER_PI)
        bell = ctx.apply("tanh", inner)
    else:
        bell = ctx.apply("erf", ctx.apply("mul", y, _SQRT_HALF))
    half = ctx.apply("mul", y, 0.5)
    return ctx.cast(ctx.apply("mul", half, ctx.apply("add", bell, 1.0)), x.dtype)


@rule("leaky_relu.default")
def _leaky_relu(ctx: Context, x: Value, negative_slope: float = 0.01) -> Result:
    y = ctx.cast(x, ctx.wide(x.dtype))
    out = ctx.apply("where", ctx.apply("gt", y, 0), y, ctx.apply("mul", y, negative_slope), dtype=y.dtype)
    return ctx.cast(out, x.dtype)


@rule("elu.default")
def _elu(ctx: Context, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Result:
    y = ctx.cast(x, ctx.wide(x.dtype))
    bent = ctx.apply("sub", ctx.apply("exp", ctx.apply("mul", y, input_scale)), 1)
    low = ctx.apply("mul", bent, alpha * scale)
    out = ctx.apply("where", ctx.apply("gt", y, 0), ctx.apply("mul", y, scale), low, dtype=y.dtype)
    return ctx.cast(out, x.dtype)


@rule("softplus.default")
def _softplus(ctx: Context, x: Value, beta: float = 1, threshold: float = 20) -> Result:
    y = ctx.cast(x, ctx.wide(x.dtype))
    scaled = ctx.apply("mul", y, beta)
    soft = ctx.apply("div", _log_of_one_more(ctx, ctx.apply("exp", scaled)), beta)
    out = ctx.apply("where", ctx.apply("gt", scaled, threshold), y, soft, dtype=y.dtype)
    return ctx.cast(out, x.dtype)


def _log_of_one_more(ctx: Context, x: Value) -> Value:
    """log(1 + x) for finite x >= 0, to full precision where x is small too: 1 + x loses digits of x, and the quotient
    makes up for that (Goldberg, "What every computer scientist should know about floating-point arithmetic", 1991,
    theorem 4)."""
    more = ctx.apply("add", x, 1)
    quotient = ctx.apply("div", ctx.apply("mul", ctx.apply("log", more), x), ctx.apply("sub", more, 1))
    return ctx.apply("where", ctx.apply("eq", more, 1), x, quotient, dtype=x.dtype)


@rule("hardsigmoid.default")
def _hardsigmoid(ctx: Context, x: Value) -> Result:
    y = ctx.cast(x, ctx.wide(x.dtype))
    ramp = ctx.apply("minimum", ctx.apply("maximum", ctx.apply("add", y, 3), 0), 6)
    return ctx.cast(ctx.apply("div", ramp, 6), x.dtype)


@rule("hardswish.default")
def _hardswish(ctx: Context, x: Value) -> Result:
    y = ctx.cast(x, ctx.wide(x.dtype))
    ramp = ctx.apply("minimum", ctx.apply("maximum", ctx.apply("add", y, 3), 0), 6)
    return ctx.cast(ctx.apply("div", ctx.apply("mul", y, ramp), 6), x.dtype)


# --- comparisons, logic, selection --------------------------------------------------------------------------------


def _comparison(name: str) -> Rule:
    def lower(ctx: Context, x: Value, y: Operand) -> Result:
        dtype = ctx.promoted(x, y)
        return ctx.apply(name, ctx.cast(x, dtype), ctx.value(y, dtype))

    return lower


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    rule(f"{_name}.Tensor", f"{_name}.Scalar")(_comparison(_name))
for _alias, _name in {
    "not_equal": "ne", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge",
}.items():  # fmt: skip
    rule(f"{_alias}.Tensor", f"{_alias}.Scalar")(_comparison(_name))


def _logical(name: str) -> Rule:
    def lower(ctx: Context, x: Value, y: Operand) -> Result:
        return ctx.apply(name, ctx.cast(x, DType.bool), ctx.value(y, DType.bool))

    return lower


def _bitwise(name: str) -> Rule:
    def lower(ctx: Context, x: Operand, y: Operand) -> Result:
        return ctx.apply(name, ctx.value(x, ctx.out.dtype), ctx.value(y, ctx.out.dtype))

    return lower


for _name in ("and", "or", "xor"):
    rule(f"logical_{_name}.default")(_logical(_name))
    rule(f"bitwise_{_name}.Tensor", f"bitwise_{_name}.Scalar", f"__{_name}__.Tensor", f"__{_name}__.Scalar")(
        _bitwise(_name)
    )


@rule("logical_not.default")
def _logical_not(ctx: Context, x: Value) -> Result:
    return ctx.apply("not", ctx.cast(x, DType.bool))


@rule("bitwise_not.default")
def _bitwise_not(ctx: Context, x: Value) -> Result:
    return ctx.apply("not", x) if x.dtype is DType.bool else ctx.apply("sub", -1, x)


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(ctx: Context, condition: Value, x: Operand, y: Operand) -> Result:
    dtype = ctx.out.dtype
    return ctx.apply("where", ctx.cast(condition, DType.bool), ctx.value(x, dtype), ctx.value(y, dtype))


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(ctx: Context, x: Value, mask: Value, value: Operand) -> Result:
    return ctx.apply("where", mask, ctx.value(value, x.dtype), x)


@rule("isnan.default")
def _isnan(ctx: Context, x: Value) -> Result:
    return ctx.apply("ne", x, x)


@rule("addcmul.default")
def _addcmul(ctx: Context, x: Value, a: Value, b: Value, value: Number = 1) -> Result:
    wide = ctx.wide(ctx.out.dtype)
    product = ctx.apply("mul", ctx.cast(a, wide), ctx.cast(b, wide))
    scaled = product if value == 1 else ctx.apply("mul", product, value)
    return ctx.cast(ctx.apply("add", ctx.cast(x, wide), scaled), ctx.out.dtype)


# --- conversions and copies ---------------------------------------------------------------------------------------


@rule(
    "to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "type_as.default",
    "clone.default", "contiguous.default", "alias.default", "detach.default", "detach_.default",
    "lift_fresh_copy.default", "positive.default", takes_empty=True,
)  # fmt: skip
def _copy(ctx: Context, x: Value, *_: Any, **__: Any) -> Result:
    """Memory layout and device are not the IR's concern; only the element type can change."""
    if any(size == 0 for size in x.shape) and x.dtype is not ctx.out.dtype:
        return None
    return ctx.cast(x, ctx.out.dtype)


@rule("dropout.default", "feature_dropout.default", "alpha_dropout.default")
def _dropout(ctx: Context, x: Value, p: float, train: bool) -> Result:
    return x if not train or p == 0 else None
