"""The Triton column of the pointwise table: how each op of ``ir.pointwise.POINTWISE`` is written.

Float math is done in float32 (float64 for f64); functions that Triton lacks, or has only as a device library that the
interpreter cannot call, are short helpers in the prelude of every generated module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from tilewright.ir.types import DType

PRELUDE = '''\
@triton.jit
def tanh(x):
    """tanh: a polynomial near zero (Cephes), where 1 - exp(..) would cancel, else from the exponential."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def tanh64(x):
    """tanh in float64; exact to rounding of exp(2|x|) - 1, which is enough away from zero."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    near = x * (1.0 - z * (1.0 / 3.0 - z * (2.0 / 15.0 - z * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.01, near, tl.where(x < 0, -far, far))


@triton.jit
def quadrant(x):
    """x as q * pi/2 + r: q % 4 and r, in float32. pi/2 is subtracted in two parts (fdlibm), in float64: r is exact to
    rounding for |x| below 2^20, and to 1e-6 below 2^33. The device library has no limit, but needs memory for that."""
    wide = x.to(tl.float64)
    q = tl.floor(wide * 0.63661977236758134308 + 0.5)
    r = (wide - q * 1.57079632673412561417) - q * 6.07710050650619224932e-11
    return (q - 4.0 * tl.floor(q * 0.25)).to(tl.float32), r.to(tl.float32)


@triton.jit
def sine(q, r):
    """sin(q * pi/2 + r) for |r| <= pi/4: polynomials in r (Cephes)."""
    z = r * r
    s = -1.9515295891e-4 * z + 8.3321608736e-3
    s = r + r * z * (s * z - 1.6666654611e-1)
    c = 2.443315711809948e-5 * z - 1.388731625493765e-3
    c = 1.0 - 0.5 * z + z * z * (c * z + 4.166664568298827e-2)
    odd = (q == 1.0) | (q == 3.0)
    return tl.where(odd, c, s) * tl.where(q < 2.0, 1.0, -1.0)


@triton.jit
def sin32(x):
    """sin in float32."""
    q, r = quadrant(x)
    return sine(q, r)


@triton.jit
def cos32(x):
    """cos in float32: a quarter of a turn further."""
    q, r = quadrant(x)
    return sine(tl.where(q == 3.0, 0.0, q + 1.0), r)


@triton.jit
def power(a, b):
    """a ** b; a negative base keeps its sign for odd integer exponents and gives NaN for fractions."""
    magnitude = tl.exp2(b * tl.log2(tl.abs(a)))
    magnitude = tl.where(b == 0.0, 1.0, magnitude)
    odd = b - 2.0 * tl.floor(b * 0.5) == 1.0
    signed = tl.where(odd, -magnitude, magnitude)
    return tl.where(a < 0.0, tl.where(tl.floor(b) == b, signed, float("nan")), magnitude)


@triton.jit
def rounded(x, WHOLE: tl.constexpr):
    """The nearest integer, of two the even one. A float of WHOLE and more has no fraction: a sum is rounded to one.
    Zero keeps the sign of x."""
    offset = tl.where(x < 0.0, -WHOLE, WHOLE)
    nearest = tl.where(tl.abs(x) < WHOLE, (x + offset) - offset, x)
    return tl.where(nearest == 0.0, x * 0.0, nearest)


@triton.jit
def floor_div(a, b):
    """Integer division towards minus infinity; Triton's own rounds towards zero."""
    q = a // b
    return tl.where((q * b != a) & ((a < 0) != (b < 0)), q - 1, q)


@triton.jit
def floor_mod(a, b):
    """Integer remainder with the sign of the divisor."""
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def remainder(a, b):
    """Float remainder with the sign of the divisor. fmod is exact, which a - floor(a / b) * b is not: where a / b is
    rounded to an integer, that is zero instead of nearly b."""
    r = fmod(a, b)
    return tl.where((r != 0.0) & ((r < 0.0) != (b < 0.0)), r + b, r)


@triton.jit
def multiply(a, b):
    """The combining function of a product reduction."""
    return a * b


