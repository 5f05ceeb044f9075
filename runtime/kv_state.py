"""The state of one request: KV buffers, key mask, length, and the tensors that a decode step reads and writes.

Everything a decode step touches is allocated once, at the request's start; the compiled model itself holds none of
it, so several threads may run one model as long as each has its own state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tilewright.ir.program import InputError

from .executor import EngineSpec
from .held_inputs import HeldInputs
from .host import quick, stream_number
from .recurrent_state import RecurrentState


class Window:
    """What a step of several tokens of one sequence reads and writes: ``tokens`` and ``positions`` i64[n], as ``quick``
    gives them, ``logits`` [1, n, V]. ``count`` is 1 to n."""

    def __init__(self, state: RequestState) -> None:
        spec, size = state.spec, state.spec.speculative_tokens + 1
        with torch.inference_mode(False):
            ids = torch.zeros(1, size, dtype=torch.int64, device=spec.device)
            positions, count = torch.zeros_like(ids), torch.arange(1, size + 1, device=spec.device)
            self.logits = spec.outputs[0].empty({"B": 1, "S": size, "L": size}, spec.device)
        self.tokens, self.positions, self.count = quick(ids[0]), quick(positions[0]), quick(count)
        held = {name: tensor[:1] for name, tensor in state.held.tensors.items()}
        self.inputs = {**state.step_inputs, **held, "input_ids": ids, "position_ids": positions}
        self.outputs = dict.fromkeys(state.step_outputs, self.logits)


class RequestState:
    """KV state of ``batch`` sequences, laid out for ``rows >= batch`` rows, where rows is a batch bucket.

    ``buffers[slot]`` is [rows, heads, max_length, head_dim], of which the first ``length`` positions are filled;
    what recurrent layers remember is there too, and has gone on by ``length`` positions.
    ``mask`` is bool[rows, max_length], one byte each, true where a key may be attended to and from ``length`` on.
    ``positions``, i64[rows, 1], are those of the tokens run last, until the request is cut or its rows change.
    ``held`` are the inputs that stay the same, of a decoder that attends to an encoder. ``shift``, i64[rows, 1], is how
    far the next position is from ``length``: an image may have fewer positions than tokens.
    ``version`` changes whenever a tensor is replaced, which invalidates the addresses that an executor keeps in
    ``scratch``. ``stream`` is the GPU stream that the request runs on, 0 elsewhere.
    """

    def __init__(self, spec: EngineSpec, batch: int, rows: int) -> None:
        self.spec = spec
        self.rows = rows
        self.stream = stream_number(spec.device)
        self.version = 0
        self.scratch: dict[Any, Any] = {}
        self.held = HeldInputs()
        self._allocate()
        self.reset(batch)

    def reset(self, batch: int) -> None:
        """Become an empty request of ``batch`` sequences. Tensors stay where they are, and so does ``scratch``.

        What the KV buffers hold from ``length`` on is never read.
        """
        self.batch = batch
        self.length = 0
        self.recurrent.memory.zero_()
        self.padded = False  # whether some attended-to position is masked out
        self.held.ready = False
        self.mask.fill_(True)
        self.ids.zero_()
        self.positions.zero_()
        self.shift.zero_()

    def _allocate(self) -> None:
        spec, rows = self.spec, self.rows
        # A state outlives the call that makes it, and tensors made in inference mode cannot be updated outside of it.
        with torch.inference_mode(False):
            # zeros, so that padding rows, which are computed but never read, hold no NaN that slows the kernels down
            self.buffers: dict[str, Tensor] = {
                slot.name: torch.zeros(
                    slot.shape(rows, spec.max_length), dtype=slot.dtype, device=spec.device
                )
                for slot in spec.slots
            }
            self.recurrent = RecurrentState(spec.recurrent, rows, spec.device)
            self.buffers |= self.recurrent.buffers
            self.mask = torch.ones(rows, spec.max_length, dtype=torch.bool, device=spec.device)
            self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=spec.device)
            self.positions, self.shift = torch.zeros_like(self.ids), torch.zeros_like(self.ids)
            self.no_length = torch.zeros(
                1, dtype=torch.int64, device=spec.device
            )  # a step's positions say enough
            steps = spec.kind == "decoder"
            self.logits = (
                spec.outputs[0].empty({"B": rows, "S": 1, "L": 1}, spec.device) if steps else torch.empty(0)
            )
        self._bind()

    def _bind(self) -> None:
        """Name what a decode step reads and writes."""
        self.step_inputs = {
            "input_ids": self.ids,
            "position_ids": self.positions,
            "attention_mask": self.mask,
            "call_length": self.no_length,
            **self.held.tensors,
        }
        self.step_outputs = {output.name: self.logits for output in self.spec.outputs[:1]}
        self.step_dims = {"B": self.rows, "S": 1, "T": 1, "L": 1, **self.held.dims}

    @property
    def window(self) -> Window:
        """What a step of several tokens reads and writes, made when there is the first one."""
        if Window not in self.scratch:
            self.scratch[Window] = Window(self)
        found: Window = self.scratch[Window]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> RequestState:
        """An independent request that goes on from the same past; executors bind it anew."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        with torch.inference_mode(False):
            twin.buffers = {slot.name: self.buffers[slot.name].clone() for slot in self.spec.slots}
            twin.recurrent = self.recurrent.copy()
            twin.buffers |= twin.recurrent.buffers
            twin.mask, twin.ids = self.mask.clone(), self.ids.clone()
            twin.positions, twin.logits = self.positions.clone(), self.logits.clone()
            twin.shift = self.shift.clone()
            twin.held = self.held.copy()
        twin.scratch = {}
        twin._bind()
        return twin

    def first_rows(self, rows: int) -> RequestState:
        """The first ``rows`` rows as a state of their own over the same memory, for the program of another bucket.

        Valid until the state is laid out anew. Lengths are each one's own; only steps may be run in it.
        """
        part = copy.copy(self)
        part.rows, part.batch, part.version, part.scratch = rows, rows, 0, {}
        part.buffers = {name: buffer[:rows] for name, buffer in self.buffers.items()}
        part.mask, part.ids, part.positions = self.mask[:rows], self.ids[:rows], self.positions[:rows]
        part.shift, part.logits = self.shift[:rows], self.logits[:rows]
        part._bind()
        return part

    def row(self, row: int, start: int, stop: int) -> dict[str, Tensor]:
        """What the state holds of one sequence, as views by the names of buffers: keys and values [heads, n, head_dim]
        at the positions from ``start`` to ``stop``, and what recurrent layers remember."""
        return {
            name: buffer[row] if name in self.recurrent.buffers else buffer[row, :, start:stop]
            for name, buffer in self.buffers.items()
        }

    def count_on(self) -> None:
        """Have the next position come after the last one, however many tokens there are."""
        self.shift[: self.batch] = self.positions[: self.batch] + 1 - self.length

    def hold(self, dims: dict[str, int]) -> None:
        """Make room for what a request at these sizes holds; ``held.tensors`` are to be filled then."""
        per_request = self.spec.per_request
        assert per_request is not None
        if self.held.make_room(per_request.held, dims, self.rows, self.spec.device):
            self._moved()

    def _moved(self) -> None:
        """Tensors have new addresses."""
        self.scratch.clear()
        self.version += 1
        self._bind()

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Leave the request as it was before the block when that raises, or is interrupted.

        Keys and values that the block appended stay in their buffers, where nothing reads them.
        """
        past, padded, mask = self.length, self.padded, self.mask[:, : self.length].clone()
        remembered, shift = self.recurrent.memory.clone(), self.shift.clone()
        try:
            yield
        except BaseException:
            self.mask[:, :past] = mask
            self.mask[:, past:] = True
            self.length, self.padded = past, padded
            self.recurrent.memory.copy_(remembered)
            self.shift.copy_(shift)
            raise

    @property
    def max_length(self) -> int:
        """Capacity in positions."""
        return self.spec.max_length

    @property
    def nbytes(self) -> int:
        """Bytes held by the KV buffers, by what recurrent layers remember and by what steps read unchanged."""
        return sum(b.nbytes for b in self.buffers.values()) + self.held.nbytes

    def crop(self, length: int) -> None:
        """Forget every position from ``length`` on. Raises InputError when that many are not there, and where layers
        are recurrent, which cannot forget what they have taken in."""
        if not 0 <= length <= self.length:
            raise InputError(f"cannot crop a cache of {self.length} positions to {length}")
        if length < self.length and self.spec.recurrent:
            raise InputError(
                f"cannot crop a cache of {self.length} positions to {length}: the state of a recurrent layer has taken "
                "them in and cannot go back; keep a copy.deepcopy of the cache to return to"
            )
        quick(self.mask)[:, length : self.length] = True
        self.length = length
        if not length:
            self.shift.zero_()

    def take_back(self, count: int) -> None:
        """Forget the last ``count`` tokens of a step of several, and go on at the position after those that stay."""
        self.crop(self.length - count)
        quick(self.positions)[: self.batch] -= count  # those of rows beyond must stay in the model's tables

    def _filled(self, name: str) -> Tensor:
        """What of a buffer belongs to the sequences: of keys and values the positions that are filled."""
        buffer = self.buffers[name][: self.batch]
        return buffer if name in self.recurrent.buffers else buffer[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Make batch row i continue row ``rows[i]``, as beam search does; i64[batch]. Addresses stay the same."""
        rows = rows.to(self.spec.device)
        if rows.shape != (self.batch,):
            raise InputError(
                f"reorder needs {self.batch} row numbers, one per sequence, got shape {tuple(rows.shape)}"
            )
        for name in self.buffers:
            filled = self._filled(name)
            filled.copy_(filled.index_select(0, rows))
        for kept in (self.mask[: self.batch], self.shift[: self.batch]):
            kept.copy_(kept.index_select(0, rows))
        self.held.reorder(rows)

    def select(self, rows: Tensor, new_rows: int) -> None:
        """Become a request over the sequences ``rows``, repeated or dropped at will; i64[n], n <= new_rows.

        ``new_rows`` is the bucket to lay the new state out for. Reallocates when the bucket changes.
        """
        rows = rows.to(self.spec.device)
        if rows.ndim != 1 or not 1 <= rows.numel() <= new_rows:
            raise InputError(f"a batch of {rows.numel()} sequences does not fit a state of {new_rows} rows")
        kept = {name: self._filled(name).index_select(0, rows) for name in self.buffers}
        mask, shift = (x[: self.batch].index_select(0, rows) for x in (self.mask, self.shift))
        self.batch = rows.numel()
        self.held.select(rows, new_rows)
        if new_rows != self.rows:
            self.rows = new_rows
            self._allocate()
            self._moved()
        elif self.held.tensors:
            self._moved()
        for name in self.buffers:
            self._filled(name).copy_(kept[name])
        self.mask[: self.batch], self.shift[: self.batch] = mask, shift
