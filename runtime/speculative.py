"""Speculative decoding of one sequence: guessed tokens are checked in one step, and those that are right are kept.

A step reads every weight, for one token or for eight. Tokens are chosen one after the other from the logits of such a
step, just as they would be without guesses, and the first that differs from its guess is the last that counts. So the
result is that of plain decoding, draw for draw where tokens are drawn. (Leviathan, Kalman, Matias: "Fast Inference from
Transformers via Speculative Decoding", 2023; guesses from the text itself: Saxena, "Prompt Lookup Decoding", 2023.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .engine import Engine
from .generate import check_room
from .host import quick, write
from .kv_state import RequestState
from .row_chooser import RowChooser
from .sequence import Sequence

Guess = Callable[[np.ndarray], np.ndarray]
"""Gives guesses of what follows some tokens, i64[n] each; none where it has no idea."""

_LONGEST_REST = 15
"""Steps without guesses after some that were all wrong, as a step that checks some takes longer: 1, then 3, 7 and so
on, until two at once are right, or all that there are. Not by the clock: where roundings matter, the same call is to
give the same tokens."""


@dataclass(frozen=True)
class PromptLookup:
    """Guesses that what came after the last few tokens when they occurred before comes again.

    The longest run of at most ``ngram`` last tokens that occurred before decides, and of its occurrences the latest
    that ``tokens`` others follow, or else the first.
    """

    tokens: int
    ngram: int = 2

    def __call__(self, known: np.ndarray) -> np.ndarray:
        for size in range(min(self.ngram, len(known) - 1), 0, -1):
            last = known[-size:]
            runs = np.lib.stride_tricks.sliding_window_view(known[:-1], size)
            ends = np.flatnonzero((runs == last).all(axis=1)) + size
            if len(ends):
                enough = ends[ends + self.tokens <= len(known)]
                end = enough[-1] if len(enough) else ends[0]
                return known[end : end + self.tokens]
        return known[:0]


def speculate(
    engine: Engine,
    state: RequestState,
    sequence: Sequence,
    guess: Guess,
    attention_mask: Tensor | None = None,
    held: int = 0,
) -> Tensor:
    """Continue a sequence, of which the first ``held`` tokens are in ``state`` already, or all where it has logits.

    Returns i64[1, n], prompt included. Raises InputError, before a step is run, when the prompt and what is to come do
    not fit. A streamer is given each token by itself, but not the prompt.
    """
    prompt = sequence.ids.shape[1]
    logits = sequence.logits
    begun = state.length - (held if logits is None else prompt)
    positions = check_room(engine, sequence.ids, sequence.options, begun, sequence.position_ids, held)
    if logits is None:
        logits = engine.step(state, sequence.ids[:, held:], attention_mask, positions, keep=1)
    steps = _Steps(engine, state, sequence)
    ended = steps.take(RowChooser(logits[:, -1:]))
    rest = wrong = 0
    while not ended:
        room = min(engine.room_for_guesses(state), sequence.options.max_length - sequence.length - 1)
        guesses = steps.known()[:0] if rest else guess(steps.known())[: max(room, 0)]
        rest = max(rest - 1, 0)
        if not len(guesses):
            ended = steps.one()
            continue
        before = sequence.length
        ended = steps.check(guesses)
        right = sequence.length - before - 1
        wrong = 0 if right >= min(2, len(guesses)) else wrong + (right == 0)
        rest = min(2**wrong - 1, _LONGEST_REST)
    sequence.finish()
    return sequence.done.result()


class _Steps:
    """Steps of one token, or of several, whose tokens become those of the sequence."""

    def __init__(self, engine: Engine, state: RequestState, sequence: Sequence) -> None:
        self.engine, self.state, self.sequence = engine, state, sequence
        self._tokens = np.empty(sequence.options.max_length, dtype=np.int64)
        self._tokens[: sequence.ids.shape[1]] = sequence.ids[0].cpu().numpy()
        self._one = RowChooser(state.logits[:1])
        self._several: list[RowChooser] = []
        self._input, self._positions = quick(state.ids[:1, 0]), quick(state.positions)

    def known(self) -> np.ndarray:
        """All tokens so far."""
        return self._tokens[: self.sequence.length]

    def take(self, chooser: RowChooser) -> bool:
        """Choose the next token. True when it is the last one."""
        (token,) = chooser.choose([self.sequence.choice])
        ended = self.sequence.take(token)
        self._tokens[self.sequence.length - 1] = self.sequence.tokens[-1]
        return ended

    def one(self) -> bool:
        """Run the last token, and choose the next."""
        write(self._input, [int(self.known()[-1])])
        self._positions += 1
        self.engine.advance(self.state)
        return self.take(self._one)

    def check(self, guesses: np.ndarray) -> bool:
        """Run the last token and guesses of those after it, and choose as many of these, and one more, as are right."""
        run = [int(self.known()[-1]), *map(int, guesses)]
        logits = self.engine.verify(self.state, run)
        if not self._several:
            whole = self.state.window.logits
            self._several = [RowChooser(whole[:, n : n + 1]) for n in range(whole.shape[1])]
        ended, right = False, 0
        try:
            for chooser in self._several[: logits.shape[1]]:
                ended = self.take(chooser)
                if ended or right == len(guesses) or int(self.known()[-1]) != run[right + 1]:
                    break
                right += 1
        finally:  # also where a streamer fails
            self.state.take_back(len(guesses) - right)
        return ended
