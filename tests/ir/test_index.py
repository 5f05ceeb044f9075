"""Index arithmetic against plain Python integers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sympy import Integer

from tests.scalar_loops import evaluate_expr
from tilewright.ir.errors import ParseError
from tilewright.ir.index import (
    FloorDiv,
    IndexMap,
    Mod,
    extents_of,
    format_expr,
    linear_index,
    parse_expr,
    provably_less,
    provably_nonnegative,
    reshape_map,
    simplify,
    sym,
    upper_bound,
)

EXTENTS = {"i0": 4, "i1": 6, "i2": "B", "i3": "S"}
Tree = Any

# An expression before it is built: an integer, a symbol's name, or (operator, left, right). Divisors are positive.
divisors: st.SearchStrategy[Tree] = st.one_of(st.integers(1, 8), st.sampled_from(["B", "S"]))
trees: st.SearchStrategy[Tree] = st.recursive(
    st.one_of(st.integers(-3, 12), st.sampled_from([*EXTENTS, "B", "S"])),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*"]), inner, inner),
        st.tuples(st.sampled_from(["//", "%"]), inner, divisors),
    ),
    max_leaves=8,
)


def build(tree: Tree) -> Any:
    """The tree as an index expression, simplified as it is built."""
    if isinstance(tree, int):
        return Integer(tree)
    if isinstance(tree, str):
        return sym(tree)
    kind, a, b = tree[0], build(tree[1]), build(tree[2])
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b,
            "//": lambda: FloorDiv(a, b), "%": lambda: Mod(a, b)}[kind]()  # fmt: skip


def value_of(tree: Tree, env: dict[str, int]) -> int:
    """The tree's value in Python's own integers."""
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        return env[tree]
    a, b = value_of(tree[1], env), value_of(tree[2], env)
    return {"+": a + b, "-": a - b, "*": a * b, "//": a // b if b else 0, "%": a % b if b else 0}[tree[0]]


def points() -> Iterator[dict[str, int]]:
    """Every index in range, for several sizes of the dims."""
    for b, s in [(1, 1), (2, 3), (3, 1), (1, 5)]:
        sizes = {"B": b, "S": s}
        extents = [n if isinstance(n, int) else sizes[n] for n in EXTENTS.values()]
        for index in itertools.product(*map(range, extents)):
            yield sizes | dict(zip(EXTENTS, index, strict=True))


POINTS = list(points())[::3]
RANGES = {sym(n): Integer(e) if isinstance(e, int) else sym(e) for n, e in EXTENTS.items()}


def number(expr: Any, env: dict[str, int]) -> int:
    return int(evaluate_expr(expr, env))


@given(trees)
def test_building_and_simplifying_keep_the_value(tree: Tree) -> None:
    """A wrong rule of FloorDiv, Mod or simplify would make kernels read the wrong element."""
    built = build(tree)
    simple = simplify(built, RANGES)
    for env in POINTS[:: 1 + len(str(tree)) // 20]:
        expected = value_of(tree, env)
        assert number(built, env) == expected, (built, env)
        assert number(simple, env) == expected, (built, simple, env)


@given(trees)
def test_bounds_hold_for_every_index(tree: Tree) -> None:
    """A bound below a value that occurs would let simplify drop a modulo, or a concat pick the wrong part."""
    expr = build(tree)
    bound = upper_bound(expr, RANGES)
    less = provably_less(expr, Integer(9), RANGES)
    nonnegative = provably_nonnegative(expr, RANGES)
    for env in POINTS[::2]:
        value = value_of(tree, env)
        assert bound is None or value <= number(bound, env), (expr, bound, env)
        assert not less or value < 9, (expr, env)
        assert not nonnegative or value >= 0, (expr, env)


@given(trees)
def test_text_of_an_expression_reads_back(tree: Tree) -> None:
    """A dump could not be read, or would read back as another index."""
    for expr in (build(tree), simplify(build(tree), RANGES)):
        assert parse_expr(format_expr(expr)) == expr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(6*i0 + i1) // 6", "i0"),
        ("(6*i0 + i1) % 6", "i1"),
        ("6*(i0 // 6) + (i0 % 6)", "0*i0 + i0"),
        ("(S*i2 + i3) // S", "i2"),
        ("(S*i2 + i3) % S", "i3"),
        ("(24*i2 + 6*i0 + i1) // 24", "i2"),
        ("i1 // 2 // 3", "0"),
        ("2*(i1 // 2) + i1 % 2", "i1"),
    ],
)
def test_what_must_become_simple(text: str, expected: str) -> None:
    """Reshapes that cancel out would stay as divisions in the inner loop of a kernel."""
    assert simplify(parse_expr(text), RANGES) == parse_expr(expected)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Two shapes of the same elements: each groups the same row of factors in its own way."""
    factors = draw(
        st.lists(st.sampled_from([Integer(1), Integer(2), Integer(3), sym("B"), sym("S")]), max_size=5)
    )

    def grouped() -> tuple[Any, ...]:
        out = []
        for factor in factors:
            if out and draw(st.booleans()):
                out[-1] = out[-1] * factor
            else:
                out.append(factor)
            if draw(st.integers(0, 4)) == 0:
                out.append(Integer(1))
        return tuple(out)

    return grouped(), grouped()


