"""States of finished requests, kept for the next ones: for their memory, and for what is bound to it.

What is recorded of a decode step (a CUDA graph) holds addresses, so it serves every request whose tensors lie where
they lay then. A process that answers one request after the other in a batch bucket therefore records its step once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .executor import EngineSpec
from .host import stream_number
from .kv_state import RequestState

_MOST = 4  # some buckets, or some threads; each state holds the KV memory of a whole request


class IdleStates:
    """Makes request states, out of those that are over where it can. Beyond a few idle ones the oldest is dropped.

    A call returns before a GPU is done with it, so a state goes to requests of its own stream only. Any thread may call
    any method at any time, garbage collection included: there is no lock that it could hold already.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        # Each lets go of more memory that can be spared, and says whether there was any.
        self.others: list[Callable[[], bool]] = []
        self._idle: deque[RequestState] = deque(maxlen=_MOST)

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, batch: int, rows: int) -> RequestState:
        """An empty state for ``batch`` sequences in a bucket of ``rows``."""
        stream = stream_number(self.spec.device)
        for state in reversed(tuple(self._idle)):
            if (state.rows, state.stream) == (rows, stream):
                try:
                    self._idle.remove(state)
                except ValueError:  # another thread was faster
                    continue
                state.reset(batch)
                return state
        try:
            return RequestState(self.spec, batch, rows)
        except RuntimeError:  # memory is full
            if not self.make_room():
                raise
        return RequestState(self.spec, batch, rows)

    def make_room(self) -> bool:
        """Let go of all idle states, and of what else can be spared. False when there is nothing."""
        had_some = [bool(self._idle), *(let_go() for let_go in tuple(self.others))]
        self._idle.clear()
        return any(had_some)

    def give_back(self, state: RequestState) -> None:
        """Keep a state that nobody uses any more."""
        self._idle.append(state)
