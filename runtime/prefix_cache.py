"""What sequences left in memory when they ended, for prompts that begin as they did.

A later turn of a conversation repeats all that was said before it, and many prompts begin with the same instructions.
Keys and values of a token depend on nothing but the tokens before it, so those of a common beginning are copied instead
of computed. (As vLLM's automatic prefix caching and llama.cpp's ``cache_prompt``; here whole sequences are kept, and
compared token by token.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from .device import is_out_of_memory
from .engine import Engine
from .kv_state import RequestState


@dataclass(frozen=True, eq=False)
class KnownSequence:
    """Tokens i64[n] that have been run with certain ``weights``, and what a request state holds after them.

    ``parts`` gives that by the names of the state's buffers: keys and values [heads, n, head_dim], and what recurrent
    layers remember, which stands for all n tokens and for no fewer.
    """

    tokens: np.ndarray
    weights: Hashable
    parts: Callable[[], Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts().values())

    def copy(self) -> KnownSequence:
        """The same in memory of its own."""
        copies = {name: part.clone() for name, part in self.parts().items()}
        return replace(self, parts=lambda: copies)

    def common(self, tokens: np.ndarray) -> int:
        """Number of tokens with which both begin."""
        most = min(len(self.tokens), len(tokens))
        differ = np.flatnonzero(self.tokens[:most] != tokens[:most])
        return int(differ[0]) if len(differ) else most


class PrefixCache:
    """Keeps copies of sequences, up to ``nbytes`` bytes of them; those that were not used for longest go first. With 0
    bytes it knows of none.

    One thread uses it, but :meth:`clear` may come from any.
    """

    def __init__(self, engine: Engine, nbytes: int) -> None:
        self.nbytes = nbytes
        self.reused = 0  # tokens that were not computed anew
        self._recurrent = bool(engine.spec.recurrent)
        self._kept: list[KnownSequence] = []  # the one used last at the end

    def __len__(self) -> int:
        return len(self._kept)

    def begin(
        self,
        state: RequestState,
        tokens: np.ndarray,
        weights: Hashable = None,
        running: Iterable[KnownSequence] = (),
    ) -> int:
        """Fill an empty state of one row with as much of a prompt i64[S] as is known, of sequences that are kept or
        still ``running``. Returns how many tokens that is: at least the last of a prompt is left to be run.
        """
        if not self.nbytes:
            return 0
        best, most = None, 0
        for known in (*self._kept, *running):
            if known.weights == weights and (held := self._usable(known, tokens)) > most:
                best, most = known, held
        if best is None:
            return 0
        found = best.parts()
        for name, part in state.row(0, 0, most).items():
            part.copy_(found[name] if name in state.recurrent.buffers else found[name][:, :most])
        state.length = most
        self.reused += most
        self._note_use(best)
        return most

    def keep(self, known: KnownSequence) -> None:
        """Keep a copy of a sequence, in place of those that it continues. Does nothing where memory is full."""
        size = known.nbytes
        if size > self.nbytes:
            return
        kept = tuple(self._kept)
        for other in kept:
            if other.weights == known.weights and self._replaces(other, known):
                self._note_use(other)
                return
        left = [o for o in kept if not (o.weights == known.weights and self._replaces(known, o))]
        while left and sum(o.nbytes for o in left) + size > self.nbytes:
            del left[0]
        self._kept = left  # what goes is let go of before its place is taken
        try:
            left.append(known.copy())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.clear()

    def clear(self) -> bool:
        """Let all sequences go. False when there are none."""
        had_some, self._kept = bool(self._kept), []
        return had_some

    def _usable(self, known: KnownSequence, tokens: np.ndarray) -> int:
        """How many tokens of a prompt need not be run, given a sequence that begins like it."""
        held = min(known.common(tokens), len(tokens) - 1)
        return held if held == len(known.tokens) or not self._recurrent else 0

    def _replaces(self, one: KnownSequence, other: KnownSequence) -> bool:
        """Whether all that the other one can be used for, the first can, too."""
        same = one.common(other.tokens) == len(other.tokens)
        return same and (len(one.tokens) == len(other.tokens) or not self._recurrent)

    def _note_use(self, known: KnownSequence) -> None:
        kept = self._kept  # which another thread may let go of meanwhile
        if known in kept:
            kept.remove(known)
            kept.append(known)
