"""What follows the model in a decode step on a device: the choice of a token, with all tensors that it takes.

Choosing, padding finished rows, counting positions and keeping the result are operations on the device like the model's
kernels. Their tensors stay where they are as long as the request state does, so that a recording of whole steps, made
for one request, serves the later ones in that state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cuda_graph import Recorder
from .greedy import GreedyKernels, Kept
from .kv_state import RequestState
from .sampling import GenerateOptions, Sampling, sample_on_device

_MOST = 4  # ways to choose that a state keeps; a recording of each holds memory on the device


@dataclass(frozen=True)
class Way:
    """How tokens are chosen and rows end, as far as it decides which operations there are. forbids: whether ends of
    sequences can come too early."""

    batch: int
    sampling: Sampling | None
    eos_ids: tuple[int, ...]
    pad: int | None
    forbids: bool

    @staticmethod
    def of(batch: int, options: GenerateOptions, length: int) -> Way:
        """The way of a request that begins with ``length`` tokens. Raises InputError when a pad token is missing."""
        return Way(
            batch,
            options.sampling,
            options.eos_ids,
            options.checked_pad_id() if options.eos_ids else None,
            bool(options.eos_ids) and length < options.min_length,
        )


class DeviceStep:
    """One way to choose tokens in one request state. greedy: kernels that do it where nothing is drawn, if there are
    any.

    sequences: i64[batch, max_length], prompts and what was chosen. open: bool[batch, 1], rows that have not met their
    end. replay: a recording of a whole step; None for one that was not recorded yet, or cannot be.
    """

    def __init__(self, state: RequestState, way: Way, greedy: GreedyKernels | None = None) -> None:
        self.way = way
        self.was_recorded = False
        self.replay: Callable[[], None] | None = None
        batch, device = way.batch, state.ids.device
        self.logits, self.ids, self.positions = state.logits[:batch, 0], state.ids[:batch], state.positions
        # What a recording updates must be updatable outside of inference mode.
        with torch.inference_mode(False):
            self.sequences = torch.zeros(batch, state.max_length, dtype=torch.int64, device=device)
            self.eos = torch.tensor(way.eos_ids, dtype=torch.int64, device=device)
            self.open = torch.ones(batch, 1, dtype=torch.bool, device=device)
            self.column = torch.zeros(1, dtype=torch.int64, device=device)
            self.least = torch.zeros(1, dtype=torch.int64, device=device)
            if greedy is None or way.sampling is not None:
                self.scores = torch.empty(self.logits.shape, device=device)
                self._choose = self._by_operations
            else:
                kept = Kept(
                    self.logits,
                    self.eos,
                    self.open,
                    self.ids,
                    self.sequences,
                    self.column,
                    self.least,
                    way.pad or 0,
                )
                self._choose = greedy.bind(kept, state.rows)

    @staticmethod
    def of(state: RequestState, way: Way, greedy: GreedyKernels | None = None) -> DeviceStep:
        """The state's step of that way, made when there is none; the ways used last are kept."""
        steps: dict[Way, DeviceStep] = state.scratch.setdefault(DeviceStep, {})
        step = steps.pop(way, None) or DeviceStep(state, way, greedy)
        steps[way] = step
        for oldest in list(steps)[:-_MOST]:
            del steps[oldest]
        return step

    def begin(self, prompt: Tensor, min_length: int) -> None:
        """Take the prompts i64[batch, S] of a request; tokens are written behind them."""
        length = prompt.shape[1]
        self.sequences[:, :length] = prompt
        self.open.fill_(True)
        self.column.fill_(length)
        self.least.fill_(min_length)

    def choose(self) -> None:
        """logits -> ids and the next column of the sequences, on the device alone."""
        self._choose()

    def _by_operations(self) -> None:
        """As :meth:`choose`, by operations of PyTorch."""
        self.scores.copy_(self.logits)
        if self.way.forbids:
            # Whether the minimum is reached changes from step to step, so a recording has to ask.
            ends = self.scores.index_select(1, self.eos)
            self.scores.index_copy_(1, self.eos, ends.masked_fill(self.column < self.least, -torch.inf))
        if self.way.sampling is None:
            torch.argmax(self.scores, dim=-1, keepdim=True, out=self.ids)
        else:
            self.ids.copy_(sample_on_device(self.scores, self.way.sampling))
        if self.way.pad is not None:
            self.ids.masked_fill_(~self.open, self.way.pad)
            self.open.logical_and_((self.ids != self.eos).all(1, keepdim=True))
        self.sequences.index_copy_(1, self.column, self.ids)
        self.column.add_(1)

    def record(self, recorder: Recorder, model: Callable[[], None]) -> None:
        """Record a whole step around the model's launches. What could not be recorded once is not tried again."""

        def step() -> None:
            self.positions.add_(1)
            model()
            self.choose()

        self.was_recorded = True
        self.replay = recorder(step, self.sequences.device)