@triton.jit
def larger(x, y):
    """Of two numbers the larger; NaN where one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(x, y):
    """Of two numbers the smaller; NaN where one is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def float_to_f8(x):
    """The bits of e4m3 nearest to a float32, ties to even; 448 for what is larger. Subnormal results are rounded by
    adding a float whose last bit weighs 2^-9."""
    bits = tl.cast(x, tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size - (120 << 23) + 0x7FFFF + ((size >> 20) & 1)) >> 20
    subnormal = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    finite = tl.where(size < (121 << 23), subnormal, tl.where(size < 0x43E00000, normal, 0x7E))
    return (tl.where(size > 0x7F800000, 0x7F, finite) | ((bits >> 24) & 0x80)).to(tl.uint8)
'''

ON_GPU = '''\
@triton.jit
def fmod(a, b):
    """The remainder of a division towards zero. The operator's own is not exact on a GPU."""
    return tl.extra.cuda.libdevice.fmod(a, b)


@triton.jit
def max_of(x, AXIS: tl.constexpr, KEEP_DIMS: tl.constexpr = False):
    """The largest float along an axis; NaN where one is, which tl.max passes over."""
    return tl.reduce(x, AXIS, larger, keep_dims=KEEP_DIMS)


@triton.jit
def min_of(x, AXIS: tl.constexpr, KEEP_DIMS: tl.constexpr = False):
    """The smallest float along an axis; NaN where one is."""
    return tl.reduce(x, AXIS, smaller, keep_dims=KEEP_DIMS)
'''

INTERPRETED = '''\
@triton.jit
def fmod(a, b):
    """The remainder of a division towards zero. The interpreter has no device library, and an exact operator."""
    return a % b


@triton.jit
def max_of(x, AXIS: tl.constexpr, KEEP_DIMS: tl.constexpr = False):
    """The largest float along an axis; NaN where one is. Of the interpreter's reductions those of triton.language alone
    are fast."""
    lost = tl.max((x != x).to(tl.int32), axis=AXIS, keep_dims=KEEP_DIMS) != 0
    return tl.where(lost, float("nan"), tl.max(x, axis=AXIS, keep_dims=KEEP_DIMS))


@triton.jit
def min_of(x, AXIS: tl.constexpr, KEEP_DIMS: tl.constexpr = False):
    """The smallest float along an axis; NaN where one is."""
    return -max_of(-x, AXIS, KEEP_DIMS)
