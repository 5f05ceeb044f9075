"""Scalars and indices as C++: the column of the pointwise table that belongs to this printer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sympy
from sympy import Expr

from tilewright.ir.errors import VerifyError
from tilewright.ir.types import DType

from .ctypes_of import scalar

Args = Sequence[str]


def print_index(expr: Expr, names: Mapping[sympy.Symbol, str] = {}) -> str:
    """An integer expression; symbols are spelled as they are unless ``names`` says otherwise."""
    match expr.func.__name__:
        case "Add":
            return f"({_sum(expr, names)})"
        case "Mul":
            return "*".join(print_index(f, names) for f in expr.as_ordered_factors())
        case "FloorDiv" | "Mod":
            a, b = expr.args
            left, right = print_index(a, names), print_index(b, names)
            if a.is_nonnegative:
                return f"({left} {'/' if expr.func.__name__ == 'FloorDiv' else '%'} {_atom(right)})"
            return f"tw::floor_{'div' if expr.func.__name__ == 'FloorDiv' else 'mod'}<long>({left}, {right})"
        case "Max" | "Min":
            first, *rest = (print_index(a, names) for a in sorted(expr.args, key=str))
            for other in rest:
                first = f"std::{expr.func.__name__.lower()}<long>({first}, {other})"
            return first
        case "Pow":
            base, exponent = expr.args
            if exponent.is_Integer and exponent > 0:
                return "*".join([print_index(base, names)] * int(exponent))
    if expr.is_Integer:
        return str(int(expr)) if expr >= 0 else f"({int(expr)})"
    if expr.is_Symbol:
        return names.get(expr, expr.name)
    raise VerifyError(f"cannot print index expression {expr}")


def _atom(text: str) -> str:
    return text if text.isalnum() or text.startswith("(") else f"({text})"


def _sum(expr: Expr, names: Mapping[sympy.Symbol, str]) -> str:
    text = ""
    for term in expr.as_ordered_terms():
        if term.could_extract_minus_sign():
            text += f" - {print_index(-term, names)}"
        else:
            text += f" + {print_index(term, names)}" if text else print_index(term, names)
    return text.strip() if not text.startswith(" -") else f"-{text[3:]}"


def print_op(op: str, result: DType, operand: DType, args: Args) -> str:
    """A pointwise op on printed scalars. ``operand`` is the dtype of its (last) operand."""
    text = OPS[op](result, operand, args)
    small = result in (DType.i8, DType.i16, DType.u8, DType.i32)
    return f"{scalar(result)}({text})" if small and op in _WRAPS else text


_WRAPS = ("add", "sub", "mul", "neg", "and", "or", "xor", "shr")


def _binary(sign: str, on_bool: str = "") -> Callable[[DType, DType, Args], str]:
    def show(result: DType, operand: DType, args: Args) -> str:
        return f"({args[0]} {on_bool if on_bool and operand is DType.bool else sign} {args[1]})"

    return show


def _call(name: str) -> Callable[[DType, DType, Args], str]:
    def show(result: DType, operand: DType, args: Args) -> str:
        return f"{name}({', '.join(args)})"

    return show


def _typed(name: str) -> Callable[[DType, DType, Args], str]:
    """A template over the scalar type, so that both arguments convert to it."""

    def show(result: DType, operand: DType, args: Args) -> str:
        return f"{name}<{scalar(result)}>({', '.join(args)})"

    return show


def _div(result: DType, operand: DType, args: Args) -> str:
    return f"({args[0]} / {args[1]})" if result.is_float else _typed("tw::floor_div")(result, operand, args)


def _pow(result: DType, operand: DType, args: Args) -> str:
    exponents = {"2.0": "tw::square", "3.0": "tw::cube", "0.5": "tw::sqrt", "-0.5": "tw::rsqrt"}
    known = exponents.get(args[1].removesuffix("f"))
    return f"{known}({args[0]})" if known else f"std::pow({args[0]}, {args[1]})"


def _cast(result: DType, operand: DType, args: Args) -> str:
    """Rounding to half precision happens at the store only: inside a kernel, floats keep float32's precision."""
    if result is DType.bool and operand is not DType.bool:
        return f"({args[0]} != 0)"
    return args[0] if scalar(result) == scalar(operand) else f"{scalar(result)}({args[0]})"


OPS: dict[str, Callable[[DType, DType, Args], str]] = {
    "add": _binary("+", "|"), "sub": _binary("-", "^"), "mul": _binary("*", "&"), "div": _div,
    "mod": _typed("tw::floor_mod"), "pow": _pow, "maximum": _typed("tw::maximum"), "minimum": _typed("tw::minimum"),
    "neg": lambda r, o, a: f"(-{a[0]})", "abs": _typed("tw::absolute"),
    "exp": _call("tw::exp"), "log": _call("tw::log"), "sqrt": _call("tw::sqrt"), "rsqrt": _call("tw::rsqrt"),
    "sin": _call("tw::sin"), "cos": _call("tw::cos"), "tanh": _call("tw::tanh"), "erf": _call("tw::erf"),
    "sigmoid": _call("tw::sigmoid"), "floor": _call("std::floor"), "round": _call("std::nearbyint"),
    "eq": _binary("=="), "ne": _binary("!="), "lt": _binary("<"), "le": _binary("<="), "gt": _binary(">"),
    "ge": _binary(">="), "and": _binary("&"), "or": _binary("|"), "xor": _binary("^"),
    "shr": _binary(">>"),
    "not": lambda r, o, a: f"(!{a[0]})", "where": lambda r, o, a: f"({a[0]} ? {a[1]} : {a[2]})", "cast": _cast,
}  # fmt: skip


def combine(kind: str, dtype: DType, accumulator: str, value: str) -> str:
    """One step of a reduction."""
    match kind:
        case "sum":
            return f"{accumulator} + {value}"
        case "prod":
            return f"{accumulator} * {value}"
        case "max" | "min":
            return f"tw::{kind}imum<{scalar(dtype)}>({accumulator}, {value})"
        case "any":
            return f"{accumulator} | ({value} != 0)"
        case "all":
            return f"{accumulator} & ({value} != 0)"
    raise VerifyError(f"unknown reduction {kind}")


def initial(kind: str, dtype: DType) -> str:
    """What a reduction starts from."""
    limits = f"std::numeric_limits<{scalar(dtype)}>"
    match kind:
        case "sum" | "any":
            return "0"
        case "prod" | "all":
            return "1"
        case "max":
            return f"-{limits}::infinity()" if dtype.is_float else f"{limits}::min()"
        case "min":
            return f"{limits}::{'infinity' if dtype.is_float else 'max'}()"
    raise VerifyError(f"unknown reduction {kind}")


def simd_reduction(kind: str, dtype: DType) -> str:
    """How OpenMP is to join the lanes of a vectorised reduction."""
    if kind in ("max", "min"):
        return f"tw::{kind}imum" if dtype.is_float else kind
    return {"sum": "+", "prod": "*", "any": "|", "all": "&"}[kind]
