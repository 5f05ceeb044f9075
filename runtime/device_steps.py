"""Decode steps on a GPU: a whole step, from one token to the next, needs nothing of the host and is recorded once.

Choosing a token, padding finished rows, counting positions and keeping the result are operations on the device like
the model's kernels. So a recording of all of them (a CUDA graph) is replayed once per token, and the host looks only
now and then at whether any row is still open, at a value that was on its way since its last look: it never waits for
the step just launched. What was computed after all rows had ended is taken back, drawn random numbers included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from .cuda_graph import Recorder, alone
from .engine import Engine
from .kv_state import RequestState
from .sampling import GenerateOptions, sample_on_device


class DeviceSteps:
    """As :class:`HostSteps`, for any device. every: steps between two looks of the host at which rows are open.

    recorder: makes a replay of a step; None launches every step anew. The first step that the model runs is launched,
    since recording needs all kernels loaded. Where a step cannot be recorded, the executor may still record the model's
    part.
    """

    def __init__(
        self,
        engine: Engine,
        state: RequestState,
        options: GenerateOptions,
        sequences: Tensor,
        length: int,
        every: int,
        recorder: Recorder | None,
    ) -> None:
        self.engine, self.state, self.options, self.sequences = engine, state, options, sequences
        self.every, self.recorder = every, recorder
        self.calls = 0
        self.replay: Callable[[], None] | None = None
        self.look: Callable[[], bool] = lambda: True
        batch, device = state.batch, sequences.device
        self.logits, self.ids = state.logits[:batch, 0], state.ids[:batch]
        self.pad = options.checked_pad_id() if options.eos_ids else None
        with torch.inference_mode(
            False
        ):  # what a recording updates must be updatable outside of inference mode
            self.scores = torch.empty(self.logits.shape, device=device)
            self.eos = torch.tensor(options.eos_ids, dtype=torch.int64, device=device)
            self.open = torch.ones(batch, 1, dtype=torch.bool, device=device)
            self.column = torch.full((1,), length, dtype=torch.int64, device=device)
        self.forbids = bool(options.eos_ids) and length < options.min_length
        self.draws = _Draws(device, 2 * every) if options.sampling and options.eos_ids and every > 1 else None

    def first(self) -> None:
        """Choose a token by the logits that are there."""
        with alone:
            self._choose()
        self._count()

    def next(self) -> None:
        """Run the model on the token chosen last, and choose the one after it."""
        if self.replay is not None:
            self.replay()
            self.state.length += 1
        else:
            self.state.positions.add_(1)
            self.engine.advance(self.state)
            with alone:
                self._choose()
            self._record()
        self._count()

    def finished(self) -> bool:
        """True when the last look found every row at its end; with ``every`` 1 it looks at the step just launched."""
        if self.pad is None or self.calls % self.every:
            return False
        now = _on_its_way(self.open.any())
        if self.every == 1:
            return not now()
        was_open, self.look = self.look(), now
        return not was_open

    def take_back(self, steps: int) -> None:
        """Make the random state what it was before the last ``steps`` steps."""
        if self.draws is not None:
            self.draws.take_back(steps)

    def _count(self) -> None:
        self.calls += 1
        if self.draws is not None:
            self.draws.note()

    def _choose(self) -> None:
        """logits -> ids and the next column of the sequences, on the device alone."""
        self.scores.copy_(self.logits)
        if self.forbids:
            # Whether the minimum is reached changes from step to step, so a recording has to ask.
            ends = self.scores.index_select(1, self.eos)
            too_early = self.column < self.options.min_length
            self.scores.index_copy_(1, self.eos, ends.masked_fill(too_early, -torch.inf))
        if self.options.sampling is None:
            torch.argmax(self.scores, dim=-1, keepdim=True, out=self.ids)
        else:
            self.ids.copy_(sample_on_device(self.scores, self.options.sampling))
        if self.pad is not None:
            self.ids.masked_fill_(~self.open, self.pad)
            self.open.logical_and_((self.ids != self.eos).all(1, keepdim=True))
        self.sequences.index_copy_(1, self.column, self.ids)
        self.column.add_(1)

    def _record(self) -> None:
        """Record a whole step, once, around the model's launches that count the context on the device."""
        recorder, self.recorder = self.recorder, None
        model = self.engine.device_step(self.state) if recorder is not None else None
        if recorder is None or model is None:
            return

        def step() -> None:
            self.state.positions.add_(1)
            model()
            self._choose()

        self.replay = recorder(step, self.sequences.device)


class _Draws:
    """The states of the default generator after the last draws. What other threads draw meanwhile is not kept apart."""

    def __init__(self, device: torch.device, most: int) -> None:
        self.generator = torch.default_generator
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.generator = torch.cuda.default_generators[index]
        self.after: deque[Tensor] = deque(maxlen=most + 1)

    def note(self) -> None:
        # A GPU's state is a seed and a count that the host keeps: no wait.
        self.after.append(self.generator.get_state())

    def take_back(self, draws: int) -> None:
        if draws:
            self.generator.set_state(self.after[-1 - draws])


def _on_its_way(flag: Tensor) -> Callable[[], bool]:
    """Start to copy a flag to the host; gives a function that waits for it."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(flag.device))

    def look() -> bool:
        arrived.synchronize()
        return bool(host)

    return look
