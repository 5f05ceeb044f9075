"""One request that is decoded by itself or beside others: its prompt, its options, and what has come of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .generate import Streamer
from .kv_state import RequestState
from .prefix_cache import KnownSequence
from .row_chooser import Choice
from .sampling import CustomOptions, GenerateOptions


@dataclass
class Sequence:
    """One request: its prompt ``ids`` i64[1, S], the tokens chosen so far, and whom to tell of them.

    Of a prompt that has been run already there are the ``state`` that it left and the ``logits`` [1, 1, V] of its end;
    ``moved`` is called when the state is needed no more. ``weights``: those of one model may change; sequences share a
    beginning where this is equal.
    """

    ids: Tensor
    options: GenerateOptions
    position_ids: Tensor | None = None
    streamer: Streamer | None = None
    state: RequestState | None = None
    logits: Tensor | None = None
    moved: Callable[[], None] = lambda: None
    generator: torch.Generator | None = None
    weights: Hashable = None
    tokens: list[int] = field(default_factory=list)
    done: Future[Tensor] = field(default_factory=Future)

    @property
    def choice(self) -> Choice:
        """How its next token is chosen."""
        early = self.length < self.options.min_length
        seen = self.all_tokens() if isinstance(self.options, CustomOptions) else None
        return Choice(self.options, early, self.generator, seen)

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether its tokens say all: positions count up from 0, and nothing else is in its state."""
        positions = self.position_ids
        if self.logits is not None or positions is None:
            return self.logits is None
        count = torch.arange(self.ids.shape[1], device=positions.device)
        return positions.shape[-1] == len(count) and bool((positions == count).all())

    def known(self, length: int, parts: Callable[[], Mapping[str, Tensor]]) -> KnownSequence:
        """Its first ``length`` tokens as others may begin, and what a state holds of them."""
        tokens = np.array(self.ids[0].tolist() + self.tokens, dtype=np.int64)
        return KnownSequence(tokens[:length], self.weights, parts)

    @functools.cached_property
    def prompt_length(self) -> int:
        """Number of tokens of the prompt."""
        return self.ids.shape[1]

    @property
    def length(self) -> int:
        """Number of tokens, prompt and new ones."""
        return self.prompt_length + len(self.tokens)

    def all_tokens(self) -> Tensor:
        """Prompt and new tokens, i64[1, n]."""
        return torch.cat([self.ids, self.ids.new_tensor([self.tokens])], dim=1)

    def take(self, token: int | Exception) -> bool:
        """Note the next token. True when it is the last one. Raises what kept it from being chosen."""
        if isinstance(token, Exception):
            raise token
        self.tokens.append(token)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        if isinstance(self.options, CustomOptions) and self.options.stops(self.all_tokens()):
            return True
        return self.length == self.options.max_length or token in self.options.eos_ids

    def finish(self) -> None:
        """Tell those who wait."""
        if self.streamer is not None:
            self.streamer.end()
        self.done.set_result(self.all_tokens())
