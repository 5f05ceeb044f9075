"""Integer index arithmetic: symbols, floor division and modulo, index maps, and simplification under ranges.

Dim symbols (``B``, ``S``, ``T``, ``L``) start with a capital and are positive; index symbols (``i0``, ``k``) are
non-negative. Everything that an expression may contain is built here, so that text parses back to equal objects.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import sympy
from sympy import Add, Expr, Integer, Max, Min, Mul

from .errors import ParseError


@cache
def sym(name: str) -> sympy.Symbol:
    """The symbol of that name: a positive dim when it starts with a capital, else a non-negative index."""
    if name[:1].isupper():
        return sympy.Symbol(name, integer=True, positive=True)
    return sympy.Symbol(name, integer=True, nonnegative=True)


def _split_multiples(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Split ``a = b * q + r`` by collecting those terms of the sum that are multiples of ``b``."""
    q, r = [], []
    for term in Add.make_args(a):
        ratio = term / b
        if sympy.fraction(ratio)[1] == 1 and ratio.is_integer:
            q.append(ratio)
        else:
            r.append(term)
    return Add(*q), Add(*r)


class FloorDiv(sympy.Function):
    """``a // b`` for a positive divisor."""

    nargs = 2
    is_integer = True

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if a.is_Integer and b.is_Integer:
            return Integer(int(a) // int(b))
        if b == 1 or a == 0 or a == -1:
            return a
        if isinstance(a, FloorDiv):
            return FloorDiv(a.args[0], a.args[1] * b)
        q, r = _split_multiples(a, b)
        return q + FloorDiv(r, b) if q != 0 else None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_nonnegative else None

    def _sympystr(self, printer: Any) -> str:
        return f"({printer.parenthesize(self.args[0], 45)} // {printer.parenthesize(self.args[1], 100)})"


class Mod(sympy.Function):
    """``a % b`` for a positive divisor; the result lies in ``[0, b)``."""

    nargs = 2
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if a.is_Integer and b.is_Integer:
            return Integer(int(a) % int(b))
        if b == 1 or a == 0:
            return Integer(0)
        if isinstance(a, Mod) and _split_multiples(a.args[1], b)[1] == 0:
            return Mod(a.args[0], b)
        q, r = _split_multiples(a, b)
        return Mod(r, b) if q != 0 else None

    def _sympystr(self, printer: Any) -> str:
        return f"({printer.parenthesize(self.args[0], 45)} % {printer.parenthesize(self.args[1], 100)})"


def as_expr(value: int | Expr | str) -> Expr:
    """An integer expression from an int, text, or an expression."""
    if isinstance(value, str):
        return parse_expr(value)
    return sympy.sympify(value)


def format_expr(expr: Expr) -> str:
    """Text of an expression that :func:`parse_expr` reads back to an equal one."""
    return str(expr)


_CALLS = {"Max": Max, "Min": Min}


@lru_cache(maxsize=4096)
def parse_expr(text: str) -> Expr:
    """Read ``64*i1 + (i2 % 8)``: names, integers, ``+ - * // %``, ``Max`` and ``Min``. Raises ParseError."""
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, text)
    except ParseError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ParseError(f"malformed index expression {text!r}") from error


def _build(node: ast.expr, text: str) -> Expr:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return Integer(value)
        case ast.Name(id=name):
            return sym(name)
        case ast.UnaryOp(op=ast.USub()) | ast.BinOp(op=ast.Mult()):
            return Mul(*_factors(node, text))
        case ast.Call(func=ast.Name(id=name), args=args) if name in _CALLS:
            return _CALLS[name](*(_build(a, text) for a in args))
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _build(left, text), _build(right, text)
            match op:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.FloorDiv() if b != 0:
                    return FloorDiv(a, b)
                case ast.Mod() if b != 0:
                    return Mod(a, b)
                case ast.Pow() if b.is_Integer and 0 <= int(b) <= 16:
                    return a**b
    raise ParseError(f"unsupported syntax in index expression {text!r}")