'''

READ_F8 = '''\
@triton.jit
def f8_to_float(code):
    """The float32 of e4m3 bits: read as float16 they stand for a 256th."""
    half = (code.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385
    number = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((half & 0x7FFF) == 0x3F80, float("nan"), number)
'''

READ_F8_IN_HARDWARE = '''\
@triton.jit
def f8_to_float(code):
    """The float32 of e4m3 bits, by the conversion that the processor has."""
    return code.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
'''


def prelude(f8_in_hardware: bool, interpret: bool) -> str:
    """The helpers of a generated module."""
    read = READ_F8_IN_HARDWARE if f8_in_hardware else READ_F8
    return f"{PRELUDE}\n\n{INTERPRETED if interpret else ON_GPU}\n\n{read}".rstrip()


TRITON_TYPES = {
    DType.f64: "tl.float64", DType.f32: "tl.float32", DType.f16: "tl.float16", DType.bf16: "tl.bfloat16",
    DType.i64: "tl.int64", DType.i32: "tl.int32", DType.i16: "tl.int16", DType.i8: "tl.int8", DType.u8: "tl.uint8",
    DType.bool: "tl.int1",
}  # fmt: skip
"""Of f8 kernels see the bits only: Triton has no such type before compute capability 8.9."""

POINTER_TYPES = {
    DType.f64: "fp64", DType.f32: "fp32", DType.f16: "fp16", DType.bf16: "bf16", DType.f8: "u8",
    DType.i64: "i64", DType.i32: "i32", DType.i16: "i16", DType.i8: "i8", DType.u8: "u8", DType.bool: "u8",
}  # fmt: skip


def compute_dtype(dtype: DType) -> DType:
    """The type in which a scalar of ``dtype`` is held inside a kernel."""
    return DType.f32 if dtype in (DType.f16, DType.bf16, DType.f8) else dtype


def literal(value: Any, dtype: DType) -> str:
    """A constant; negative ones in parentheses."""
    if dtype is DType.bool:
        return str(bool(value))
    if not dtype.is_float:
        return f"({int(value)})" if value < 0 else str(int(value))
    number = float(value)
    if not math.isfinite(number):
        return f'float("{number}")'
    return f"({number!r})" if number < 0 or math.copysign(1, number) < 0 else repr(number)


Print = Callable[[tuple[str, ...], DType], str]
"""(texts of the operands, their dtype) -> text of the result, not parenthesised."""


def _by_kind(floats: str, integers: str) -> Print:
    return lambda args, dtype: (floats if dtype.is_float else integers).format(*args)


def _plain(template: str) -> Print:
    return lambda args, dtype: template.format(*args)


def _by_width(single: str, double: str) -> Print:
    return lambda args, dtype: (double if dtype is DType.f64 else single).format(*args)


_NUMBER = re.compile(r"\(?-?[\d.]+(e[+-]?\d+)?\)?|float\(.*\)")
"""Every text that ``literal`` gives for a float."""


def _mod(args: tuple[str, ...], dtype: DType) -> str:
    """The device library takes blocks of one type; a constant would become a float32 or an integer."""
    if not dtype.is_float:
        return "floor_mod({}, {})".format(*args)
    given = (f"tl.full((), {a}, {TRITON_TYPES[dtype]})" if _NUMBER.fullmatch(a) else a for a in args)
    return f"remainder({', '.join(given)})"


def _power(args: tuple[str, ...], dtype: DType) -> str:
    """Small whole and half exponents, which is what models use, become products and roots."""
    base, exponent = args
    try:
        constant = float(exponent.strip("()"))
    except ValueError:
        constant = math.nan
    if constant in (2.0, 3.0, 4.0):
        return " * ".join([base] * int(constant))
    if constant in (0.5, -0.5):
        return f"{'tl.sqrt' if constant > 0 else 'tl.rsqrt'}({base})"
    return f"power({base}, {exponent})"


TRITON: dict[str, Print] = {
    "add": _plain("{0} + {1}"),
    "sub": _plain("{0} - {1}"),
    "mul": _plain("{0} * {1}"),
    "div": _by_kind("{0} / {1}", "floor_div({0}, {1})"),
    "mod": _mod,
    "pow": _power,
    "maximum": _plain("tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    "minimum": _plain("tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"),
    "neg": _plain("-{0}"),
    "abs": _plain("tl.abs({0})"),
    "exp": _plain("tl.exp({0})"),
    "log": _plain("tl.log({0})"),
    "sqrt": _plain("tl.sqrt({0})"),
    "rsqrt": _plain("tl.rsqrt({0})"),
    "sin": _by_width("sin32({0})", "tl.sin({0})"),
    "cos": _by_width("cos32({0})", "tl.cos({0})"),
    "tanh": _by_width("tanh({0})", "tanh64({0})"),
    "erf": _plain("tl.erf({0})"),
    "sigmoid": _plain("1.0 / (1.0 + tl.exp(-{0}))"),
    "floor": _plain("tl.floor({0})"),
    "round": _by_width("rounded({0}, 8388608.0)", "rounded({0}, 4503599627370496.0)"),
    "eq": _plain("{0} == {1}"),
    "ne": _plain("{0} != {1}"),
    "lt": _plain("{0} < {1}"),
    "le": _plain("{0} <= {1}"),
    "gt": _plain("{0} > {1}"),
    "ge": _plain("{0} >= {1}"),
    "and": _plain("{0} & {1}"),
    "or": _plain("{0} | {1}"),
    "xor": _plain("{0} ^ {1}"),
    "shr": _plain("{0} >> {1}"),
    "not": _plain("{0} == 0"),
    "where": _plain("tl.where({0}, {1}, {2})"),
    "cast": _plain("{0}"),
}
