"""Turns: threads that compute one after the other, in the order in which they asked."""

from __future__ import annotations

import threading
from types import TracebackType


class Turns:
    """A lock that is fair, unlike Python's own, which a thread that asks again at once would have for ever.

    The thread whose turn it is may ask again within it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last, self._now = 0, 0
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                mine = self._last
                self._last += 1
                self._changed.wait_for(lambda: self._now == mine)
                self._owner = me
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._now += 1
                self._changed.notify_all()
