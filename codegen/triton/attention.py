"""Attention over a KV cache: tiles of queries against blocks of positions, with an online softmax, or one that agrees
on its maximum beforehand (``softmax``).

One program handles one KV head: its tile holds BLOCK_M (position, query head) pairs, all heads of the group together,
so that K and V are read once per group. Causality, the window and the key mask are conditions on indices, and a bias by
distance is arithmetic on them; positions that no query of the tile may see are skipped, and those that all may see are
walked first, without conditions on indices. The split form walks one chunk of the context and stores its partial
result. Scores are masked with a negative number far below what a softmax starts from, so that their weights are zero,
and a row that sees nothing gives zero. The method is the online softmax of Milakov and Gimelshein, in the tiling of
FlashAttention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import sympy
from sympy import Expr, Integer

from tilewright.ir.attention import LEAST_BIASED, attention_extras
from tilewright.ir.errors import VerifyError
from tilewright.ir.index import FloorDiv, Mod, linear_index, sym
from tilewright.ir.loops import AttentionForm, Node, Store
from tilewright.ir.module import Op
from tilewright.ir.types import DType, Value, next_power_of_two

from .expression import Block, Context, Operand
from .pointwise_ops import TRITON, TRITON_TYPES, compute_dtype
from .softmax import FAR_MASKED, LOWEST, MASKED, AgreedSoftmax, Multiply, Sums, online_step
from .text import Scope, ceil_div, print_index
from .tiling import Tile

_LOOK = 1024  # keys whose mask is looked at together
AGREEABLE = (DType.f32, DType.bf16)
"""Types whose range holds weights that are far from 1."""
ROW, COLUMN, KEY, BATCH, GROUP, PART = (sym(n) for n in ("row", "column", "key", "batch", "group", "part"))


@dataclass(frozen=True)
class _Sizes:
    """Dims of the op: batch rows, query heads per KV head, KV heads, queries, context, head sizes, splits (0: none)."""

    batch: Expr
    share: Expr
    groups: Expr
    queries: Expr
    context: Expr
    depth: int
    depth_v: int
    splits: int

    @staticmethod
    def of(op: Op) -> _Sizes:
        q, k, v = op.operands[:3]
        batch, heads, queries, depth = q.shape
        share = heads / k.shape[1]
        splits = int(op.attr("splits", 0))
        return _Sizes(batch, share, k.shape[1], queries, k.shape[2], int(depth), int(v.shape[3]), splits)

    @property
    def rows(self) -> Expr:
        """(position, query head) pairs of one KV head."""
        return sympy.expand(self.queries * self.share)


def emit_attention(form: AttentionForm, tile: Tile, context: Context, pid: str, interpret: bool) -> Expr:
    """Emit the kernel into ``context.base``. Returns the number of programs.

    Raises VerifyError for an attention that still owns its append: the append belongs to the kernel that makes k and v.
    """
    if form.op.attr("slot", ""):
        raise VerifyError("attention must read its KV state, not append to it, when it is printed")
    return _Attention(form, tile, context, pid, interpret).emit()


@dataclass(frozen=True)
class _Walk:
    """Texts that a loop over keys needs: its range, of which all queries see whole blocks up to ``inner`` ("" where
    that is not looked for), the queries, their positions and the last keys that they see, slopes or ""."""

    low: str
    inner: str
    high: str
    q: str
    query: str
    last: str
    slopes: str


class Step(Protocol):
    """Takes a block's scores into account."""

    def __call__(self, scope: Scope, *, scores: str, multiply: Multiply) -> None: ...


