"""A random function and the tools that moves add ops with. See ``strategies`` for what the ops promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import sympy
from hypothesis import strategies as st
from sympy import Integer

from tilewright.ir.builder import Builder
from tilewright.ir.index import IndexMap, index_symbols, reshape_map, sym
from tilewright.ir.module import Function, Loc, Module
from tilewright.ir.types import DType, TensorType, Value, concrete

LIMIT = 64.0
"""Values beyond this are squashed, so that no chain of ops overflows or loses its digits."""
LARGEST = 2048
"""Most elements of a value, at the largest dims."""


class Spec(NamedTuple):
    """What is known of a value: it lies in [low, high]; ``raw`` ones are exact in every dtype, so may be compared."""

    low: float
    high: float
    raw: bool = True

    @property
    def size(self) -> float:
        return max(abs(self.low), abs(self.high))


class RandomFunction:
    """A function under construction. ``grow`` draws moves, each as often as its number in ``moves`` says; ``weights``
    and ``slots`` tell what it needs at run time."""

    def __init__(
        self,
        draw: st.DrawFn,
        dtype: DType,
        ranges: Mapping[str, tuple[int, int]],
        moves: Mapping[Move, int],
        stateful: bool = False,
        flips: bool = True,
    ) -> None:
        self.draw = draw
        self.dtype = dtype
        self.highs = {name: high for name, (_, high) in ranges.items()}
        self.stateful = stateful
        self.flips = flips
        self.builder = Builder()
        self.specs: dict[Value, Spec] = {}
        self.pool: list[Value] = []
        self.weights: dict[str, tuple[TensorType, Spec]] = {}
        self.slots: dict[str, TensorType] = {}
        self.calls_state = False
        self.moves = [move for move, weight in moves.items() for _ in range(weight)]

    def pick(self, options: object) -> object:
        """One of a non-empty sequence."""
        return self.draw(st.sampled_from(options))  # type: ignore[arg-type]

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def add(
        self, opcode: str, *operands: Value, spec: Spec, type: TensorType | None = None, **attrs: object
    ) -> Value:
        value = self.builder.add(opcode, *operands, type=type, **attrs)  # type: ignore[arg-type]
        self.specs[value] = spec if spec.raw else Spec(spec.low, spec.high, not value.dtype.is_float)
        return value

    def input(self, name: str, type: TensorType, spec: Spec) -> Value:
        """A parameter of the function."""
        value = self.builder.param_value(name, type)
        self.specs[value] = spec
        self.pool.append(value)
        return value

    def weight(self, type: TensorType, spec: Spec = Spec(-1, 1)) -> Value:
        """A new weight, or one that the function already uses."""
        known = [n for n, (t, s) in self.weights.items() if (t, s) == (type, spec)]
        reuse = known and self.number(0, 2) == 0
        name = known[0] if reuse else f"w{len(self.weights)}.weight"
        self.weights[name] = (type, spec)
        return self.add("param", type=type, spec=spec, name=name)

    def const(self, value: float | int | bool, dtype: DType) -> Value:
        out = self.builder.const(value, dtype)
        self.specs[out] = Spec(float(value), float(value))
        return out

    def numel(self, shape: tuple[sympy.Expr, ...]) -> int:
        return math.prod(concrete(shape, self.highs))

    def choose(self, fits: Callable[[Value], bool]) -> Value | None:
        """A fitting value of the pool, most often a recent one."""
        found = [v for v in self.pool if fits(v)]
        if not found:
            return None
        return self.pick(found[-3:] if self.number(0, 3) else found)  # type: ignore[return-value]

    def floats(self, fits: Callable[[Value], bool] = lambda v: True) -> Value | None:
        return self.choose(lambda v: v.dtype.is_float and fits(v))

    def bounded(self, value: Value, limit: float = LIMIT) -> Value:
        """``value`` itself when it lies within the limit, else squashed into it."""
        spec = self.specs[value]
        if spec.size <= limit:
            return value
        if not value.dtype.is_float:
            return self.add("mod", value, self.const(7, value.dtype), spec=Spec(0, 6))
        if self.number(0, 1):
            return self.add("tanh", value, spec=Spec(-1, 1, False))
        scale = 2.0 ** -math.ceil(math.log2(spec.size / limit))
        factor = self.const(scale, value.dtype)
        return self.add("mul", value, factor, spec=Spec(spec.low * scale, spec.high * scale, False))

    def cast(self, value: Value, dtype: DType) -> Value:
        if value.dtype is dtype:
            return value
        spec = self.specs[value]
        if dtype is DType.bool:
            spec = Spec(0, 1)
        elif not dtype.is_float:
            spec = Spec(math.floor(spec.low), math.ceil(spec.high))
        return self.add("cast", value, type=value.type.with_dtype(dtype), spec=spec)

    def view(self, value: Value, shape: tuple[sympy.Expr, ...], index_map: IndexMap) -> Value:
        return self.add(
            "view", value, type=TensorType(value.dtype, shape), spec=self.specs[value], map=index_map
        )

    def reshape(self, value: Value, shape: tuple[sympy.Expr, ...]) -> Value:
        if shape == value.shape:
            return value
        return self.view(value, shape, reshape_map(value.shape, shape))

    def permute(self, value: Value, order: tuple[int, ...]) -> Value:
        symbols = index_symbols(len(order))
        exprs = tuple(symbols[order.index(n)] for n in range(len(order)))
        return self.view(value, tuple(value.shape[n] for n in order), IndexMap(len(order), exprs))

    def slice(self, value: Value, axis: int, start: int, length: int, step: int = 1) -> Value:
        exprs = list(index_symbols(value.type.rank))
        exprs[axis] = start + step * exprs[axis]
        shape = (*value.shape[:axis], Integer(length), *value.shape[axis + 1 :])
        return self.view(value, shape, IndexMap(len(shape), tuple(exprs)))

    def grow(self, count: int) -> None:
        """Draw ``count`` moves."""
        for _ in range(count):
            move = self.pick(self.moves)
            if self.number(0, 3) == 0:
                self.builder.loc = Loc(f"block.{self.number(0, 2)}", f"model.py:{self.number(1, 99)}")
            value = move(self)  # type: ignore[operator]
            if value is not None:
                self.pool.append(self.bounded(value))

    def shaped(self, type: TensorType) -> Value:
        """A value of the given type that depends on the newest values: cast, broadcast or summed into it."""
        value = self.pool[-1]
        if value.type == type:
            return value
        value = self.cast(value, type.dtype)
        if value.shape != type.shape:
            value = self._broadcastable(value, type.shape)
            zero = next((v for v in self.pool if v.type == type), None) or self.weight_like(type)
            total = self.combined(self.specs[zero], self.specs[value], lambda a, b: a + b)
            value = self.add("add", zero, value, spec=total)
        return value

    def weight_like(self, type: TensorType) -> Value:
        """A constant spread over a type with symbolic dims."""
        one = self.const(0.5, type.dtype)
        return self.view(one, type.shape, IndexMap(type.rank, ()))

    def _broadcastable(self, value: Value, shape: tuple[sympy.Expr, ...]) -> Value:
        """``value`` summed over those dims that do not broadcast into ``shape``."""
        offset = len(shape) - value.type.rank
        if offset < 0:
            axes = tuple(range(value.type.rank))
        else:
            axes = tuple(n for n, d in enumerate(value.shape) if d != 1 and d != shape[n + offset])
        if not axes:
            return value
        value = self.bounded(self.reduced(value, "sum", axes, keepdim=offset >= 0), 4)
        return value

    def finish(self, name: str, first: TensorType | None = None) -> Function:
        """The function; it returns its newest value (as type ``first``, when given) and up to two others."""
        if first is not None:
            returns = [self.bounded(self.shaped(first), 4)]
        else:
            returns = [next(v for v in reversed(self.pool) if not any(d.has(sym("T")) for d in v.shape))]
        # What grows with the context lives in the request's state and mask; nothing of the kind is returned.
        others = [v for v in self.pool if not any(d.has(sym("T")) for d in v.shape)]
        returns += [self.pick(others) for _ in range(self.number(0, 2))]  # type: ignore[misc]
        return Function(
            name, tuple(self.builder.params), tuple(self.builder.ops), tuple(dict.fromkeys(returns))
        )

    def call(self, functions: list[Function], callee: str, operands: tuple[Value, ...], scope: str) -> Value:
        """Call a function that gives back the type of its first operand; its result joins the pool."""
        module = Module(tuple(functions))
        results = self.builder.add_multi("call", *operands, module=module, callee=callee, scope=scope)
        for value in results:
            self.specs[value] = Spec(-LIMIT, LIMIT, raw=False)
        self.specs[results[0]] = Spec(-4, 4, raw=False)
        # Integers of a layer have an unknown range; they may be returned but index nothing.
        self.pool += [v for v in reversed(results) if v.dtype.is_float]
        return results[0]

    @staticmethod
    def combined(a: Spec, b: Spec, rule: Callable[[float, float], float], raw: bool = False) -> Spec:
        corners = [rule(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
        return Spec(min(corners), max(corners), raw)

    def reduced(self, x: Value, kind: str, axes: tuple[int, ...], keepdim: bool) -> Value:
        count = math.prod(concrete(tuple(x.shape[n] for n in axes), self.highs))
        spec = self.specs[x]
        if kind == "sum":
            spec = Spec(min(spec.low * count, spec.low), max(spec.high * count, spec.high), False)
        elif kind == "prod":
            spec = Spec(-max(spec.size**count, 1), max(spec.size**count, 1), False)
        return self.add("reduce", x, spec=spec, kind=kind, axes=axes, keepdim=keepdim)


Move = Callable[[RandomFunction], Value | None]
"""Adds ops to a function and gives their result, or None where nothing fits."""
