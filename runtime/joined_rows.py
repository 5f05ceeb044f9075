"""Sequences of several requests that take their decode steps together, as rows of one request state.

They end at the same position, the newest token of each: a row that is shorter than the longest one begins later, and
the mask hides what is before it, as in a left-padded batch. Keys and values know nothing of where they lie (rotations
are applied before), and windows and biases count distances, so that a row may be moved along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .engine import Engine
from .host import quick, write
from .kv_state import RequestState

_SPARSE = 2  # rows are moved to the front once the longest takes less than one in so many positions


@dataclass(frozen=True)
class _Bucket:
    """The state's first rows as the program of a bucket takes them; its tokens i64[rows, 1] and their positions."""

    state: RequestState
    tokens: Any
    positions: Any

    @staticmethod
    def of(whole: RequestState, rows: int) -> _Bucket:
        state = whole.first_rows(rows)
        return _Bucket(state, quick(state.ids), quick(state.positions))


class JoinedRows:
    """Rows 0 to ``count - 1`` are sequences, of ``lengths[row]`` tokens each, that end at position ``length``.

    Memory is laid out for the smallest bucket that holds the most rows that there have been; a step runs the program of
    the smallest one that holds those that there are.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lengths: list[int] = []
        self.length = 0
        self._whole: RequestState | None = None
        self._buckets: dict[int, _Bucket] = {}

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def join(self, one: RequestState) -> None:
        """Take in the sequence of a state of one row as the last row; a copy, and the state is the caller's again."""
        held = one.length
        whole = self._room_for(self.count + 1)
        if held > self.length:
            self._shift(held - self.length)
        row, start = self.count, self.length - held
        for keys in self._kept(whole):
            # What another request left there is multiplied by a weight of 0, which a NaN would survive.
            keys[row, :, :start].zero_()
        _copy(one.row(0, 0, held), whole.row(row, start, self.length))
        whole.positions[row] = one.positions[0]
        self.lengths.append(held)
        self._hide(row)

    def parts(self, row: int) -> dict[str, Tensor]:
        """What is held of a row's sequence, as :meth:`RequestState.row` has it; valid until the next change."""
        assert self._whole is not None
        return self._whole.row(row, self.length - self.lengths[row], self.length)

    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        whole, last = self._whole, self.lengths.pop()
        assert whole is not None
        if row < self.count:
            moved = self.count  # the last row, which is none any more
            _copy(whole.row(moved, 0, self.length), whole.row(row, 0, self.length))
            whole.positions[row] = whole.positions[moved]
            self.lengths[row] = last
            self._hide(row)
        longest = max(self.lengths, default=0)
        if longest * _SPARSE <= self.length:
            self._to_front()

    def clear(self) -> None:
        """Drop all rows, after a failure in the middle of anything. Memory is let go."""
        self.lengths, self.length = [], 0
        self._whole, self._buckets = None, {}

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run the model on a token for each row. Returns the logits [rows, 1, V] of what comes next: the first
        ``count`` rows of them, in memory that the next step with as many rows writes anew."""
        if self.length == self.engine.spec.max_length:
            self._to_front()
        bucket = self._bucket(self.engine.bucket(self.count))
        write(bucket.tokens[: self.count, 0], tokens)
        bucket.positions[: self.count] += 1
        bucket.positions[self.count :] = 0  # rows that are computed and never read
        state = bucket.state
        state.length = self.length
        self.engine.advance(state)
        self.length += 1
        self.lengths = [held + 1 for held in self.lengths]
        return state.logits

    def _bucket(self, rows: int) -> _Bucket:
        assert self._whole is not None
        if rows not in self._buckets:
            self._buckets[rows] = _Bucket.of(self._whole, rows)
        return self._buckets[rows]

    def _room_for(self, count: int) -> RequestState:
        """The state, laid out anew where it has too few rows."""
        old, rows = self._whole, self.engine.bucket(count)
        if old is not None and old.rows >= rows:
            return old
        whole = self.engine.new_state(rows)
        if old is not None:
            for row in range(self.count):
                _copy(old.row(row, 0, self.length), whole.row(row, 0, self.length))
            whole.positions[: self.count], whole.mask[: self.count] = (
                each[: self.count] for each in (old.positions, old.mask)
            )
        self._whole, self._buckets = whole, {}
        return whole

    def _to_front(self) -> None:
        """Move all rows so that the longest one begins at position 0."""
        self._shift(max(self.lengths, default=0) - self.length)

    def _shift(self, by: int) -> None:
        """Move the tokens of all rows by so many positions, forwards or, where it is negative, backwards."""
        if self.count and by:
            assert self._whole is not None
            first = self.length - max(self.lengths)
            for keys in self._kept(self._whole):
                tokens = keys[: self.count, :, first : self.length].clone()  # where they go to overlaps
                keys[: self.count, :, first + by : self.length + by] = tokens
        self.length += by
        for row in range(self.count):
            self._hide(row)

    def _hide(self, row: int) -> None:
        """Have the mask of a row hide what is before its first token."""
        assert self._whole is not None
        self._whole.mask[row] = True
        self._whole.mask[row, : self.length - self.lengths[row]] = False

    def _kept(self, state: RequestState) -> list[Tensor]:
        """The buffers of keys and values."""
        return [state.buffers[slot.name] for slot in self.engine.spec.slots]


def _copy(source: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    """Copy what a state holds of a sequence into the place of another."""
    for name, part in to.items():
        part.copy_(source[name])