class _Attention:
    def __init__(self, form: AttentionForm, tile: Tile, context: Context, pid: str, interpret: bool) -> None:
        self.op, self.form, self.tile, self.pid = form.op, form, tile, pid
        self.sizes, self.interpret = _Sizes.of(form.op), interpret
        self.context, self.base = context, context.base
        self.dtype = form.op.operands[0].dtype
        self.float = TRITON_TYPES[compute_dtype(self.dtype)]
        self.q, self.k, self.v = form.op.operands[:3]
        self.extras = attention_extras(form.op, form.op.operands)
        self.window, self.ahead = (int(form.op.attr(name, 0)) for name in ("window", "ahead"))

    def emit(self) -> Expr:
        base, sizes, tile = self.base, self.sizes, self.tile
        self.block_m = base.constant("BLOCK_M", tile.block_m)
        self.block_n = base.constant("BLOCK_N", tile.block_n)
        self.block_d = base.constant("BLOCK_D", max(16, next_power_of_two(sizes.depth)))
        self.block_v = base.constant("BLOCK_DV", max(16, next_power_of_two(sizes.depth_v)))
        tiles = ceil_div(sizes.rows, tile.block_m)
        tile_index = self._program_ids(tiles)
        row = base.bind(f"{tile_index}tl.arange(0, {self.block_m})", "row")
        down = base.bind(f"{row}[:, None]", "m")
        self.rows = Block(down, base.bind(f"{down} < {print_index(sizes.rows)}", "m_ok"), base, sizes.rows)
        query = base.bind(
            self._text(sizes.context - sizes.queries + FloorDiv(ROW, sizes.share), {ROW: down}), "position"
        )
        last = self._reach() if "reach" in self.extras else query
        low, high = self._range(query, last)
        inner = self._inner(low, high, query)
        q = self._load_query()
        slopes = self._per_head("slopes") if "slopes" in self.extras else ""
        acc, top, total = (base.names.fresh(n) for n in ("acc", "top", "total"))
        agreed = tile.agreed and self.dtype in AGREEABLE
        # Many queries in half precision are bound by what is done to each score, so their scale waits for the
        # exponential where nothing else is done to scores before.
        plain = not (agreed or sizes.queries == 1 or self.op.attr("softcap") or set(self.extras) - {"mask"})
        self.scale = float(self.op.attr("scale"))
        self.waits = plain and self.dtype.itemsize == 2 and self.scale > 0
        sums = Sums(acc, top, total, self.float, self.scale if self.waits else 0.0)
        self._start(base, sums)

        def walk(scope: Scope, step: Step) -> None:
            self._walk(scope, _Walk(low, inner, high, q, query, last, slopes), step)

        if not agreed:
            walk(base, partial(online_step, sums=sums))
        else:
            softmax = AgreedSoftmax.begin(base, sums, f"[{self.block_m}, {self.block_n}]")
            walk(base, softmax.step)
            again = base.open(f"if {softmax.finish(base)} != 0:")
            self._start(again, sums)
            walk(again, partial(online_step, sums=sums))
            base.close(again)
        self._store(sums)
        return sympy.expand(sizes.batch * sizes.groups * tiles * max(1, sizes.splits))

    def _program_ids(self, tiles: Expr) -> str:
        """Name this program's tile, split, KV head and batch row; gives the text before the row index."""
        base, rest = self.base, self.pid
        self.names: dict[sympy.Symbol, str] = {}
        tile_index = ""
        for symbol, extent, hint in (
            (None, tiles, "tile"), (PART, Integer(max(1, self.sizes.splits)), "part"),
            (GROUP, self.sizes.groups, "group"), (BATCH, None, "batch"),
        ):  # fmt: skip
            if extent == 1:
                continue
            count = "" if extent is None else print_index(extent, tight=True)
            value = rest if extent is None else f"{rest} % {count}"
            name = base.bind(value, hint) if value != self.pid else self.pid
            if symbol is None:
                tile_index = f"{name} * {self.block_m} + "
            else:
                self.names[symbol] = name
            if extent is not None:
                rest = base.bind(f"{rest} // {count}", "rest")
        return tile_index

    def _text(self, expr: Expr, table: dict[sympy.Symbol, str]) -> str:
        names = {**self.names, **table}
        zeros = {s: Integer(0) for s in (BATCH, GROUP, PART) if s not in names}
        return print_index(sympy.expand(expr.xreplace(zeros)), lambda s: names.get(s, str(s)))

    def _reach(self) -> str:
        """The last key that each query sees, as a column of the tile's rows."""
        address = self._address(
            self.extras["reach"], (BATCH, FloorDiv(ROW, self.sizes.share)), {ROW: self.rows.text}
        )
        return self.base.bind(f"tl.load({address}, mask={self.rows.mask}, other=0).to(tl.int32)", "reach")

    def _range(self, query: str, last: str) -> tuple[str, str]:
        """The context positions that some query of the tile may see, as [low, high)."""
        base, sizes = self.base, self.sizes
        low, high = "0", print_index(sizes.context)
        if sizes.splits:
            chunk = base.bind(print_index(ceil_div(sizes.context, sizes.splits)), "chunk")
            part = self.names.get(PART, "0")
            low = base.bind(f"{part} * {chunk}", "low")
            high = base.bind(f"tl.minimum({low} + {chunk}, {high})", "high")
        if self.op.attr("causal") and sizes.queries != 1:
            high = base.bind(f"tl.minimum({high}, tl.max({last}) + 1)", "high")
        if self.window:
            first = base.bind(f"tl.min({query}) - {self.window - 1}", "first")
            low = base.bind(f"tl.maximum({low}, {first})", "low")
        if self.ahead:
            high = base.bind(f"tl.minimum({high}, tl.max({query}) + {self.ahead})", "high")
        return low, high

    def _inner(self, low: str, high: str, query: str) -> str:
        """Where the blocks end that every query of the tile sees whole: nowhere, if the mask hides some of them. A
        single query has one loop: a second one would wait for its first block once more. So have wide types, whose
        operands leave no registers for a second one."""
        if self.sizes.queries == 1 or self.window or self.ahead or self.dtype.itemsize > 2:
            return ""
        base = self.base
        end = f"tl.minimum({high}, tl.min({query}) + 1)" if self.op.attr("causal") else high
        length = base.bind(f"tl.maximum({end} - {low}, 0)", "length")
        inner = base.bind(f"{low} + {length} // {self.block_n} * {self.block_n}", "inner")
        if "mask" not in self.extras:
            return inner
        hidden = base.names.fresh("hidden")
        base.line(f"{hidden} = tl.zeros([{_LOOK}], tl.int32)")
        scope = base.open(f"for start in range({low}, {inner}, {_LOOK}):")
        key = scope.bind(f"start + tl.arange(0, {_LOOK})", "key")
        address = self._address(self.extras["mask"], (BATCH, KEY), {KEY: key})
        valid = scope.bind(f"tl.load({address}, mask={key} < {inner}, other=1)", "valid")
        scope.line(f"{hidden} += ({valid} == 0).to(tl.int32)")
        base.close(scope)
        return base.bind(f"tl.where(tl.sum({hidden}, axis=0) == 0, {inner}, {low})", "inner")

    def _address(self, value: Value, index: tuple[Expr, ...], table: dict[sympy.Symbol, str]) -> str:
        """Pointer text of an element; in 64 bits where the tensor may be that large."""
        pointers = self.context.pointers
        shape = pointers.shape(value)
        suffix = ".to(tl.int64)" if pointers.is_large(value) else ""
        named = {s: f"{t}{suffix}" for s, t in {**self.names, **table}.items()}
        zeros = {s: Integer(0) for s in (BATCH, GROUP, PART) if s not in named}
        text = print_index(
            sympy.expand(linear_index(index, shape).xreplace(zeros)), lambda s: named.get(s, str(s))
        )
        return f"{pointers.names[value]} + ({text})"

    def _depth(self, block: str, size: int, subscript: str, hint: str) -> tuple[str, str]:
        """Indices along a head dim and their mask ("" where the dim is a power of two)."""
        name = self.base.bind(f"tl.arange(0, {block}){subscript}", hint)
        padded = max(16, next_power_of_two(size)) != size
        return name, self.base.bind(f"{name} < {size}", f"{name}_ok") if padded else ""

    def _load_query(self) -> str:
        share = self.sizes.share
        d, d_ok = self._depth(self.block_d, self.sizes.depth, "[None, :]", "d")
        index = (BATCH, GROUP * share + Mod(ROW, share), FloorDiv(ROW, share), COLUMN)
        address = self._address(self.q, index, {ROW: self.rows.text, COLUMN: d})
        mask = " & ".join(m for m in (self.rows.mask, d_ok) if m)
        return self.base.bind(f"tl.load({address}, mask={mask}, other=0.0)", "q")

    def _start(self, scope: Scope, sums: Sums) -> None:
        """The softmax before any key: nothing, or the head's sink."""
        scope.line(f"{sums.acc} = tl.zeros([{self.block_m}, {self.block_v}], {self.float})")
        if "sinks" not in self.extras:
            scope.line(f"{sums.top} = tl.full([{self.block_m}, 1], {LOWEST}, {self.float})")
            scope.line(f"{sums.total} = tl.zeros([{self.block_m}, 1], {self.float})")
            return
        scope.line(f"{sums.top} = {self._per_head('sinks')}")
        scope.line(f"{sums.total} = tl.full([{self.block_m}, 1], 1.0, {self.float})")

    def _per_head(self, extra: str) -> str:
        """An operand that has a number for each query head, as a column of the tile's rows."""
        share = self.sizes.share
        address = self._address(self.extras[extra], (GROUP * share + Mod(ROW, share),), {ROW: self.rows.text})
        address += f" + {self.rows.text} * 0"  # a block of rows even where all of them are of one head
        return self.base.bind(f"tl.load({address}, mask={self.rows.mask}, other=0.0).to({self.float})", extra)

    def _by_distance(self, scope: Scope, key: str, query: str) -> str:
        """The bias of each key for each query, from the table of the query's head."""
        table, share = self.extras["distances"], self.sizes.share
        last = int(table.shape[1]) - 1
        place = scope.bind(f"tl.minimum(tl.maximum({key} - {query} + {last // 2}, 0), {last})", "place")
        index = (GROUP * share + Mod(ROW, share), COLUMN)
        address = self._address(table, index, {ROW: self.rows.text, COLUMN: place})
        return scope.bind(
            f"tl.load({address}, mask={self.rows.mask}, other=0.0).to({self.float})", "distances"
        )

    def _bias(self, scope: Scope, key: str, inside: str) -> str:
        """The array's numbers for a block of keys; ``inside``: which of them there are, "" for all."""
        bias, share = self.extras["bias"], self.sizes.share
        places = (BATCH, GROUP * share + Mod(ROW, share), FloorDiv(ROW, share))
        index = tuple(
            Integer(0) if d == 1 else place for d, place in zip(bias.shape[:3], places, strict=True)
        )
        address = self._address(bias, (*index, KEY), {ROW: self.rows.text, KEY: key})
        address += f" + {self.rows.text} * 0"  # a block of rows even where all of them share one
        mask = " & ".join(m for m in (self.rows.mask, inside) if m)
        return scope.bind(f"tl.load({address}, mask={mask}, other=0.0).to({self.float})", "bias")

    def _walk(self, base: Scope, over: _Walk, step: Step) -> None:
        """Loop over blocks of keys; ``step`` takes each block's scores."""
        if over.inner:
            self._blocks(base, replace(over, high=over.inner), step, edge=False)
        self._blocks(base, replace(over, low=over.inner or over.low), step, edge=True)

    def _blocks(self, base: Scope, over: _Walk, step: Step, edge: bool) -> None:
        """One loop. edge: whether a block may hold keys that do not exist, or that come after some query."""
        op, high, query = self.op, over.high, over.query
        scope = base.open(f"for start in range({over.low}, {high}, {self.block_n}):")
        row = scope.bind(f"start + tl.arange(0, {self.block_n})[None, :]", "key")
        column = scope.bind(f"start + tl.arange(0, {self.block_n})[:, None]", "key_down")
        d, d_ok = self._depth(self.block_d, self.sizes.depth, "[:, None]", "d_down")
        e, e_ok = self._depth(self.block_v, self.sizes.depth_v, "[None, :]", "e")
        k_mask = " & ".join(m for m in (f"({row} < {high})" if edge else "", d_ok) if m)
        v_mask = " & ".join(m for m in (f"({column} < {high})" if edge else "", e_ok) if m)
        address = self._address(self.k, (BATCH, GROUP, KEY, COLUMN), {KEY: row, COLUMN: d})
        k = self._cached(scope, address, k_mask, "k")
        address = self._address(self.v, (BATCH, GROUP, KEY, COLUMN), {KEY: column, COLUMN: e})
        values = partial(self._cached, scope, address, v_mask, "v")
        # A single query walks few blocks: it has nothing else under way while it looks at its keys.
        early = values() if self.sizes.queries == 1 else ""
        scores = scope.bind(self._dot(over.q, k) + ("" if self.waits else f" * {self.scale!r}"), "scores")
        if cap := op.attr("softcap"):
            bounded = TRITON["tanh"]((f"{scores} * {1.0 / float(cap)!r}",), compute_dtype(self.dtype))
            scores = scope.bind(f"{bounded} * {float(cap)!r}", "scores")
        if over.slopes:
            scores = scope.bind(f"{scores} + {over.slopes} * ({row} - {query}).to({self.float})", "scores")
        if "distances" in self.extras:
            scores = scope.bind(f"{scores} + {self._by_distance(scope, row, query)}", "scores")
        if "bias" in self.extras:
            bias = self._bias(scope, row, f"({row} < {high})" if edge else "")
            biased = f"tl.maximum({scores} + {bias}, {LEAST_BIASED!r})"
            scores = scope.bind(f'tl.where({bias} == float("-inf"), {MASKED}, {biased})', "scores")
        if seen := self._condition(scope, row, over, edge):
            masked = FAR_MASKED if self.waits else MASKED
            scores = scope.bind(f"tl.where({seen}, {scores}, {masked})", "scores")

        def multiply(p: str) -> str:
            v = early or values()
            weights = (
                p if self.dtype in (DType.f32, DType.f64) else scope.bind(f"{p}.to({v}.dtype)", "weights")
            )
            return self._dot(weights, v)

        step(scope, scores=scores, multiply=multiply)
        base.close(scope)

    def _cached(self, scope: Scope, address: str, mask: str, hint: str) -> str:
        """A block of keys or values in the type of the queries."""
        stored = self.k.dtype
        zero = "0" if stored is DType.f8 else "0.0"
        guard = f", mask={mask}, other={zero}" if mask else ""
        text = scope.bind(f"tl.load({address}{guard})", hint)
        if stored is self.dtype:
            return text
        value = f"f8_to_float({text})" if stored is DType.f8 else text
        return scope.bind(f"{value}.to({TRITON_TYPES[self.dtype]})", hint)

    def _condition(self, scope: Scope, key: str, over: _Walk, edge: bool) -> str:
        """Which keys each query may see; "" for all. Rows beyond the last are not stored, whatever they see."""
        inside = f"{key} < {over.high}"
        parts = [f"({inside})"] if edge else []
        if edge and self.op.attr("causal") and self.sizes.queries != 1:
            parts.append(f"({key} <= {over.last})")
        if self.window:
            parts.append(f"({over.query} - {key} < {self.window})")
        if self.ahead:
            parts.append(f"({key} - {over.query} < {self.ahead})")
        if edge and "mask" in self.extras:
            address = self._address(self.extras["mask"], (BATCH, KEY), {KEY: key})
            valid = scope.bind(f"tl.load({address}, mask={inside}, other=0)", "valid")
            parts.append(f"({valid} != 0)")
        return scope.bind(" & ".join(parts), "seen") if parts else ""

    def _dot(self, a: str, b: str) -> str:
        if self.dtype is DType.bf16 and self.interpret:
            # The interpreter keeps bfloat16 as raw bits and would multiply those; a float32 product is the same number.
            return f'tl.dot({a}.to(tl.float32), {b}.to(tl.float32), input_precision="ieee")'
        if self.dtype is DType.f64:  # whose products on tensor cores not every version of Triton can compile
            return f"tl.sum(({a})[:, :, None] * ({b})[None, :, :], axis=1)"
        precise = ', input_precision="ieee"' if self.dtype is DType.f32 else ""
        return f"tl.dot({a}, {b}{precise})"

    def _store(self, sums: Sums) -> None:
        """Store the result, or the partial one, through the views that follow the op."""
        base, sizes = self.base, self.sizes
        results: tuple[str, ...] = (sums.acc, sums.top, sums.total)
        if not sizes.splits:
            results = (base.bind(f"{sums.acc} / tl.maximum({sums.total}, 1.0e-30)", "result"),)
        e, e_ok = self._depth(self.block_v, sizes.depth_v, "[None, :]", "e")
        blocks = {ROW: self.rows, COLUMN: Block(e, e_ok, base, Integer(sizes.depth_v))}
        blocks |= {s: Block(t, "", base, Integer(2**31)) for s, t in self.names.items()}
        axes = {
            sym("b"): BATCH,
            sym("h"): GROUP * sizes.share + Mod(ROW, sizes.share),
            sym("s"): FloorDiv(ROW, sizes.share),
            sym("d"): COLUMN,
            sym("p"): PART,
        }
        zeros = {s: Integer(0) for s in (BATCH, GROUP, PART) if s not in self.names}
        inner = self.context.extended({s: sympy.sympify(e).xreplace(zeros) for s, e in axes.items()}, blocks)
        for number, (text, (target, index)) in enumerate(zip(results, self.form.stores, strict=True)):
            value = _Computed(target.dtype)
            inner.bound[value] = Operand(text, base)
            inner.store(Store(target, index, value), base, (ROW,) if number else (ROW, COLUMN))


class _Computed(Node):
    """A value that the template holds in a variable."""
