"""Our own decoding loop for greedy search and plain sampling, with as little host work per token as we can.

It gives the tokens that ``GenerationMixin._sample`` of transformers gives: finished rows are filled with the pad
token, and the loop ends when all rows are finished or the length is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tilewright.ir.program import InputError

from .engine import Engine, require_tensor
from .host import copy, one_torch_thread, quick
from .kv_state import RequestState
from .sampling import Sampling, sample


class Streamer(Protocol):
    """What transformers' streamers offer."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


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


def generate(
    engine: Engine,
    state: RequestState,
    input_ids: Tensor,
    options: GenerateOptions,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    streamer: Streamer | None = None,
    held: int = 0,
) -> Tensor:
    """Continue every row of ``input_ids``, i64[B, S]. Returns i64[B, n] with S < n <= max_length, prompt included.

    The first ``held`` ids are in ``state`` already and not run again. Raises InputError before any work when the prompt
    does not fit. A streamer is given each step's tokens, i64[B], but not the prompt.
    """
    ids = engine.check_prompt(input_ids)
    batch, prompt = ids.shape
    if options.max_length <= prompt:
        raise InputError(
            f"the prompt has {prompt} tokens already, but max_length={options.max_length}; raise it"
        )
    engine.check_length(state.length - held + options.max_length)
    fed = ids[:, held:]
    if position_ids is not None:
        require_tensor("position_ids", position_ids)
        position_ids = position_ids[:, -fed.shape[1] :]
        # Each new token but the last is run at the position after the one before it.
        engine.check_length(int(position_ids.max()) + options.max_length - prompt)
    sequences = ids.new_empty(batch, options.max_length)
    sequences[:, :prompt] = ids
    collected, chosen, positions = map(quick, (sequences, state.ids[:batch], state.positions))
    logits = engine.step(state, fed, attention_mask, position_ids, keep=1)
    copy(state.logits[:batch], logits)
    state.positions.zero_()
    # The last prompt position, whatever rule produced it, is what decoding counts on from.
    state.positions[:batch] = _last_position(engine, state, position_ids)
    choose = _chooser(state, options)
    finish = _Finish(options, batch)

    length = prompt
    while True:
        choose(length < options.min_length)
        done = finish(chosen)
        collected[:, length] = chosen[:, 0]
        length += 1
        if streamer is not None:
            streamer.put(sequences[:, length - 1].cpu())
        if done or length == options.max_length:
            break
        positions += 1
        engine.advance(state)
    if streamer is not None:
        streamer.end()
    return sequences if length == options.max_length else sequences[:, :length].clone()


def _last_position(engine: Engine, state: RequestState, position_ids: Tensor | None) -> Tensor:
    """Position of the last token that was run, i64[B, 1] or [1, 1]."""
    if position_ids is not None:
        return position_ids[:, -1:]
    last = torch.tensor([[state.length - 1]], device=state.mask.device)
    if engine.spec.positions == "mask":
        last = state.mask[: state.batch, : state.length].sum(1, keepdim=True, dtype=torch.int64) - 1
    return last


def _chooser(state: RequestState, options: GenerateOptions) -> Callable[[bool], None]:
    """A function that writes the next tokens into ``state.ids``; its argument forbids end-of-sequence tokens."""
    batch = state.batch
    logits, ids = state.logits[:batch, 0], state.ids[:batch]
    exact = logits if logits.dtype == torch.float32 else torch.empty(logits.shape, device=logits.device)
    widen = _widener(logits, exact)
    scores, tokens, eos = quick(exact), quick(ids), list(options.eos_ids)

    def choose(forbid_eos: bool) -> None:
        widen()
        if forbid_eos and eos:
            scores[:, eos] = -torch.inf
        if options.sampling is not None:
            with one_torch_thread(exact.device):
                ids.copy_(sample(exact, options.sampling))
        elif isinstance(scores, Tensor):
            torch.argmax(exact, dim=-1, keepdim=True, out=ids)
        else:
            # Of equal scores the first, as with torch, whose argmax takes several times as long on one long row.
            np.argmax(scores, axis=-1, out=tokens[:, 0])

    return choose


def _widener(logits: Tensor, exact: Tensor) -> Callable[[], object]:
    """A function that copies logits into float32, where they are not."""
    if exact is logits:
        return lambda: None
    if logits.device.type == "cpu" and logits.dtype == torch.bfloat16:
        # NumPy has no bfloat16, but that is the upper half of a float32.
        bits, wide = logits.view(torch.uint16).numpy(), exact.view(torch.uint32).numpy()
        return partial(np.left_shift, bits, 16, out=wide, dtype=np.uint32)
    target, source = quick(exact), quick(logits)
    return partial(target.__setitem__, slice(None), source)


class _Finish:
    """Tracks which rows have met an end-of-sequence token, and pads those that had met one before."""

    def __init__(self, options: GenerateOptions, batch: int) -> None:
        if options.eos_ids and options.pad_id is None:
            raise InputError("pad_id is needed to fill the rows that finish early; pass pad_id=eos_ids[0]")
        self.eos = frozenset(options.eos_ids)
        self.pad = options.pad_id
        self.open = [True] * batch

    def __call__(self, tokens: Any) -> bool:
        """Overwrite finished rows of i64[B, 1], a tensor or an array, by the pad token. Returns True when every row is
        finished."""
        if not self.eos:
            return False
        for row, (token,) in enumerate(tokens.tolist()):
            if not self.open[row]:
                tokens[row, 0] = self.pad
            elif token in self.eos:
                self.open[row] = False
        return not any(self.open)
