"""Draws the ops of one random function. See ``strategies`` for what the ops promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import sympy
from hypothesis import strategies as st
from sympy import Integer

from tilewright.ir.index import IndexMap, index_symbols, reshape_map, sym
from tilewright.ir.module import Function, Loc, Module
from tilewright.ir.ops import Builder, broadcast
from tilewright.ir.recurrent import wide
from tilewright.ir.types import DType, TensorType, Value, concrete, tensor_type

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
    """A function under construction. ``grow`` draws moves; ``weights`` and ``slots`` tell what it needs at run time."""

    def __init__(
        self,
        draw: st.DrawFn,
        dtype: DType,
        ranges: Mapping[str, tuple[int, int]],
        attention: bool = True,
        stateful: bool = False,
        torch_calls: bool = True,
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
        moves: dict[Callable[[], Value | None], int] = {
            self._unary: 3, self._binary: 4, self._reduce: 2, self._view: 4, self._concat: 2, self._gather: 1,
            self._linear: 3, self._batched_matmul: 1, self._softmax: 1, self._norm: 1, self._rotary: 1,
            self._gated: 1, self._integer: 1, self._compare: 1, self._select: 1, self._cast: 1, self._row_scale: 1,
        }  # fmt: skip
        if attention:
            moves[self._attention] = 2
        if stateful:
            moves[self._recurrent] = 1
        if torch_calls:
            moves[self._torch] = 1
        self.moves = [move for move, weight in moves.items() for _ in range(weight)]

    # -- small tools -------------------------------------------------------------------------------------------

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

    # -- the function as a whole -------------------------------------------------------------------------------

    def grow(self, count: int) -> None:
        """Draw ``count`` moves."""
        for _ in range(count):
            move = self.pick(self.moves)
            if self.number(0, 3) == 0:
                self.builder.loc = Loc(f"block.{self.number(0, 2)}", f"model.py:{self.number(1, 99)}")
            value = move()  # type: ignore[operator]
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
            total = self._range(self.specs[zero], self.specs[value], lambda a, b: a + b)
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
        value = self.bounded(self._reduced(value, "sum", axes, keepdim=offset >= 0), 4)
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

    # -- moves: pointwise --------------------------------------------------------------------------------------

    def _unary(self) -> Value | None:
        x = self.floats()
        if x is None:
            return None
        spec, no = self.specs[x], False
        opcode = self.pick(
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
                "pow",
                "div",
            )
        )
        match opcode:
            case "neg":
                return self.add("neg", x, spec=Spec(-spec.high, -spec.low, spec.raw))
            case "abs":
                return self.add("abs", x, spec=Spec(0, spec.size, spec.raw))
            case "exp":
                x = self.bounded(x, 4)
                return self.add("exp", x, spec=Spec(0, math.exp(self.specs[x].high), no))
            case "floor":
                if not spec.raw:
                    return None
                return self.add("floor", x, spec=Spec(math.floor(spec.low), math.floor(spec.high)))
            case "sin" | "cos" | "tanh" | "erf":
                return self.add(opcode, x, spec=Spec(-1, 1, no))
            case "sigmoid":
                return self.add("sigmoid", x, spec=Spec(0, 1, no))
        positive = self._positive(x)
        high = self.specs[positive].high
        match opcode:
            case "log":
                return self.add("log", positive, spec=Spec(-1, max(math.log(high), 1), no))
            case "sqrt":
                return self.add("sqrt", positive, spec=Spec(0, math.sqrt(high), no))
            case "rsqrt":
                return self.add("rsqrt", positive, spec=Spec(0, 1.5, no))
            case "pow":
                exponent = self.pick((2.0, 0.5, -0.5, 1.0, 3.0))
                return self.add(
                    "pow", positive, self.const(exponent, x.dtype), spec=Spec(0, max(high**exponent, 2), no)
                )
        return self.add("div", self.const(1.0, x.dtype), positive, spec=Spec(0, 2, no))

    def _positive(self, x: Value) -> Value:
        """``|x| + 0.5``"""
        size = self.specs[x].size
        absolute = self.add("abs", x, spec=Spec(0, size))
        return self.add("add", absolute, self.const(0.5, x.dtype), spec=Spec(0.5, size + 0.5, False))

    @staticmethod
    def _range(a: Spec, b: Spec, rule: Callable[[float, float], float], raw: bool = False) -> Spec:
        corners = [rule(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
        return Spec(min(corners), max(corners), raw)

    def _partner(self, x: Value) -> Value:
        """A second operand of x's dtype that broadcasts with it: x itself, a constant, a weight, or another value."""
        kind = self.pick(("value", "value", "value", "const", "weight", "same"))
        if kind == "value":
            other = self.choose(lambda v: v.dtype is x.dtype and self._fits(v, x))
            if other is not None:
                return other
        if kind == "weight" and x.dtype.is_float:
            tail = [Integer(1) if d.free_symbols or self.number(0, 3) == 0 else d for d in x.shape]
            return self.weight(TensorType(x.dtype, tuple(tail[self.number(0, len(tail)) :])))
        if kind == "const" or kind == "weight":
            if x.dtype is DType.bool:
                return self.const(bool(self.number(0, 1)), x.dtype)
            options = (2.0, -0.5, 1.0, 0.0, 0.25) if x.dtype.is_float else (0, 1, 2, 3)
            return self.const(self.pick(options), x.dtype)  # type: ignore[arg-type]
        return x

    def _fits(self, v: Value, x: Value) -> bool:
        pairs = zip(reversed(v.shape), reversed(x.shape), strict=False)
        if not all(a == b or a == 1 or b == 1 for a, b in pairs):
            return False
        return self.numel(broadcast([v.shape, x.shape])) <= LARGEST

    def _binary(self) -> Value | None:
        x = self.choose(lambda v: v.dtype is not DType.bool)
        if x is None:
            return None
        y = self._partner(x)
        if self.number(0, 1):
            x, y = y, x
        a, b = self.specs[x], self.specs[y]
        opcode = self.pick(("add", "sub", "mul", "maximum", "minimum", "div"))
        raw = a.raw and b.raw
        match opcode:
            case "add":
                return self.add("add", x, y, spec=self._range(a, b, lambda p, q: p + q))
            case "sub":
                return self.add("sub", x, y, spec=self._range(a, b, lambda p, q: p - q))
            case "mul":
                return self.add("mul", x, y, spec=self._range(a, b, lambda p, q: p * q))
            case "maximum" | "minimum":
                spec = self._range(a, b, max if opcode == "maximum" else min, raw)
                return self.add(opcode, x, y, spec=spec)
        if x.dtype.is_float:
            return self.add("div", x, self._positive(y), spec=Spec(-2 * a.size, 2 * a.size, False))
        divisor = self.const(self.number(1, 4), x.dtype)
        opcode = self.pick(("div", "mod"))
        if opcode == "div":
            return self.add("div", x, divisor, spec=Spec(math.floor(min(a.low, 0)), max(a.high, 0)))
        return self.add("mod", x, divisor, spec=Spec(0, 3))

    def _row_scale(self) -> Value | None:
        """x times one number a row: what may be moved past a matmul."""
        x = self.floats(lambda v: v.type.rank >= 2)
        if x is None:
            return None
        square = self.add("mul", x, x, spec=Spec(0, self.specs[x].size ** 2, False))
        total = self.bounded(self._reduced(square, "sum", (x.type.rank - 1,), keepdim=True))
        factor = self.add("rsqrt", self._positive(total), spec=Spec(0, 1.5, False))
        scaled = self.add(
            "mul", x, factor, spec=Spec(-1.5 * self.specs[x].size, 1.5 * self.specs[x].size, False)
        )
        return self._project(scaled, self.number(1, 4)) if self.number(0, 1) else scaled

    def _integer(self) -> Value | None:
        """New integers: positions, dims, or integers of a float that no rewrite rounds."""
        kind = self.pick(("iota", "dim", "cast"))
        if kind == "iota":
            n = self.pick((sym("S"), sym("B"), Integer(4), Integer(6)))
            high = concrete((n,), self.highs)[0] - 1  # type: ignore[arg-type]
            return self.add("iota", type=tensor_type("i64", [n]), spec=Spec(0, high))  # type: ignore[list-item]
        if kind == "dim":
            expr = self.pick((sym("S"), sym("B"), sym("B") * sym("S"), sym("S") + 1))
            high = concrete((expr,), self.highs)[0]  # type: ignore[arg-type]
            return self.add("dim", type=tensor_type("i64"), spec=Spec(1, high), expr=expr)
        x = self.choose(lambda v: self.specs[v].raw)
        return None if x is None else self.cast(x, DType(self.pick(("i64", "i32"))))

    def _compare(self) -> Value | None:
        x = self.choose(lambda v: self.specs[v].raw)
        if x is None:
            return None
        y = self._partner(x)
        if not self.specs[y].raw:
            return None
        if x.dtype is DType.bool:
            z = self.add(self.pick(("and", "or", "xor", "eq", "ne")), x, y, spec=Spec(0, 1))  # type: ignore[arg-type]
            return self.add("not", z, spec=Spec(0, 1)) if self.number(0, 1) else z
        return self.add(self.pick(("eq", "ne", "lt", "le", "gt", "ge")), x, y, spec=Spec(0, 1))  # type: ignore[arg-type]

    def _select(self) -> Value | None:
        x = self.floats(lambda v: v.type.rank >= 1)
        if x is None:
            return None
        condition = self.choose(lambda v: v.dtype is DType.bool and self._fits(v, x))
        if condition is None:
            last = self.add("iota", type=TensorType(DType.i64, x.shape[-1:]), spec=Spec(0, LIMIT))
            condition = self.add("ge", last, self.const(self.number(0, 2), DType.i64), spec=Spec(0, 1))
        y = self._partner(x)
        if (
            not self._fits(condition, y)
            or self.numel(broadcast([condition.shape, x.shape, y.shape])) > LARGEST
        ):
            return None
        a, b = self.specs[x], self.specs[y]
        spec = Spec(min(a.low, b.low), max(a.high, b.high), a.raw and b.raw)
        return self.add("where", condition, x, y, spec=spec)

    def _cast(self) -> Value | None:
        """To another float dtype and back, or from an integer or boolean to float."""
        x = self.choose(lambda v: True)
        if x is None:
            return None
        if not x.dtype.is_float or x.dtype is not self.dtype:
            return self.cast(x, self.dtype)
        other = self.pick((DType.f32, DType.bf16, DType.f64))
        narrowed = self.cast(x, other)  # type: ignore[arg-type]
        return narrowed if self.number(0, 2) == 0 else self.cast(narrowed, self.dtype)

    # -- moves: data movement ----------------------------------------------------------------------------------

    def _view(self) -> Value | None:
        x = self.choose(lambda v: v.type.rank >= 1)
        if x is None:
            return None
        for _ in range(self.number(1, 2)):
            x = self._one_view(x)
        return x

    def _one_view(self, x: Value) -> Value:
        rank, shape = x.type.rank, x.shape
        kinds = ["insert"] + (["merge", "permute"] if rank >= 2 else []) + (["expand"] if rank <= 3 else [])
        static = [n for n, d in enumerate(shape) if d.is_Integer and d > 1]
        kinds += ["split", "slice", "half"] * bool(static) + ["squeeze"] * (Integer(1) in shape)
        kinds += ["last"] * any(not d.is_Integer for d in shape) + ["flip"] * (self.flips and rank > 0)
        kind = self.pick(kinds)
        axis: int = self.number(0, max(rank - 1, 0))
        if kind == "permute":
            return self.permute(x, tuple(self.draw(st.permutations(range(rank)))))
        if kind == "merge":
            axis = self.number(0, rank - 2)
            return self.reshape(
                x, (*shape[:axis], sympy.expand(shape[axis] * shape[axis + 1]), *shape[axis + 2 :])
            )
        if kind == "insert":
            return self.reshape(x, (*shape[:axis], Integer(1), *shape[axis:]))
        if kind == "squeeze":
            return self.reshape(x, tuple(d for d in shape if d != 1))
        if kind == "expand":
            return self._expand(x, axis)
        if kind in ("split", "slice", "half"):
            axis = self.pick(static)  # type: ignore[assignment]
            n = int(shape[axis])
            if kind == "slice":
                start, step = self.number(0, n - 1), self.number(1, 2)
                return self.slice(x, axis, start, self.number(1, 1 + (n - 1 - start) // step), step)
            if kind == "half" and n % 2 == 0:
                return self.slice(x, axis, n // 2 * self.number(0, 1), n // 2)
            factor = Integer(self.pick([f for f in range(1, n + 1) if n % f == 0]))
            return self.reshape(x, (*shape[:axis], factor, Integer(n // factor), *shape[axis + 1 :]))
        exprs = list(index_symbols(rank))
        if kind == "flip":
            exprs[axis] = shape[axis] - 1 - exprs[axis]
            return self.view(x, shape, IndexMap(rank, tuple(exprs)))
        axis = self.pick([n for n, d in enumerate(shape) if not d.is_Integer])  # type: ignore[assignment]
        exprs[axis] = shape[axis] - 1
        return self.view(x, (*shape[:axis], Integer(1), *shape[axis + 1 :]), IndexMap(rank, tuple(exprs)))

    def _expand(self, x: Value, axis: int) -> Value:
        """Repeat along a new axis, or along one of size 1."""
        extent = self.pick((sym("B"), sym("S"), Integer(2), Integer(3)))
        if self.numel(x.shape) * concrete((extent,), self.highs)[0] > LARGEST:  # type: ignore[arg-type]
            return x
        if x.type.rank > axis and x.shape[axis] == 1:
            exprs = list(index_symbols(x.type.rank))
            exprs[axis] = Integer(0)
            shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
            return self.view(x, shape, IndexMap(len(shape), tuple(exprs)))  # type: ignore[arg-type]
        symbols = index_symbols(x.type.rank + 1)
        shape = (*x.shape[:axis], extent, *x.shape[axis:])
        return self.view(x, shape, IndexMap(len(shape), (*symbols[:axis], *symbols[axis + 1 :])))  # type: ignore[arg-type]

    def _concat(self) -> Value | None:
        x = self.choose(lambda v: v.type.rank >= 1)
        if x is None:
            return None
        axis = self.number(0, x.type.rank - 1)
        parts = [x]
        for _ in range(self.number(0, 2)):
            other = self.choose(
                lambda v: (
                    v.dtype is x.dtype
                    and v.type.rank == x.type.rank
                    and all(
                        a == b for n, (a, b) in enumerate(zip(v.shape, x.shape, strict=True)) if n != axis
                    )
                )
            )
            if other is not None:
                parts.insert(self.number(0, len(parts)), other)
        if sum(self.numel(v.shape) for v in parts) > LARGEST:
            return None
        known = [self.specs[v] for v in parts]
        spec = Spec(min(s.low for s in known), max(s.high for s in known), all(s.raw for s in known))
        return self.add("concat", *parts, spec=spec, axis=axis)

    def _gather(self) -> Value | None:
        index = self.choose(lambda v: v.dtype.is_int and self.specs[v].low >= 0 and self.specs[v].high < 12)
        if index is None:
            index = self.add("iota", type=tensor_type("i64", [self.number(1, 5)]), spec=Spec(0, 4))
        rows = int(self.specs[index].high) + 1
        table = self.floats(lambda v: any(d.is_Integer and d >= rows for d in v.shape))
        if table is None or self.number(0, 2):
            table = self.weight(tensor_type(self.dtype, [rows + self.number(0, 2), self.number(1, 6)]))
            self.pool.append(table)
        axis = self.pick([n for n, d in enumerate(table.shape) if d.is_Integer and d >= rows])
        if self.numel(table.shape) * self.numel(index.shape) > LARGEST:
            return None
        return self.add("gather", table, index, spec=self.specs[table], axis=axis)

    # -- moves: reductions and products ------------------------------------------------------------------------

    def _reduced(self, x: Value, kind: str, axes: tuple[int, ...], keepdim: bool) -> Value:
        count = math.prod(concrete(tuple(x.shape[n] for n in axes), self.highs))
        spec = self.specs[x]
        if kind == "sum":
            spec = Spec(min(spec.low * count, spec.low), max(spec.high * count, spec.high), False)
        elif kind == "prod":
            spec = Spec(-max(spec.size**count, 1), max(spec.size**count, 1), False)
        return self.add("reduce", x, spec=spec, kind=kind, axes=axes, keepdim=keepdim)

    def _reduce(self) -> Value | None:
        x = self.choose(lambda v: v.type.rank >= 1)
        if x is None:
            return None
        axes = {self.number(0, x.type.rank - 1) for _ in range(self.number(1, 2))}
        keepdim = bool(self.number(0, 1))
        if x.dtype is DType.bool:
            return self._reduced(x, str(self.pick(("any", "all"))), tuple(sorted(axes)), keepdim)
        kinds = ["sum", "sum", "max", "min"]
        if math.prod(concrete(tuple(x.shape[n] for n in axes), self.highs)) <= 4 and self.specs[x].size <= 2:
            kinds.append("prod")
        return self._reduced(x, str(self.pick(kinds)), tuple(sorted(axes)), keepdim)

    def _project(self, x: Value, n: int, b: Value | None = None) -> Value:
        weight = b or self.weight(TensorType(x.dtype, (Integer(n), x.shape[-1])))
        k = concrete((x.shape[-1],), self.highs)[0]
        size = k * self.specs[x].size * self.specs[weight].size
        return self.add("matmul", x, weight, spec=Spec(-size, size, False))

    def _linear(self) -> Value | None:
        x = self.floats(
            lambda v: v.type.rank >= 1 and v.shape[-1].is_Integer and self.numel(v.shape[:-1]) <= 256
        )
        if x is None:
            return None
        y = self.bounded(self._project(x, self.number(1, 8)))
        if self.number(0, 1):
            bias = self.weight(TensorType(x.dtype, y.shape[-1:]))
            y = self.add("add", y, bias, spec=self._range(self.specs[y], Spec(-1, 1), lambda a, b: a + b))
        if self.number(0, 2) == 0:
            self.pool.append(y)
            return self._project(x, self.number(1, 4))
        return y

    def _batched_matmul(self) -> Value | None:
        x = self.floats(lambda v: v.type.rank >= 2)
        y = self.floats(
            lambda v: (
                x is not None
                and v.dtype is x.dtype
                and v.type.rank >= 2
                and v.shape[-1] == x.shape[-1]
                and (v.type.rank == 2 or v.shape[:-2] == x.shape[:-2])
                and self.numel((*x.shape[:-1], v.shape[-2])) <= LARGEST
            )
        )
        return None if x is None or y is None else self._project(x, 0, y)

    # -- moves: idioms -----------------------------------------------------------------------------------------

    def _softmax(self) -> Value | None:
        x = self.floats(lambda v: v.type.rank >= 1)
        if x is None:
            return None
        axes = (x.type.rank - 1,)
        size = self.specs[x].size
        top = self._reduced(x, "max", axes, keepdim=True)
        e = self.add("exp", self.add("sub", x, top, spec=Spec(-2 * size, 0, False)), spec=Spec(0, 1, False))
        total = self._reduced(e, "sum", axes, keepdim=True)
        return self.add("div", e, total, spec=Spec(0, 1, False))

    def _norm(self) -> Value | None:
        """LayerNorm with a weight."""
        x = self.floats(lambda v: v.type.rank >= 1 and v.shape[-1].is_Integer)
        if x is None:
            return None
        axes, size, n = (x.type.rank - 1,), self.specs[x].size, int(x.shape[-1])
        inverse = self.const(1 / n, x.dtype)
        mean = self._reduced(x, "sum", axes, keepdim=True)
        mean = self.add("mul", mean, inverse, spec=Spec(-size, size, False))
        centred = self.add("sub", x, mean, spec=Spec(-2 * size, 2 * size, False))
        square = self.add("mul", centred, centred, spec=Spec(0, 4 * size**2, False))
        variance = self._reduced(square, "sum", axes, keepdim=True)
        variance = self.add("mul", variance, inverse, spec=Spec(0, 4 * size**2, False))
        shifted = self.add(
            "add", variance, self.const(0.125, x.dtype), spec=Spec(0.125, 4 * size**2 + 1, False)
        )
        scale = self.add("rsqrt", shifted, spec=Spec(0, 3, False))
        y = self.add("mul", centred, scale, spec=Spec(-math.sqrt(n), math.sqrt(n), False))
        weight = self.weight(TensorType(x.dtype, x.shape[-1:]))
        return self.add("mul", y, weight, spec=self.specs[y])

    def _rotary(self) -> Value | None:
        """x * cos + rotate_half(x) * sin, the angles from positions."""
        x = self.floats(lambda v: v.type.rank >= 2 and v.shape[-1].is_Integer and v.shape[-1] % 2 == 0)
        if x is None:
            return None
        axis, half = x.type.rank - 1, int(x.shape[-1]) // 2
        size = self.specs[x].size
        positions = self.add("iota", type=TensorType(DType.i64, x.shape[-2:-1]), spec=Spec(0, LIMIT))
        angle = self.reshape(self.cast(positions, x.dtype), (x.shape[-2], Integer(1)))
        frequency = self.weight(tensor_type(x.dtype, [2 * half]))
        angle = self.add("mul", angle, frequency, spec=Spec(-LIMIT, LIMIT, False))
        cos, sin = (self.add(name, angle, spec=Spec(-1, 1, False)) for name in ("cos", "sin"))
        back = self.slice(x, axis, half, half)
        back = self.add("neg", back, spec=Spec(-size, size, False))
        turned = self.add(
            "concat", back, self.slice(x, axis, 0, half), spec=Spec(-size, size, False), axis=axis
        )
        straight = self.add("mul", x, cos, spec=Spec(-size, size, False))
        turned = self.add("mul", turned, sin, spec=Spec(-size, size, False))
        return self.add("add", straight, turned, spec=Spec(-2 * size, 2 * size, False))

    def _gated(self) -> Value | None:
        """silu(gate(x)) * up(x), the two halves of one product."""
        x = self.floats(
            lambda v: v.type.rank >= 1 and v.shape[-1].is_Integer and self.numel(v.shape[:-1]) <= 256
        )
        if x is None:
            return None
        n = self.number(1, 4)
        both = self.bounded(self._project(x, 2 * n), 8)
        axis = both.type.rank - 1
        gate, up = (self.slice(both, axis, start, n) for start in (0, n))
        gate = self.add("mul", gate, self.add("sigmoid", gate, spec=Spec(0, 1, False)), spec=self.specs[both])
        return self.add("mul", gate, up, spec=Spec(-64, 64, False))

    def _attention(self) -> Value | None:
        """Projections of x to heads, attention with grouped keys, and back to [B, S, H * D]."""
        s, b = sym("S"), sym("B")
        x = self.floats(lambda v: v.type.rank == 3 and v.shape[:2] == (b, s) and v.shape[2].is_Integer)
        if x is None:
            return None
        groups, d = self.number(1, 2), Integer(self.pick((2, 4)))
        heads = groups * self.number(1, 2)

        def heads_of(count: int, size: sympy.Expr) -> Value:
            flat = self.bounded(self._project(x, count * int(size)), 4)
            return self.permute(self.reshape(flat, (b, s, Integer(count), size)), (0, 2, 1, 3))

        dv = Integer(self.pick((2, 4))) if self.number(0, 3) == 0 else d
        q, k, v = heads_of(heads, d), heads_of(groups, d), heads_of(groups, dv)
        slot = f"kv{len(self.slots)}" if self.stateful and self.number(0, 2) else ""
        length = sym("T") if slot else s
        if slot:
            self.slots |= {f"{slot}.k": k.type, f"{slot}.v": v.type}
        extras: dict[str, Value] = {}
        masks = [m for m in self.builder.params if m.dtype is DType.bool and m.shape == (b, length)]
        if masks and self.number(0, 1):
            extras["mask"] = masks[0]
        for name, dtype in (("sinks", q.dtype), ("slopes", DType.f32)):
            if self.number(0, 3) == 0:
                extras[name] = self.weight(TensorType(dtype, q.shape[1:2]))
        if self.number(0, 3) == 0:
            columns = Integer(self.pick((1, 3, 5)))
            extras["distances"] = self.weight(TensorType(DType.f32, (q.shape[1], columns)))
        causal = bool(self.number(0, 1))
        out = self.add(
            "attention", q, k, v, *extras.values(), extras=tuple(extras) or None, spec=Spec(-4, 4, False),
            scale=float(d) ** -0.5, causal=causal, window=self.pick((0, 0, 2, 3)),
            softcap=float(self.pick((0, 0, 5))), slot=slot,  # type: ignore[arg-type]
        )  # fmt: skip
        flat = self.permute(out, (0, 2, 1, 3))
        return self.reshape(flat, (b, s, heads * dv))

    def _recurrent(self) -> Value | None:
        """A convolution over the last tokens, or a scan whose state decays, of [B, S, C]."""
        x = self.floats(
            lambda v: v.type.rank == 3 and v.shape[:2] == (sym("B"), sym("S")) and v.shape[2].is_Integer
        )
        if x is None:
            return None
        x, slot = self.bounded(x, 4), f"recurrent{len(self.slots)}"
        if self.number(0, 1):
            taps = Integer(self.number(2, 4))
            operands = [x, self.weight(TensorType(x.dtype, (taps, x.shape[2])))]
            operands += [self.weight(TensorType(x.dtype, x.shape[2:]))] if self.number(0, 1) else []
            y, state = self.builder.add_multi("causal_conv1d", *operands, slot=slot)
            size = 4.0 * int(taps) + 1
        else:
            states = Integer(self.number(1, 3))
            dt = self.add("sigmoid", self.bounded(self._project(x, int(x.shape[2]))), spec=Spec(0, 1, False))
            decay = self.weight(TensorType(wide(x.dtype), (states, x.shape[2])), Spec(-4, -1))
            ends = [self.bounded(self._project(x, int(states)), 2) for _ in range(2)]
            y, state = self.builder.add_multi("selective_scan", x, dt, decay, *ends, slot=slot)
            size = 2.0 * int(states) * (1 + 8 * self.highs["S"])
        self.slots[slot] = state.type
        self.specs[y] = Spec(-size, size, False)
        return y

    def _torch(self) -> Value | None:
        """An op without a rule of its own, run by PyTorch."""
        x = self.floats(lambda v: v.type.rank >= 1)
        if x is None:
            return None
        n = concrete(x.shape[-1:], self.highs)[0]
        spec = Spec(-n * self.specs[x].size, n * self.specs[x].size, False)
        template = '[[{"t": 0}, -1], {}]'
        return self.add(
            "call_torch", x, type=x.type, spec=spec, target="aten.cumsum.default", template=template
        )