@given(reshapes(), st.sampled_from([(1, 1), (2, 3), (3, 4)]))
def test_reshape_map_is_a_reshape(shapes: tuple[Any, Any], sizes: tuple[int, int]) -> None:
    """Heads split off or merged at the wrong place."""
    dims = {"B": sizes[0], "S": sizes[1]}
    source, target = shapes
    index_map = reshape_map(source, target)
    source_sizes, target_sizes = ([number(d, dims) for d in shape] for shape in shapes)
    x = torch.arange(math.prod(source_sizes)).reshape(source_sizes)
    y = x.reshape(target_sizes)
    for index in itertools.product(*map(range, target_sizes)):
        env = dims | {f"i{n}": i for n, i in enumerate(index)}
        at = tuple(number(e, env) for e in index_map.exprs)
        assert all(0 <= i < n for i, n in zip(at, source_sizes, strict=True))
        assert x[at] == y[index]


def test_reshape_keeps_untouched_dims_plain() -> None:
    """A split of heads would put divisions by B and S into every later index."""
    b, s = sym("B"), sym("S")
    split = reshape_map((b, s, Integer(8)), (b, s, Integer(2), Integer(4)))
    assert str(split) == "(i0, i1, i2, i3) -> (i0, i1, 4*i2 + i3)"
    merged = reshape_map((b, s, Integer(2), Integer(4)), (b * s, Integer(8)))
    assert str(merged) == "(i0, i1) -> ((i0 // S), (i0 % S), (i1 // 4), (i1 % 4))"


def test_reshape_of_other_size_is_refused() -> None:
    """Elements would be read twice or never, silently."""
    with pytest.raises(ParseError, match="element counts differ"):
        reshape_map((Integer(6),), (Integer(4),))


@given(reshapes())
def test_reshape_there_and_back_is_the_identity(shapes: tuple[Any, Any]) -> None:
    """Views that cancel would stay as index arithmetic."""
    source, target = shapes
    there, back = reshape_map(source, target), reshape_map(target, source)
    exprs = there.apply(back.exprs)
    expected = tuple(Integer(0) if d == 1 else i for i, d in zip(back.symbols, source, strict=True))
    ranges = extents_of(source)
    simple = tuple(Integer(0) if d == 1 else simplify(e, ranges) for e, d in zip(exprs, source, strict=True))
    assert simple == expected


def test_linear_index_and_index_map() -> None:
    """Strides in the wrong order."""
    i, j = sym("i0"), sym("i1")
    assert linear_index((i, j), (Integer(3), sym("S"))) == sym("S") * i + j
    swap = IndexMap(2, (j, i))
    assert swap.apply((Integer(5), i)) == (i, Integer(5))
    assert not swap.is_identity()
    assert IndexMap(2, (i, j)).is_identity()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "i0 +",
        "i0 / 2",
        "f(i0)",
        "i0 // 0",
        "i0 % 0",
        "1.5",
        "True",
        "i0[1]",
        "2 ** i0",
        "(",
        "a b",
        "é\x00",
    ],
)
def test_malformed_expressions(text: str) -> None:
    """Bad text would surface as a TypeError far from its cause."""
    with pytest.raises(ParseError):
        parse_expr(text)
