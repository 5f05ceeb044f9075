"""Decode steps on a CPU: each token is chosen by the host, by NumPy wherever it can."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .engine import Engine
from .host import one_torch_thread, quick
from .kv_state import RequestState
from .row_chooser import widener
from .sampling import GenerateOptions, sample


class HostSteps:
    """Chooses tokens from ``state.logits``, one after the other, into the columns of ``sequences``, i64[B, max_length],
    behind the prompts i64[B, S]. Rows that have met an end-of-sequence token are filled with the pad token."""

    def __init__(
        self,
        engine: Engine,
        state: RequestState,
        options: GenerateOptions,
        prompt: Tensor,
    ) -> None:
        self.engine, self.state, self.options, self.length = engine, state, options, prompt.shape[1]
        self.eos, self.pad = frozenset(options.eos_ids), options.checked_pad_id()
        self.open = [True] * state.batch
        self.sequences = prompt.new_empty(state.batch, options.max_length)
        self.sequences[:, : self.length] = prompt
        self.collected = quick(self.sequences)
        self.positions = quick(state.positions)
        self.tokens = quick(state.ids[: state.batch])
        self.choose = _chooser(state, options)

    def first(self) -> None:
        """Choose a token by the logits that are there."""
        self.choose(self.length < self.options.min_length)
        self._pad()
        self.collected[:, self.length] = self.tokens[:, 0]
        self.length += 1

    def next(self) -> None:
        """Run the model on the token chosen last, and choose the one after it."""
        self.positions += 1
        self.engine.advance(self.state)
        self.first()

    def finished(self) -> bool:
        """True when every row has met its end."""
        return not any(self.open)

    def _pad(self) -> None:
        if not self.eos:
            return
        for row, (token,) in enumerate(self.tokens.tolist()):
            if not self.open[row]:
                self.tokens[row, 0] = self.pad
            elif token in self.eos:
                self.open[row] = False


def _chooser(state: RequestState, options: GenerateOptions) -> Callable[[bool], None]:
    """A function that writes the next tokens into ``state.ids``; its argument forbids end-of-sequence tokens."""
    batch = state.batch
    logits, ids = state.logits[:batch, 0], state.ids[:batch]
    exact = logits if logits.dtype == torch.float32 else torch.empty(logits.shape)
    widen = widener(logits, exact)
    scores, tokens, eos = quick(exact), quick(ids), list(options.eos_ids)

    def choose(forbid_eos: bool) -> None:
        widen()
        if forbid_eos and eos:
            scores[:, eos] = -torch.inf
        if options.sampling is not None:
            with one_torch_thread(exact.device):
                ids.copy_(sample(exact, options.sampling))
        else:
            # Of equal scores the first, as with torch, whose argmax takes several times as long on one long row.
            np.argmax(scores, axis=-1, out=tokens[:, 0])

    return choose
