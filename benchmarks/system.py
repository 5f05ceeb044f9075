"""What is measured: a language model, run by one of the systems that are compared."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LeftOut(Exception):
    """A system that cannot be measured here; its text says why and what would help."""


class System(Protocol):
    """Times one model. Prompts are i64[1, S]; a ``batch`` of several runs the prompt that many times side by side.

    tasks: those of ``results.TASKS`` that this system is measured in.
    """

    @property
    def name(self) -> str: ...

    @property
    def batch(self) -> int: ...

    @property
    def tasks(self) -> frozenset[str]: ...

    def prefill(self, ids: Tensor) -> float:
        """Seconds to run a prompt from an empty cache to the logits of its last token."""
        ...

    def first_token(self, ids: Tensor) -> float:
        """Seconds until the first token after a prompt is there, with everything that the user waits for."""
        ...

    def decode(self, ids: Tensor, tokens: int) -> float:
        """Seconds for ``tokens`` greedy tokens after the first one, the prompt being in the cache already.

        Every call starts from the same state.
        """
        ...

    def bytes_per_step(self, context: int) -> int:
        """Bytes of weights, keys and values that one decode step has to read at this context."""
        ...

    def release(self) -> None:
        """Let go of the contexts that it holds, and of memory that waits for the next; it can go on all the same."""
        ...

    def close(self) -> None:
        """Release what garbage collection would not."""
        ...