def _factors(node: ast.expr, text: str) -> list[Expr]:
    """The factors of a product, all at once: ``Mul`` of a number and a sum alone would multiply them out."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return [Integer(-1), *_factors(operand, text)]
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return [*_factors(left, text), *_factors(right, text)]
    return [_build(node, text)]


def upper_bound(expr: Expr, extents: Mapping[sympy.Symbol, Expr]) -> Expr | None:
    """An inclusive upper bound of ``expr`` when each index symbol lies in ``[0, extent)``, or None if unknown."""
    total: Expr = Integer(0)
    for term in Add.make_args(expr):
        bound = _term_bound(term, extents)
        if bound is None:
            return None
        total += bound
    return sympy.expand(total)


def _term_bound(term: Expr, extents: Mapping[sympy.Symbol, Expr]) -> Expr | None:
    if term.is_Integer:
        return term
    if term.could_extract_minus_sign():
        # The largest value of a negated term is minus the smallest of the term: zero for index symbols.
        return Integer(0) if (-term).is_nonnegative and (-term).free_symbols & set(extents) else term
    bound: Expr = Integer(1)
    factors = Mul.make_args(term)
    varying = [f for f in factors if f.free_symbols & set(extents)]
    steady = all(f.is_nonnegative for f in factors if f not in varying)
    if varying and not (
        steady and (len(varying) == 1 or all(_nonnegative_factor(f, extents) for f in varying))
    ):
        return None  # the largest factors need not give the largest product
    for factor in factors:
        if factor in extents:
            bound *= extents[factor] - 1
        elif isinstance(factor, Mod):
            inner = upper_bound(factor.args[0], extents)
            small = inner is not None and provably_nonnegative(factor.args[0], extents)
            bound *= Min(inner, factor.args[1] - 1) if small else factor.args[1] - 1
        elif isinstance(factor, FloorDiv):
            inner = upper_bound(factor.args[0], extents)
            if inner is None:
                return None
            bound *= FloorDiv(inner, factor.args[1])
        elif factor.free_symbols & set(extents):
            return None
        else:
            bound *= factor
    return bound


def _nonnegative_factor(factor: Expr, extents: Mapping[sympy.Symbol, Expr]) -> bool:
    if isinstance(factor, FloorDiv):
        return provably_nonnegative(factor.args[0], extents)
    return bool(factor.is_nonnegative)


def provably_less(expr: Expr, limit: Expr, extents: Mapping[sympy.Symbol, Expr]) -> bool:
    """True when ``expr < limit`` holds for every index in range; False when it is not known to."""
    bound = upper_bound(expr, extents)
    if bound is None:
        return False
    return bool(sympy.expand(limit - 1 - bound).is_nonnegative)


def provably_nonnegative(expr: Expr, extents: Mapping[sympy.Symbol, Expr]) -> bool:
    """True when ``expr >= 0`` holds for every index in range."""
    if expr.is_nonnegative:
        return True
    negated = upper_bound(sympy.expand(-expr), extents)
    return negated is not None and bool(sympy.expand(-negated).is_nonnegative)


def simplify(expr: Expr, extents: Mapping[sympy.Symbol, Expr]) -> Expr:
    """Simplify floor divisions and modulos, given that each index symbol lies in ``[0, extent)``."""
    expr = sympy.sympify(expr)
    if zero := {s: Integer(0) for s in expr.free_symbols if extents.get(s) == 1}:
        expr = expr.xreplace(zero)
    return _simplify(expr, tuple(sorted(extents.items(), key=lambda item: item[0].name)))


@lru_cache(maxsize=65536)
def _simplify(expr: Expr, extents: tuple[tuple[sympy.Symbol, Expr], ...]) -> Expr:
    if not expr.args:
        return expr
    args = [_simplify(a, extents) for a in expr.args]
    ranges = dict(extents)
    if isinstance(expr, FloorDiv | Mod):
        a, b = sympy.expand(args[0]), args[1]
        q, r = _split_multiples(a, b)
        if provably_less(r, b, ranges) and provably_nonnegative(r, ranges):
            return q if isinstance(expr, FloorDiv) else r
        rest = _divide(r, b, extents) if isinstance(expr, FloorDiv) else _remainder(r, b, extents)
        return q + rest if isinstance(expr, FloorDiv) else rest
    rebuilt = expr.func(*args)
    if isinstance(rebuilt, Add | Mul):
        rebuilt = sympy.expand(rebuilt)
    joined = _join_digits(rebuilt) if isinstance(rebuilt, Add) else rebuilt
    return joined if joined == rebuilt else _simplify(joined, extents)


def _divide(a: Expr, b: Expr, extents: tuple[tuple[sympy.Symbol, Expr], ...]) -> Expr:
    """``a // b`` after ``(x % (c*d)) // c => (x // c) % d`` and ``(c*q + r) // (c*d) => q // d`` for 0 <= r < c."""
    if isinstance(a, Mod):
        d, rest = _split_multiples(a.args[1], b)
        if rest == 0:
            return _simplify(Mod(FloorDiv(a.args[0], b), d), extents)
    if (split := _common_scale(a, b, dict(extents))) is not None:
        c, q, _ = split
        return _simplify(FloorDiv(q, b / c), extents)
    return FloorDiv(a, b)


def _remainder(a: Expr, b: Expr, extents: tuple[tuple[sympy.Symbol, Expr], ...]) -> Expr:
    """``a % b`` after ``(c*q + r) % (c*d) => c*(q % d) + r`` for 0 <= r < c."""
    if (split := _common_scale(a, b, dict(extents))) is not None:
        c, q, r = split
        return sympy.expand(c * _simplify(Mod(q, b / c), extents) + r)
    return Mod(a, b)


