"""Turns: threads that compute one after the other, in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A lock that is fair, unlike Python's own, which a thread that asks again at once would have for ever.

    The thread whose turn it is may ask again within it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: deque[object] = deque()  # the first one has the turn
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                self._wait()
                self._owner = me
            self._depth += 1

    def _wait(self) -> None:
        mine = object()
        self._asked.append(mine)
        try:
            self._changed.wait_for(lambda: self._asked[0] is mine)
        except BaseException:  # interrupted: those behind need not wait for this one
            self._asked.remove(mine)
            self._changed.notify_all()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._asked.popleft()
                self._changed.notify_all()
