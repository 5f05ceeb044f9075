"""Choosing the next token: temperature, top-k and top-p, in the order and with the arithmetic of transformers.

The same ``torch.multinomial`` on the same probabilities draws the same tokens from the same seed, so what is fast
here only avoids work whose result is known: after top-k, top-p needs to sort k values instead of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.ir.program import InputError

from .cuda_graph import alone


@dataclass(frozen=True)
class Sampling:
    """How to draw a token. Neutral values switch a step off: temperature 1, top_k 0, top_p 1."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise InputError(f"sampling needs temperature > 0, top_k >= 0 and 0 <= top_p <= 1, got {self}")


@dataclass(frozen=True)
class GenerateOptions:
    """When to stop and how to choose; ``sampling=None`` is greedy.

    ``max_length`` and ``min_length`` count prompt and new tokens together; below ``min_length`` no end-of-sequence
    token is chosen.
    """

    max_length: int
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    min_length: int = 0
    sampling: Sampling | None = None

    def checked_pad_id(self) -> int | None:
        """The pad token. Raises InputError where one is needed and there is none."""
        if self.eos_ids and self.pad_id is None:
            raise InputError("pad_id is needed to fill the rows that finish early; pass pad_id=eos_ids[0]")
        return self.pad_id


@dataclass(frozen=True)
class CustomOptions(GenerateOptions):
    """Of a sequence that has a row for itself, of which others say more than the fields above can.

    ``process`` changes scores f32[1, V] in view of the tokens i64[1, n] so far, before one is chosen; ``stops`` says by
    the tokens whether the last one was the last.
    """

    process: Callable[[Tensor, Tensor], Tensor] = lambda ids, scores: scores
    stops: Callable[[Tensor], bool] = lambda ids: False


def default_generator(device: torch.device) -> torch.Generator:
    """The one that PyTorch draws from on a device unless it is told otherwise."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def own_generator(device: torch.device) -> torch.Generator:
    """A generator that draws what PyTorch's own would draw from here on, which itself goes on from elsewhere.

    So a request that is alone after ``torch.manual_seed`` has the tokens of that seed, and two have different ones.
    """
    default, own = default_generator(device), torch.Generator(device)
    with alone:
        own.set_state(default.get_state())
        default.manual_seed(int(torch.randint(2**62, (1,), device=device, generator=default)))
    return own


def sample(scores: Tensor, how: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row from f32[B, V] logits, which may be overwritten. Returns i64[B, 1]. generator: what
    draws, by default PyTorch's own."""
    if how.temperature != 1.0:
        scores = scores.div_(how.temperature)
    if how.top_k:
        scores = _top_k_p(scores, min(how.top_k, scores.shape[-1]), how.top_p)
    elif how.top_p < 1.0:
        scores = _top_p(scores, how.top_p)
    return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1, generator=generator)


def sample_on_device(scores: Tensor, how: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """As :func:`sample`, with the same draws from the same random state, without a value that the host has to wait for.

    So a GPU can go on, and a CUDA graph hold it. It costs a sort of the vocabulary where top-k and top-p come together,
    and scores that are no numbers go unnoticed.
    """
    if how.temperature != 1.0:
        scores = scores.div_(how.temperature)
    if how.top_k:
        worst = torch.topk(scores, min(how.top_k, scores.shape[-1]))[0][:, -1:]
        scores = scores.masked_fill(scores < worst, -torch.inf)
    if how.top_p < 1.0:
        scores = _top_p(scores, how.top_p)
    # multinomial draws one of several like this, after checks of the probabilities for which the host waits.
    shares = torch.softmax(scores, dim=-1)
    return shares.div_(torch.empty_like(shares).exponential_(1, generator=generator)).argmax(
        dim=-1, keepdim=True
    )


def _top_k_p(scores: Tensor, k: int, top_p: float) -> Tensor:
    """Top-k, then top-p among the k: everything else becomes -inf."""
    best, index = torch.topk(scores, k)
    kept = scores >= best[:, -1:]
    if int(kept.sum()) != k * scores.shape[0]:
        # Several tokens tie with the k-th, and all of them stay.
        scores = scores.masked_fill(~kept, -torch.inf)
        return _top_p(scores, top_p) if top_p < 1.0 else scores
    if top_p < 1.0:
        best = _top_p(best.flip(-1), top_p, ascending=True).flip(-1)
    return torch.full_like(scores, -torch.inf).scatter_(1, index, best)


def _top_p(scores: Tensor, top_p: float, ascending: bool = False) -> Tensor:
    """Keep the smallest set of best tokens whose probabilities sum to top_p or more; at least one."""
    values, index = (scores, None) if ascending else torch.sort(scores, descending=False)
    removed = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    removed[:, -1:] = False
    if index is not None:
        removed = removed.scatter(1, index, removed)
    return scores.masked_fill(removed, -torch.inf)