def _common_scale(a: Expr, b: Expr, ranges: Mapping[sympy.Symbol, Expr]) -> tuple[Expr, Expr, Expr] | None:
    """A factor ``c`` of ``b``, and ``a = c*q + r`` with ``0 <= r < c``; None when there is none but 1."""
    for term in Add.make_args(a):
        c = Mul(*(f for f in Mul.make_args(term) if not f.free_symbols & set(ranges) and f.is_positive))
        if b.is_Integer and c.is_Integer:
            c = sympy.gcd(b, c)
        if c == 1 or _split_multiples(b, c)[1] != 0:
            continue
        q, r = _split_multiples(a, c)
        if q != 0 and provably_less(r, c, ranges) and provably_nonnegative(r, ranges):
            return c, q, r
    return None


def _join_digits(total: Expr) -> Expr:
    """``b*(x // b) + x % b => x`` and ``a*((x // a) % b) + x % a => x % (a*b)``, for any common factor."""
    terms = list(Add.make_args(total))
    for i, low in enumerate(terms):
        mod = next((f for f in Mul.make_args(low) if isinstance(f, Mod)), None)
        if mod is None:
            continue
        factor, (x, b) = low / mod, mod.args
        for j, high in enumerate(terms):
            if i == j:
                continue
            rest = [t for n, t in enumerate(terms) if n not in (i, j)]
            if high == factor * b * FloorDiv(x, b):
                return _join_digits(Add(factor * x, *rest))
            upper = next((f for f in Mul.make_args(high) if isinstance(f, Mod)), None)
            if upper is not None and upper.args[0] == FloorDiv(x, b) and high == factor * b * upper:
                return _join_digits(Add(factor * Mod(x, b * upper.args[1]), *rest))
    return total


@dataclass(frozen=True)
class IndexMap:
    """A map from a result index ``(i0, .., i{rank-1})`` to an operand index."""

    rank: int
    exprs: tuple[Expr, ...]

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        return index_symbols(self.rank)

    def apply(self, index: Iterable[Expr]) -> tuple[Expr, ...]:
        """The operand index for a result index."""
        table = dict(zip(self.symbols, index, strict=True))
        return tuple(e.xreplace(table) for e in self.exprs)

    def is_identity(self) -> bool:
        return self.exprs == self.symbols

    def __str__(self) -> str:
        left = ", ".join(s.name for s in self.symbols)
        return f"({left}) -> ({', '.join(format_expr(e) for e in self.exprs)})"


@cache
def index_symbols(rank: int) -> tuple[sympy.Symbol, ...]:
    """``(i0, i1, ..)``"""
    return tuple(sym(f"i{n}") for n in range(rank))


def extents_of(shape: Iterable[Expr]) -> dict[sympy.Symbol, Expr]:
    """Ranges of ``i0, i1, ..`` over a shape."""
    shape = tuple(shape)
    return dict(zip(index_symbols(len(shape)), shape, strict=True))


def linear_index(index: Iterable[Expr], shape: Iterable[Expr]) -> Expr:
    """The row-major offset of ``index`` in an array of ``shape``."""
    total: Expr = Integer(0)
    for i, extent in zip(index, shape, strict=True):
        total = total * extent + i
    return sympy.expand(total)


@lru_cache(maxsize=4096)
def reshape_map(source: tuple[Expr, ...], target: tuple[Expr, ...]) -> IndexMap:
    """The index map of a row-major reshape from ``source`` to ``target``.

    Dims are matched group by group (equal products), so that untouched dims stay plain symbols.
    """
    symbols = index_symbols(len(target))
    ranges = extents_of(target)
    out: list[Expr] = []
    s = t = 0
    while s < len(source) or t < len(target):
        s0, t0 = s, t
        ps: Expr = Integer(1)
        pt: Expr = Integer(1)
        if s < len(source):
            ps, s = source[s], s + 1
        if t < len(target) and not (s0 < len(source) and ps == 1):
            pt, t = target[t], t + 1
        while sympy.expand(ps - pt) != 0:
            if t < len(target) and (s >= len(source) or _divides(pt * target[t], ps)):
                pt, t = pt * target[t], t + 1
            elif s < len(source):
                ps, s = ps * source[s], s + 1
            elif t < len(target):
                pt, t = pt * target[t], t + 1
            else:
                raise ParseError(f"cannot reshape {source} to {target}: element counts differ")
        offset = linear_index(symbols[t0:t], target[t0:t])
        digits: list[Expr] = []
        for extent in reversed(source[s0 + 1 : s]):
            digits.append(Mod(offset, extent))
            offset = FloorDiv(offset, extent)
        if s > s0:
            digits.append(offset)
        out.extend(simplify(d, ranges) for d in reversed(digits))
    return IndexMap(len(target), tuple(out))


def _divides(a: Expr, b: Expr) -> bool:
    return bool(_split_multiples(b, a)[1] == 0)
