"""Recurrent layers: a program takes a block of channels of one sequence through the tokens, its state in registers.

The state is read once and written once, in its place, whatever the number of tokens. All threads of a program have read
it before any of them writes it: more than one may hold an element.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import sympy
from sympy import Expr

from tilewright.ir.module import Op
from tilewright.ir.types import Value, next_power_of_two

from .expression import Context
from .pointwise_ops import TRITON_TYPES, compute_dtype
from .text import Scope, print_index
from .tiling import Tile


def emit_recurrent(op: Op, tile: Tile, context: Context, pid: str) -> Expr:
    """Emit one of the recurrent ops into ``context.base``. Returns the number of programs."""
    return _EMITTERS[op.opcode](op, tile, context, pid).emit()


@dataclass(frozen=True)
class _Token:
    """Texts of a token's number among all sequences', the offsets of its channels, and whether it is there at all ("":
    always)."""

    at: str
    place: str
    there: str


class _Recurrence(ABC):
    """A walk over the tokens of a block of channels. ``row`` numbers sequences, or their heads, each of which has all
    channels; ``channel`` numbers the block's channels."""

    def __init__(self, op: Op, tile: Tile, context: Context, pid: str) -> None:
        self.op, self.tile, self.base, self.pointers = op, tile, context.base, context.pointers
        sequences, self.tokens, *heads, channels = op.results[0].shape
        rows = sympy.prod(heads, start=sequences)
        self.channels = int(channels)
        self.float = TRITON_TYPES[compute_dtype(op.results[0].dtype)]
        blocks = -(-self.channels // tile.block_n)
        self.programs = sympy.expand(rows * blocks)
        base = self.base
        self.width = base.constant("BLOCK_N", tile.block_n)
        row = f"{pid} // {blocks}"
        # A tensor of more than 2^31 elements is only the one with all tokens.
        wide = any(self.pointers.is_large(v) for v in (*op.operands, *op.results))
        self.row = self.sequence = base.bind(f"tl.cast({row}, tl.int64)" if wide else row, "row")
        self.channel = base.bind(f"{pid} % {blocks} * {self.width} + tl.arange(0, {self.width})", "channel")
        even = self.channels % tile.block_n == 0
        self.inside = "" if even else base.bind(f"{self.channel} < {self.channels}", "ok")

    def emit(self) -> Expr:
        """Print the kernel; gives the number of programs."""
        self._start()
        count, together = print_index(self.tokens, tight=True), self.tile.block_m
        loop = self.base.open(f"for first in range(0, {count}, {together}):")
        # What tokens bring does not depend on the state, so that of several is requested before the first is taken in.
        tokens = [self._token(loop, n, count) for n in range(together)]
        brought = [self._bring(loop, token) for token in tokens]
        for token, values in zip(tokens, brought, strict=True):
            self._step(loop, token, values)
        self.base.close(loop)
        self.base.line("tl.debug_barrier()")
        self._finish()
        return self.programs

    def _token(self, loop: Scope, n: int, count: str) -> _Token:
        number = loop.bind(f"first + {n}", "token")
        there = f"{number} < {count}" if self.tile.block_m > 1 else ""
        at = loop.bind(f"{self.sequence} * {count} + {number}", "at")
        place = loop.bind(f"{self._line_of(at)} * {self.channels} + {self.channel}", "place")
        return _Token(at, place, there)

    def _line_of(self, at: str) -> str:
        """Which line of channels is that of token ``at`` in this program's row."""
        return at

    @abstractmethod
    def _start(self) -> None:
        """Read what holds for all tokens: weights and the state."""

    @abstractmethod
    def _bring(self, loop: Scope, token: _Token) -> list[str]:
        """Load what a token brings; zeros where there is none."""

    @abstractmethod
    def _step(self, loop: Scope, token: _Token, values: list[str]) -> None:
        """Take in what :meth:`_bring` gave; where there is no token, the state stays."""

    @abstractmethod
    def _finish(self) -> None:
        """Write the state."""

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

    def _bring(self, loop: Scope, token: _Token) -> list[str]:
        return [
            self._load(loop, self.op.operands[0], token.place, _where(token, self.channel, self.inside), "x")
        ]

    def _step(self, loop: Scope, token: _Token, values: list[str]) -> None:
        seen = [*self.seen, *values]
        terms = [*self.bias, *(f"{tap} * {value}" for tap, value in zip(self.taps, seen, strict=True))]
        mask = _where(token, self.channel, self.inside)
        self._store(loop, self.op.results[0], token.place, " + ".join(terms), mask)
        for old, new in zip(self.seen, seen[1:], strict=True):
            loop.line(f"{old} = " + (f"tl.where({mask}, {new}, {old})" if token.there else new))

    def _finish(self) -> None:
        for k, value in enumerate(self.seen):
            self._store(self.base, self.op.results[1], self._place(k), value, self.inside)


class _Matrix(_Recurrence):
    """Holds a matrix of states, [states, channels]."""

    def _start(self) -> None:
        base = self.base
        self.count = int(self.op.results[1].shape[-2])
        padded = next_power_of_two(self.count)
        self.state = base.bind(f"tl.arange(0, {padded})", "n")
        self.real = "" if padded == self.count else base.bind(f"{self.state} < {self.count}", "real")
        self.mask = _both(_column(self.real), _line(self.inside))
        self.place = base.bind(
            f"({self.row} * {self.count} + {_column(self.state)}) * {self.channels} + {_line(self.channel)}",
            "held",
        )
        past = self._load(base, self.op.results[1], self.place, self.mask, "past")
        self.h = base.names.fresh("h")
        base.line(f"{self.h} = {past}")

    def _finish(self) -> None:
        self._store(self.base, self.op.results[1], self.place, self.h, self.mask)


class _Scan(_Matrix):
    """Each channel has a decay for each of its states."""

    def _start(self) -> None:
        super()._start()
        place = f"{_column(self.state)} * {self.channels} + {_line(self.channel)}"
        self.rate = self._load(self.base, self.op.operands[2], place, self.mask, "rate")

    def _bring(self, loop: Scope, token: _Token) -> list[str]:
        x, dt, _, *ends = self.op.operands
        here, state = _where(token, self.channel, self.inside), _where(token, self.state, self.real)
        return [
            self._load(loop, dt, token.place, here, "dt"),
            self._load(loop, x, token.place, here, "x"),
            *(self._load(loop, v, f"{token.at} * {self.count} + {self.state}", state, v.name) for v in ends),
        ]

    def _step(self, loop: Scope, token: _Token, values: list[str]) -> None:
        time, x, into, out_of = values
        fed = loop.bind(f"{time} * {x}", "fed")
        # A time of zero leaves the state as it is.
        kept = f"tl.exp({_line(time)} * {self.rate}) * {self.h}"
        loop.line(f"{self.h} = {kept} + {_line(fed)} * {_column(into)}")
        total = f"tl.sum({_column(out_of)} * {self.h}, axis=0)"
        self._store(loop, self.op.results[0], token.place, total, _where(token, self.channel, self.inside))


class _LinearAttention(_Matrix):
    """Its row is a head, which shares queries and keys with the other heads of its group."""

    def _start(self) -> None:
        super()._start()
        q, _, v, decay, *_ = self.op.operands
        self.heads, self.groups, self.rates = int(v.shape[2]), int(q.shape[2]), int(decay.shape[3])
        self.sequence = self.base.bind(f"{self.row} // {self.heads}", "sequence")
        self.head = self.base.bind(f"{self.row} % {self.heads}", "head")
        self.group = self.base.bind(f"{self.head} // {self.heads // self.groups}", "group")

    def _line_of(self, at: str) -> str:
        return f"({at} * {self.heads} + {self.head})"

    def _bring(self, loop: Scope, token: _Token) -> list[str]:
        q, k, v, decay, *beta = self.op.operands
        here, state = _where(token, self.channel, self.inside), _where(token, self.state, self.real)
        key = f"({token.at} * {self.groups} + {self.group}) * {self.count} + {self.state}"
        own = self._line_of(token.at)
        rate = f"{own} * {self.rates} + " + (self.state if self.rates > 1 else f"{self.state} * 0")
        return [
            *(self._load(loop, x, key, state, x.name) for x in (q, k)),
            self._load(loop, v, token.place, here, "value"),
            self._load(loop, decay, rate, state, "decay"),
            *(self._load(loop, b, f"{own} + {self.channel} * 0", here, "part") for b in beta),
        ]

    def _step(self, loop: Scope, token: _Token, values: list[str]) -> None:
        # Where there is no token, nothing decays and nothing is taken in: all of its values are zeros.
        query, key, value, decay, *beta = values
        loop.line(f"{self.h} = tl.exp({_column(decay)}) * {self.h}")
        for part in beta:
            found = loop.bind(f"tl.sum({_column(key)} * {self.h}, axis=0)", "found")
            value = loop.bind(f"{part} * ({value} - {found})", "taken_in")
        loop.line(f"{self.h} += {_column(key)} * {_line(value)}")
        total = f"tl.sum({_column(query)} * {self.h}, axis=0)"
        self._store(loop, self.op.results[0], token.place, total, _where(token, self.channel, self.inside))


_EMITTERS: dict[str, type[_Recurrence]] = {
    "causal_conv1d": _Convolution,
    "selective_scan": _Scan,
    "linear_attention": _LinearAttention,
}


def _column(text: str) -> str:
    """A vector over states, down the tile."""
    return f"{text}[:, None]" if text else ""


def _line(text: str) -> str:
    """A vector over channels, across the tile."""
    return f"{text}[None, :]" if text else ""


def _both(*masks: str) -> str:
    """The conjunction of masks, some of which may be none."""
    return " & ".join(mask for mask in masks if mask)


def _where(token: _Token, lanes: str, mask: str) -> str:
    """The mask of what a token brings to ``lanes``. It is compared as a block of them: Triton's interpreter makes
    integers of a scalar truth that it spreads over a block."""
    return _both(mask, f"({lanes} * 0 + {token.there})" if token.there else "")
