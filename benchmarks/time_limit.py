"""A limit in seconds for work in this process, for rivals whose compilers know none."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = 5.0
"""Seconds after which the alarm rings once more, should somebody have swallowed it."""


TOO_LATE = "not ready after"
"""What TimeUpError says, with the seconds behind it."""


class TimeUpError(BaseException):
    """The time of a block is over. Not an ``Exception``, which compilers catch and wrap."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeUpError in the block once ``seconds`` have passed.

    By an alarm, so in the main thread only, and as soon as the interpreter has its turn: a library that computes on
    without it is not interrupted. Blocks may not be nested.
    """

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TimeUpError(f"{TOO_LATE} {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
