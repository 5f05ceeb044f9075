"""When tokens arrive: a streamer that notes the time of each, and what follows from it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Streamer(Protocol):
    """What ``generate(streamer=...)`` calls: ``put`` with the prompt [1, S], then with each token [1]."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Timing:
    """One answer: seconds to the first token, and from the first to the last of ``tokens``."""

    first: float
    rest: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Rate of decoding, the first token (which the prompt's pass gives) left out; 0 for a single token."""
        return (self.tokens - 1) / self.rest if self.rest > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, first after {self.first * 1000:.0f} ms, "
            f"then {self.tokens_per_second:.1f} tokens/s"
        )


class TimedStreamer:
    """Notes when each token comes, and hands everything on to ``inner`` where there is one."""

    def __init__(self, inner: Streamer | None = None) -> None:
        self.inner = inner
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:  # the prompt comes first, as a matrix
            self.times.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()

    def timing(self, start: float) -> Timing:
        """The times relative to ``start``, a value of ``time.perf_counter``."""
        return Timing(self.times[0] - start, self.times[-1] - self.times[0], len(self.times))
