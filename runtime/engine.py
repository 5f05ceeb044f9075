"""The engine: checks what callers hand in, keeps request states, and picks the program for each call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tilewright.ir.program import InputError

from .checks import check_bounds, check_integers, require_mask, require_tensor
from .device import is_out_of_memory
from .executor import Compiling, DeviceStepping, EngineSpec, Executor, TensorSpec
from .greedy import GreedyKernels
from .host import aligned, clone, quick, write
from .idle_states import IdleStates
from .kv_state import RequestState
from .prompts import completed, pieces

Pieces = Generator[None, None, Tensor]
"""A step that stops after each piece of a prompt and gives the logits at its end."""


class Engine:
    """Runs a compiled model. Safe to use from several threads, each with its own request states.

    ``decode`` holds one executor per batch bucket (S = 1); ``prefill`` takes any B and S, and is the only program of
    an encoder or a plain module. ``per_request`` is that of a decoder that attends to an encoder. ``embed`` makes
    vectors f[B, S, d] of token ids, where the prefill program takes those. ``greedy`` chooses tokens on the device.
    ``verify`` runs ``1 + spec.speculative_tokens`` tokens of one sequence, where there is such a program.
    ``turns`` is what a step waits for and holds while it runs; by default nothing.
    """

    turns: AbstractContextManager[object] = nullcontext()

    def __init__(
        self,
        decode: Sequence[Executor],
        prefill: Executor,
        spec: EngineSpec,
        per_request: Executor | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        greedy: GreedyKernels | None = None,
        verify: Executor | None = None,
    ) -> None:
        self.spec = spec
        self.verify_executor = verify
        self.greedy = greedy
        self.embed = embed
        self.prefill_executor = prefill
        self.per_request_executor = per_request
        self.decode_executors = {e.batch: e for e in sorted(decode, key=lambda e: e.batch)}
        self.idle = IdleStates(spec)
        self._compiled_before = self._compiled()

    @property
    def buckets(self) -> tuple[int, ...]:
        """Batch sizes that decode programs exist for, smallest first."""
        return tuple(self.decode_executors)

    @property
    def max_batch(self) -> int:
        """Largest batch that a request may have."""
        return max(self.buckets)

    def bucket(self, batch: int) -> int:
        """The smallest bucket that holds ``batch`` sequences. Raises InputError beyond the largest one."""
        for size in self.buckets:
            if batch <= size:
                return size
        raise InputError(
            f"a batch of {batch} sequences (beams and returned sequences count) is larger than the largest of "
            f"batch_sizes={self.buckets}; compile with batch_sizes=(..., {batch}) or split the batch"
        )

    def new_state(self, batch: int) -> RequestState:
        """An empty request state for ``batch`` sequences. Raises InputError for a batch beyond the largest bucket."""
        if batch < 1:
            raise InputError("an empty batch: pass at least one sequence")
        return self.idle.take(batch, self.bucket(batch))

    def give_back(self, state: RequestState) -> None:
        """Say that a request is over, so that a later one may have its state; the caller must not use it any more."""
        self.idle.give_back(state)

    def check_length(self, total: int) -> None:
        """Raise InputError when a sequence of ``total`` tokens does not fit the state."""
        if total > self.spec.max_length:
            raise InputError(
                f"{total} tokens (prompt plus new ones) do not fit max_length={self.spec.max_length}; compile with "
                f"max_length={total} or more, or ask for fewer tokens"
            )

    @property
    def compiled_while_running(self) -> int:
        """Kernels that were compiled, or read from disk, since the engine was made: 0 where all were ready."""
        return self._compiled() - self._compiled_before

    def _compiled(self) -> int:
        own = (
            *self.decode_executors.values(),
            self.prefill_executor,
            self.per_request_executor,
            self.verify_executor,
            self.greedy,
        )
        return sum(each.compiled for each in own if isinstance(each, Compiling))

    # Decoders

    def begin(self, state: RequestState, given: Mapping[str, Tensor | None]) -> None:
        """Compute what the steps of an empty request read unchanged, of what ``spec.per_request`` asks for: for an
        encoder-decoder encoder_hidden_states f[B, E, d] and encoder_attention_mask [B, E].

        Raises InputError for what is missing or does not fit.
        """
        per_request, executor = self.spec.per_request, self.per_request_executor
        assert per_request is not None
        assert executor is not None
        dims: dict[str, int] = {"B": state.batch}
        ready = {s.name: self._check_input(s, given.get(s.name), dims) for s in per_request.asked}
        self._check_sizes(dims)
        state.hold(dims)
        held = {name: tensor[: state.batch] for name, tensor in state.held.tensors.items()}
        outputs = {f"output{n}": held[spec.name] for n, spec in enumerate(per_request.results)}
        executor.run({s.name: ready[s.name] for s in per_request.inputs}, dims, state, outputs)
        state.held.ready = True
        self.change_given(state, ready)

    def change_given(self, state: RequestState, given: Mapping[str, Tensor]) -> None:
        """Replace, from here on, what steps of a request read just as it is given: encoder_attention_mask [B, E]."""
        assert self.spec.per_request is not None
        for spec in self.spec.per_request.given:
            if (value := given.get(spec.name)) is not None:
                dims = {"B": state.batch, **state.held.dims}
                state.held.tensors[spec.name][: state.batch] = self._check_input(spec, value, dims)

    def step(
        self,
        state: RequestState,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        keep: int = 0,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Append tokens to a request and return the logits of its last ``keep`` positions (0: of all).

        ``input_ids`` is i64[B, S] (i32 also goes), ``attention_mask`` [B, past + S] or None for all ones, and
        ``position_ids`` [B, S] or [1, S] or None; [3, B, S] where the positions of a prompt are of several numbers.
        ``given`` is what else a prompt says of its tokens, as ``spec.prompt_inputs`` names it: vectors f[B, S, d] other
        than the model's own, and the last keys i64[B, S] that they see, of the context. Returns logits[B, keep, V], a
        fresh tensor. Raises InputError for inputs that do not fit, and leaves the state as it was.
        """
        ids, positions, given = self._checked(state, input_ids, attention_mask, position_ids, given)
        with self.turns:
            try:
                return self._append(state, ids, attention_mask, positions, keep, given)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self.idle.make_room():
                    raise
            return self._append(state, ids, attention_mask, positions, keep, given)

    def prompt(self, state: RequestState, input_ids: Tensor, position_ids: Tensor | None = None) -> Pieces:
        """As :meth:`step` for its last position, [B, 1, V], a piece at a time: it yields after each, and other requests
        may be served meanwhile. One that is closed before its end leaves the state as it was."""
        ids, positions, _ = self._checked(state, input_ids, None, position_ids, None)
        return self._appended(state, ids, None, positions, 1, {})

    def _checked(
        self,
        state: RequestState,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        given: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None, Mapping[str, Tensor]]:
        """What a step is to run, on the model's device. Raises InputError for what does not fit."""
        if self.spec.per_request is not None and not state.held.ready:
            raise InputError("the cache is empty, and there are no states of an encoder to attend to")
        ids = self._check_ids(state, input_ids)
        self._check_mask(state, ids, attention_mask)
        if position_ids is not None:
            position_ids = self._check_positions(ids, position_ids)
        return ids, position_ids, self._check_given(ids, given or {})

    def _append(self, state: RequestState, *arguments: Any) -> Tensor:
        """As :meth:`step`, on arguments that have been checked."""
        pieces = self._appended(state, *arguments)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                logits: Tensor = end.value
                return logits

    def _appended(
        self,
        state: RequestState,
        ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        keep: int,
        given: Mapping[str, Tensor],
    ) -> Pieces:
        """Append checked tokens, a piece at a time."""
        with state.undone_on_failure():
            self._write_mask(state, attention_mask, state.length + ids.shape[1])
            positions = self._positions(state, ids) if position_ids is None else position_ids
            keep = ids.shape[1] if keep == 0 else min(keep, ids.shape[1])
            if 1 < ids.shape[1] <= self.room_for_guesses(state) + 1 and not given and positions.ndim == 2:
                state.positions[state.batch :] = 0  # rows beyond the batch count on with it in steps of one
                return self.verify(state, ids[0].tolist(), positions)[:, -keep:].clone()
            if ids.shape[1] > 1 or given or positions.ndim > 2:
                return (yield from self._prefill(state, ids, positions, keep, given))
            state.ids[: state.batch] = ids
            state.positions.zero_()  # also of rows beyond the batch, which count on with the others
            state.positions[: state.batch] = positions
            self.advance(state)
            return clone(state.logits[: state.batch])

    def advance(self, state: RequestState) -> None:
        """One decode step on ``state.ids`` and ``state.positions`` into ``state.logits``, without checks or allocation.

        The caller guarantees that there is room and that the ids are in range; the new key counts as attended to
        unless the mask at its position says otherwise.
        """
        dims = state.step_dims
        dims["T"] = state.length + 1
        self.decode_executors[state.rows].run(state.step_inputs, dims, state, state.step_outputs)
        state.length += 1

    def room_for_guesses(self, state: RequestState) -> int:
        """How many guessed tokens :meth:`verify` can take for a request beside its next one; 0 where it cannot run."""
        guesses = self.spec.speculative_tokens
        fits = state.batch == 1 and state.length + 1 + guesses <= self.spec.max_length
        return guesses if self.verify_executor is not None and fits else 0

    def verify(self, state: RequestState, tokens: Sequence[int], positions: Tensor | None = None) -> Tensor:
        """Append tokens, up to one more than :meth:`room_for_guesses`, to a request of one sequence, without checks or
        allocation. positions: i64[1, n], by default those that come next.

        Returns logits[1, n, V] of each, in memory that the next such step writes anew. Those after a wrong guess are to
        be taken back, by ``RequestState.take_back``.
        """
        assert self.verify_executor is not None
        window, count, size = state.window, len(tokens), self.spec.speculative_tokens + 1
        write(window.tokens[:count], tokens)
        last = quick(state.positions)
        window.positions[:count] = (
            last[0] + window.count[:count] if positions is None else quick(positions[0])
        )
        # What is behind the tokens is computed and never read. Positions no further than theirs, by which rotary
        # frequencies may be chosen.
        window.positions[count:] = window.positions[count - 1]
        dims = {**state.step_dims, "B": 1, "S": size, "T": state.length + size, "L": size}
        self.verify_executor.run(window.inputs, dims, state, window.outputs)
        state.length += count
        last[:1] = window.positions[count - 1]
        return window.logits[:, :count]

    def device_step(self, state: RequestState) -> Callable[[], None] | None:
        """The launches of a decode step without the host's part, to be recorded; see ``DeviceStepping``."""
        executor = self.decode_executors[state.rows]
        return executor.device_step(state) if isinstance(executor, DeviceStepping) else None

    def _prefill(
        self,
        state: RequestState,
        ids: Tensor,
        positions: Tensor,
        keep: int,
        given: Mapping[str, Tensor],
    ) -> Pieces:
        """Run the prompt in chunks, so that the arena does not grow with it. Returns logits[B, keep, V]."""
        spec, batch, total = self.spec, state.batch, ids.shape[1]
        tokens = completed(spec, ids, state.length, given, self.embed)
        several = positions.ndim > 2
        # Of several numbers the next token comes after all, in whichever direction they are.
        last = positions.amax((0, 2)).unsqueeze(1) if several else positions[:, -1:]
        if self.position_axes > 1:
            positions = positions.expand(self.position_axes, batch, total)
        reached = positions.max().add(1).view(1) if spec.has_input("call_length") else state.no_length
        name, first_kept = spec.outputs[0].name, total - keep
        parts: list[Tensor] = []
        for start, stop in pieces(spec, total, state.length, tokens):
            kept = max(1, stop - max(start, first_kept))
            inputs = {
                "input_ids": aligned(ids[:, start:stop]),
                "position_ids": aligned(positions[..., start:stop]),
                "attention_mask": state.mask,
                "call_length": reached,
                **{name: tensor[:batch] for name, tensor in state.held.tensors.items()},
                **{name: aligned(tensor[:, start:stop]) for name, tensor in tokens.items()},
            }
            dims = {"B": batch, "S": stop - start, "T": state.length + stop - start, "L": kept}
            dims |= state.held.dims
            logits = spec.outputs[0].empty(dims, spec.device)
            self.prefill_executor.run(inputs, dims, state, {name: logits})
            state.length += stop - start
            if stop > first_kept:
                parts.append(logits)
            if stop < total:
                yield
        # The last position, whatever rule produced it, is what decoding counts on from.
        state.positions.zero_()
        state.positions[:batch] = last
        if several:
            state.count_on()
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return logits[:, -keep:]  # a model without a head gives every position

    def _positions(self, state: RequestState, ids: Tensor) -> Tensor:
        """Default position ids, i64[B, S], by the model's own rule; the mask has been written already."""
        total = state.length + ids.shape[1]
        if self.spec.positions == "mask":
            mask = state.mask[: state.batch, :total].to(torch.int64)
            return (mask.cumsum(1) * mask - 1)[:, state.length :]
        return torch.arange(state.length, total, device=self.spec.device) + state.shift[: state.batch]

    def _write_mask(self, state: RequestState, attention_mask: Tensor | None, total: int) -> None:
        if attention_mask is not None:
            state.mask[: state.batch, :total] = attention_mask != 0
            state.padded = True
        elif state.padded:
            state.mask[: state.batch] = True
            state.padded = False

    # Validation

    def _check_ids(self, state: RequestState, ids: Tensor) -> Tensor:
        ids = self.check_prompt(ids)
        if ids.shape[0] != state.batch:
            raise InputError(
                f"input_ids has {ids.shape[0]} rows, but its cache holds {state.batch} sequences; pass the cache that "
                "belongs to this batch"
            )
        self.check_length(state.length + ids.shape[1])
        return ids

    def check_prompt(self, ids: Tensor) -> Tensor:
        """The token ids as i64[B, S] on the model's device. Raises InputError when they are no such thing."""
        if not isinstance(ids, Tensor):
            raise InputError(f"input_ids must be a tensor of shape [batch, tokens], got {type(ids).__name__}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"input_ids must be of dtype int64, got {ids.dtype}; pass the tokenizer's ids")
        if ids.ndim != 2:
            raise InputError(f"input_ids must be of shape [batch, tokens], got {tuple(ids.shape)}")
        if ids.numel() == 0:
            raise InputError(f"input_ids is empty ({tuple(ids.shape)}); a prompt needs at least one token")
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or (self.spec.vocab_size and high >= self.spec.vocab_size):
            raise InputError(
                f"token id {low if low < 0 else high} is out of range: the vocabulary has {self.spec.vocab_size} "
                "entries; is this the model's own tokenizer?"
            )
        return ids.to(self.spec.device, torch.int64)

    def _check_mask(self, state: RequestState, ids: Tensor, mask: Tensor | None) -> None:
        expected = (state.batch, state.length + ids.shape[1])
        if mask is None:
            return
        require_mask("attention_mask", mask)
        if tuple(mask.shape) != expected:
            raise InputError(
                f"attention_mask must be of shape {expected}, [batch, past + new tokens], got {tuple(mask.shape)}"
            )

    @property
    def position_axes(self) -> int:
        """How many numbers the position of a token in a prompt is."""
        spec = self.spec.input("position_ids")
        return int(spec.type.shape[0]) if spec is not None and spec.type.rank > 2 else 1

    def _check_given(self, ids: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = {spec.name: spec for spec in self.spec.prompt_inputs}
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"a prompt of this model does not take {unknown[0]}")
        dims = {"B": ids.shape[0], "S": ids.shape[1]}
        return {name: self._check_input(known[name], tensor, dims) for name, tensor in given.items()}

    def _check_positions(self, ids: Tensor, positions: Tensor) -> Tensor:
        require_tensor("position_ids", positions)
        if positions.dtype not in (torch.int64, torch.int32):
            raise InputError(f"position_ids must be of dtype int64, got {positions.dtype}")
        axes = self.position_axes if positions.ndim > 2 else 1
        expected = tuple(ids.shape) if axes == 1 else (axes, *ids.shape)
        if tuple(positions.shape) not in (expected, (*expected[:-2], 1, ids.shape[1])):
            raise InputError(f"position_ids must be of shape {expected}, got {tuple(positions.shape)}")
        low, high = (int(v) for v in torch.aminmax(positions))
        # Where positions count the mask, tokens before the first attended one are at -1.
        if high >= self.spec.max_length or low < (-1 if self.spec.positions == "mask" else 0):
            raise InputError(
                f"position {high if low >= 0 else low} is outside of 0 to max_length - 1 = {self.spec.max_length - 1}"
            )
        if (spec := self.spec.input("position_ids")) is not None:
            check_bounds(spec, positions)
        return positions.to(self.spec.device, torch.int64).expand(*expected)

    # Encoders and plain modules

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a model without KV state once: the spec's inputs by name to its outputs by name.

        Dim symbols are read off the inputs' shapes. An encoder runs a batch larger than its program's in several goes,
        since its rows do not depend on each other. Raises InputError for a missing, unknown or misshapen input.
        """
        unknown = set(inputs) - {i.name for i in self.spec.inputs}
        if unknown:
            raise InputError(
                f"unknown inputs {sorted(unknown)}; this model takes {[i.name for i in self.spec.inputs]}"
            )
        dims: dict[str, int] = {}
        ready = {i.name: self._check_input(i, inputs.get(i.name), dims) for i in self.spec.inputs}
        rows = self.spec.rows_at_once(dims)
        if self.spec.is_per_row and dims.get("B", 0) > rows > 0:
            parts = [
                self.forward({n: t[i : i + rows] for n, t in ready.items()})
                for i in range(0, dims["B"], rows)
            ]
            return {o.name: torch.cat([p[o.name] for p in parts]) for o in self.spec.outputs}
        self._check_sizes(dims)
        outputs = {o.name: o.empty(dims, self.spec.device) for o in self.spec.outputs}
        state = self.idle.take(0, 0)
        self.prefill_executor.run(ready, dims, state, outputs)
        self.idle.give_back(state)
        return outputs

    def _check_sizes(self, dims: Mapping[str, int]) -> None:
        for name, low, high in self.spec.symbols:
            if name in dims and not low <= dims[name] <= high:
                remedy = ""
                if name in ("S", "E") and high == self.spec.max_length:
                    remedy = f"; compile with max_length={dims[name]} or more, if the model can, or pass a shorter text"
                raise InputError(f"dim {name} is {dims[name]}, but this model takes {low} to {high}{remedy}")
        if 0 < (rows := self.spec.rows_at_once(dims)) < dims.get("B", 0):
            raise InputError(
                f"a batch of {dims['B']} at these sizes is more than the {rows} that memory is planned for; compile "
                f"with batch_sizes=({dims['B']},) or split the batch"
            )

    def _check_input(self, spec: TensorSpec, value: Tensor | None, dims: dict[str, int]) -> Tensor:
        if value is None:
            raise InputError(f"input {spec.name!r} is missing")
        require_tensor(spec.name, value)
        if spec.dtype == torch.bool:
            require_mask(spec.name, value)
        same_kind = value.is_floating_point() == spec.dtype.is_floating_point
        if not same_kind or (spec.dtype.is_floating_point and value.dtype != spec.dtype):
            raise InputError(f"{spec.name} must be of dtype {spec.dtype}, got {value.dtype}")
        expected = tuple(dims.get(str(d), d) for d in spec.type.shape)
        fits = len(expected) == value.ndim and all(
            e == n or getattr(e, "is_Symbol", False) for e, n in zip(expected, value.shape, strict=False)
        )
        if not fits:
            shape = ", ".join(map(str, expected))
            raise InputError(f"{spec.name} must be of shape [{shape}], got {list(value.shape)}")
        if value.numel() == 0:
            raise InputError(f"{spec.name} is empty: shape {tuple(value.shape)}")
        dims.update({str(d): n for d, n in zip(spec.type.shape, value.shape, strict=True) if d.is_Symbol})
        if spec.name == "input_ids" and self.spec.vocab_size:
            self.check_prompt(value)
        if spec.dtype == torch.bool and value.dtype != torch.bool:
            value = value != 0
        check_integers(spec, value)
        check_bounds(spec, value)
        return aligned(value.to(self.spec.device, spec.dtype))
