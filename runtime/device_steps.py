"""Decode steps on a GPU: a whole step, from one token to the next, needs nothing of the host and is recorded once.

A recording of a whole step (a CUDA graph) is replayed once per token, and the host looks only now and then at whether
any row is still open, at a value that was on its way since its last look: it never waits for the step just launched.
What was computed after all rows had ended is taken back, drawn random numbers included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from .cuda_graph import Recorder, alone
from .device_step import DeviceStep, Way
from .engine import Engine
from .kv_state import RequestState
from .sampling import GenerateOptions, default_generator


class DeviceSteps:
    """As :class:`HostSteps`, for any device. every: steps between two looks of the host at which rows are open.

    recorder: makes a replay of a step; None launches every step anew. The first step that the model runs in a state is
    launched, since recording needs all kernels loaded; later requests in that state replay all of theirs. Where a step
    cannot be recorded, the executor may still record the model's part.
    """

    def __init__(
        self,
        engine: Engine,
        state: RequestState,
        options: GenerateOptions,
        prompt: Tensor,
        every: int,
        recorder: Recorder | None,
    ) -> None:
        self.engine, self.state, self.every, self.recorder = engine, state, every, recorder
        self.step = DeviceStep.of(state, Way.of(state.batch, options, prompt.shape[1]), engine.greedy)
        self.step.begin(prompt, options.min_length)
        self.sequences = self.step.sequences
        self.calls = 0
        self.look: Callable[[], bool] = lambda: True
        self.replay: Callable[[], None] | None = None
        if recorder is not None and self.step.replay is not None and engine.device_step(state) is not None:
            self.replay = self.step.replay
        draws = options.sampling and options.eos_ids and every > 1
        self.draws = _Draws(self.sequences.device, 2 * every) if draws else None

    def first(self) -> None:
        """Choose a token by the logits that are there."""
        with alone:
            self.step.choose()
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
                self.step.choose()
            self._record()
        self._count()

    def finished(self) -> bool:
        """True when the last look found every row at its end; with ``every`` 1 it looks at the step just launched."""
        if self.step.way.pad is None or self.calls % self.every:
            return False
        now = _on_its_way(self.step.open.any())
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

    def _record(self) -> None:
        """Record a whole step, once, around the model's launches that count the context on the device."""
        if self.recorder is None or self.step.was_recorded:
            return
        if (model := self.engine.device_step(self.state)) is not None:
            self.step.record(self.recorder, model)
            self.replay = self.step.replay


class _Draws:
    """The states of the default generator after the last draws. What other threads draw meanwhile is not kept apart."""

    def __init__(self, device: torch.device, most: int) -> None:
        self.generator = default_generator(device)
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
