"""Speculative decoding of one sequence: guessed tokens are checked in one step, and those that are right are kept.

A step reads every weight, for one token or for eight. Tokens are chosen one after the other from the logits of such a
step, just as they would be without guesses, and the first that differs from its guess is the last that counts. So the
result is that of plain decoding, draw for draw where tokens are drawn. (Leviathan, Kalman, Matias: "Fast Inference from
Transformers via Speculative Decoding", 2023; guesses from the text itself: Saxena, "Prompt Lookup Decoding", 2023.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from torch import Tensor

from .engine import Engine
from .generate import check_room
from .host import quick, write
from .kv_state import RequestState
from .row_chooser import RowChooser
from .sequence import Sequence

Guess = Callable[[list[int]], tuple[list[int], int]]
"""Gives guesses of what follows the tokens of a sequence so far, none where it has no idea, and their kind, of which
some are as often right as others: the number of tokens that they followed before."""


class PromptLookup:
    """Guesses that what came after the last few tokens when they occurred before comes again. For one sequence.

    The longest run of at most ``ngram`` last tokens that occurred before decides, and of its occurrences the latest
    that ``tokens`` others follow, or else the first. The kind is the run's length.
    """

    NGRAM = 4

    def __init__(self, tokens: int, ngram: int = NGRAM) -> None:
        self.tokens, self.ngram = tokens, ngram
        self._followed: dict[tuple[int, ...], list[int]] = {}
        """Where runs end that a token follows, in the order of the text."""
        self._noted = 1

    def __call__(self, known: list[int]) -> tuple[list[int], int]:
        length = len(known)
        for end in range(self._noted, length):
            for size in range(1, min(self.ngram, end) + 1):
                self._followed.setdefault(tuple(known[end - size : end]), []).append(end)
        self._noted = max(length, 1)
        for size in range(min(self.ngram, length - 1), 0, -1):
            if ends := self._followed.get(tuple(known[-size:])):
                enough = bisect_right(ends, length - self.tokens)
                end = ends[enough - 1] if enough else ends[0]
                return known[end : end + self.tokens], size
        return [], 0


class Payoff:
    """Whether guesses of a kind save more than it costs to check them, going by those before.

    ``most``: guesses that a step can check. Such a step takes about 1 + most / 8 times as long as one of a single token
    (with seven guesses 1.2 to 2.6 times on CPUs), so that an eighth of them has to be right. A mean that fades counts
    them, from what is usual for the first; where it is too low, every 32nd chance is taken all the same. Not by the
    clock: where roundings matter, the same call is to give the same tokens.
    """

    NEEDED, KEPT, PATIENCE = 1 / 8, 0.6, 32

    def __init__(self, most: int) -> None:
        self.most = most
        self._share: dict[int, float] = {}
        self._missed: dict[int, int] = {}

    def worthwhile(self, kind: int) -> bool:
        """Whether to check guesses of this kind."""
        missed = self._missed.get(kind, 0) + 1
        if self._of(kind) >= self.NEEDED or missed == self.PATIENCE:
            missed = 0
        self._missed[kind] = missed
        return missed == 0

    def learn(self, kind: int, right: int) -> None:
        """So many guesses of this kind were right in one step."""
        self._share[kind] = self.KEPT * self._of(kind) + (1 - self.KEPT) * right / self.most

    def _of(self, kind: int) -> float:
        usual = 1 / 16 if kind == 1 else min(kind, 3) / 8
        return self._share.get(kind, usual)


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
    payoff = Payoff(engine.spec.speculative_tokens)
    while not ended:
        room = min(engine.room_for_guesses(state), sequence.options.max_length - sequence.length - 1)
        guesses, kind = guess(steps.known)
        guesses = guesses[: max(room, 0)]
        if not guesses or not payoff.worthwhile(kind):
            ended = steps.one()
            continue
        before = sequence.length
        ended = steps.check(guesses)
        payoff.learn(kind, sequence.length - before - 1)
    sequence.finish()
    return sequence.done.result()


class _Steps:
    """Steps of one token, or of several, whose tokens become those of the sequence; ``known`` are all so far."""

    def __init__(self, engine: Engine, state: RequestState, sequence: Sequence) -> None:
        self.engine, self.state, self.sequence = engine, state, sequence
        self.known: list[int] = sequence.ids[0].tolist()
        self._one = RowChooser(state.logits[:1])
        self._several: list[RowChooser] = []
        self._input, self._positions = quick(state.ids[:1, 0]), quick(state.positions)

    def take(self, chooser: RowChooser) -> bool:
        """Choose the next token. True when it is the last one."""
        (token,) = chooser.choose([self.sequence.choice])
        ended = self.sequence.take(token)
        self.known.append(self.sequence.tokens[-1])
        return ended

    def one(self) -> bool:
        """Run the last token, and choose the next."""
        write(self._input, self.known[-1:])
        self._positions += 1
        self.engine.advance(self.state)
        return self.take(self._one)

    def check(self, guesses: list[int]) -> bool:
        """Run the last token and guesses of those after it, and choose as many of these, and one more, as are right."""
        run = [self.known[-1], *guesses]
        logits = self.engine.verify(self.state, run)
        if not self._several:
            whole = self.state.window.logits
            self._several = [RowChooser(whole[:, n : n + 1]) for n in range(whole.shape[1])]
        ended, right = False, 0
        try:
            for chooser in self._several[: logits.shape[1]]:
                ended = self.take(chooser)
                if ended or right == len(guesses) or self.known[-1] != run[right + 1]:
                    break
                right += 1
        finally:  # also where a streamer fails
            self.state.take_back(len(guesses) - right)
        return ended
