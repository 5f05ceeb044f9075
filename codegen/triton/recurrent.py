"""Recurrent layers: a program takes a block of channels of one sequence through the tokens, its state in registers.

The state is read once and written once, in its place, whatever the number of tokens. All threads of a program have read
it before any of them writes it: more than one may hold an element.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy import Expr

from tilewright.ir.module import Op
from tilewright.ir.types import Value

from .expression import Context
from .pointwise_ops import TRITON_TYPES, compute_dtype
from .text import Scope, next_power_of_two, print_index
from .tiling import Tile


def emit_recurrent(op: Op, tile: Tile, context: Context, pid: str) -> Expr:
    """Emit a ``causal_conv1d`` or ``selective_scan`` into ``context.base``. Returns the number of programs."""
    emitter = {"causal_conv1d": _Convolution, "selective_scan": _Scan}[op.opcode]
    return emitter(op, tile, context, pid).emit()


class _Recurrence:
    """A walk over the tokens of a block of channels. ``channel`` numbers the block's channels."""

    def __init__(self, op: Op, tile: Tile, context: Context, pid: str) -> None:
        self.op, self.base, self.pointers = op, context.base, context.pointers
        rows, self.tokens, channels = op.operands[0].shape
        self.channels = int(channels)
        self.float = TRITON_TYPES[compute_dtype(op.operands[0].dtype)]
        blocks = -(-self.channels // tile.block_n)
        self.programs = sympy.expand(rows * blocks)
        base = self.base
        self.width = base.constant("BLOCK_N", tile.block_n)
        row = f"{pid} // {blocks}"
        # A tensor of more than 2^31 elements is only the one with all tokens.
        wide = any(self.pointers.is_large(v) for v in (*op.operands, *op.results))
        self.row = base.bind(f"tl.cast({row}, tl.int64)" if wide else row, "row")
        self.channel = base.bind(f"{pid} % {blocks} * {self.width} + tl.arange(0, {self.width})", "channel")
        even = self.channels % tile.block_n == 0
        self.inside = "" if even else base.bind(f"{self.channel} < {self.channels}", "ok")

    def emit(self) -> Expr:
        """Print the kernel; gives the number of programs."""
        self._start()
        loop = self.base.open(f"for token in range(0, {print_index(self.tokens)}):")
        at = loop.bind(f"{self.row} * {print_index(self.tokens, tight=True)} + token", "at")
        self._step(loop, at, loop.bind(f"{at} * {self.channels} + {self.channel}", "place"))
        self.base.close(loop)
        self.base.line("tl.debug_barrier()")
        self._finish()
        return self.programs

    def _start(self) -> None:
        raise NotImplementedError

    def _step(self, loop: Scope, at: str, place: str) -> None:
        """Take one token in: ``at`` is its number, ``place`` the offset of its channels."""
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError

    def _load(self, scope: Scope, value: Value, offset: str, mask: str, hint: str) -> str:
        guard = f", mask={mask}, other=0.0" if mask else ""
        loaded = f"tl.load({self.pointers.names[value]} + ({offset}){guard})"
        return scope.bind(
            loaded if compute_dtype(value.dtype) is value.dtype else f"{loaded}.to({self.float})", hint
        )

    def _store(self, scope: Scope, value: Value, offset: str, what: str, mask: str) -> None:
        guard = f", mask={mask}" if mask else ""
        scope.line(f"tl.store({self.pointers.names[value]} + ({offset}), {what}{guard})")


class _Convolution(_Recurrence):
    """Holds the last tokens in a variable each, oldest first."""

    def _start(self) -> None:
        _, weight, *bias = self.op.operands
        self.taps = [
            self._load(self.base, weight, f"{k * self.channels} + {self.channel}", self.inside, "tap")
            for k in range(int(weight.shape[0]))
        ]
        self.bias = [self._load(self.base, b, self.channel, self.inside, "bias") for b in bias]
        self.seen = []
        for k in range(len(self.taps) - 1):
            value = self._load(self.base, self.op.results[1], self._place(k), self.inside, "past")
            # A name of its own: two equal texts would share one, and each of these goes its own way.
            self.seen.append(self.base.names.fresh("seen"))
            self.base.line(f"{self.seen[-1]} = {value}")

    def _place(self, k: int) -> str:
        return f"({self.row} * {len(self.taps) - 1} + {k}) * {self.channels} + {self.channel}"

    def _step(self, loop: Scope, at: str, place: str) -> None:
        x = self._load(loop, self.op.operands[0], place, self.inside, "x")
        tokens = [*self.seen, x]
        terms = [*self.bias, *(f"{tap} * {token}" for tap, token in zip(self.taps, tokens, strict=True))]
        self._store(loop, self.op.results[0], place, " + ".join(terms), self.inside)
        for old, new in zip(self.seen, tokens[1:], strict=True):
            loop.line(f"{old} = {new}")

    def _finish(self) -> None:
        for k, value in enumerate(self.seen):
            self._store(self.base, self.op.results[1], self._place(k), value, self.inside)


class _Scan(_Recurrence):
    """Holds the state of the channels, [states, channels]."""

    def _start(self) -> None:
        base, decay = self.base, self.op.operands[2]
        self.count = int(decay.shape[0])
        padded = next_power_of_two(self.count)
        self.state = base.bind(f"tl.arange(0, {padded})", "n")
        self.real = "" if padded == self.count else base.bind(f"{self.state} < {self.count}", "real")
        self.mask = " & ".join(_present((_column(self.real), _line(self.inside))))
        self.rate = self._load(
            base, decay, f"{_column(self.state)} * {self.channels} + {_line(self.channel)}", self.mask, "rate"
        )
        self.place = base.bind(
            f"({self.row} * {self.count} + {_column(self.state)}) * {self.channels} + {_line(self.channel)}",
            "held",
        )
        past = self._load(base, self.op.results[1], self.place, self.mask, "past")
        self.h = base.names.fresh("h")
        base.line(f"{self.h} = {past}")

    def _step(self, loop: Scope, at: str, place: str) -> None:
        x, dt, _, into, out_of = self.op.operands
        time = self._load(loop, dt, place, self.inside, "dt")
        fed = loop.bind(f"{time} * {self._load(loop, x, place, self.inside, 'x')}", "fed")
        ends = [
            self._load(loop, v, f"{at} * {self.count} + {self.state}", self.real, v.name)
            for v in (into, out_of)
        ]
        kept = f"tl.exp({_line(time)} * {self.rate}) * {self.h}"
        loop.line(f"{self.h} = {kept} + {_line(fed)} * {_column(ends[0])}")
        total = f"tl.sum({_column(ends[1])} * {self.h}, axis=0)"
        self._store(loop, self.op.results[0], place, total, self.inside)

    def _finish(self) -> None:
        self._store(self.base, self.op.results[1], self.place, self.h, self.mask)


def _column(text: str) -> str:
    """A vector over states, down the tile."""
    return f"{text}[:, None]" if text else ""


def _line(text: str) -> str:
    """A vector over channels, across the tile."""
    return f"{text}[None, :]" if text else ""


def _present(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text]
