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

_LOOK_EVERY = 8


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

    def checked_pad_id(self) -> int | None:
        """The pad token. Raises InputError where one is needed and there is none."""
        if self.eos_ids and self.pad_id is None:
            raise InputError("pad_id is needed to fill the rows that finish early; pass pad_id=eos_ids[0]")
        return self.pad_id


def generate(
    engine: Engine,
    state: RequestState,
    input_ids: Tensor,
    options: GenerateOptions,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    streamer: Streamer | None = None,
    held: int = 0,
    look_every: int | None = None,
) -> Tensor:
    """Continue every row of ``input_ids``, i64[B, S]. Returns i64[B, n] with S < n <= max_length, prompt included.

    The first ``held`` ids are in ``state`` already and not run again. Raises InputError before any work when the prompt
    does not fit. A streamer is given each step's tokens, i64[B], but not the prompt. look_every: steps between two
    looks of the host at which rows are finished; more than one lets a GPU run on meanwhile, and what it computed in
    vain is taken back. By default 8 for greedy search on a GPU without a streamer, else 1.
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
    if look_every is None:
        alone = streamer is None and options.sampling is None  # a draw in vain would move the random state
        look_every = _LOOK_EVERY if alone and ids.device.type == "cuda" else 1
    finish = (
        _Finish(options, batch) if look_every == 1 else _LateFinish(options, state.ids[:batch], look_every)
    )

    length = prompt
    while True:
        choose(length < options.min_length)
        done = finish(chosen if look_every == 1 else state.ids[:batch])
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
    if look_every > 1:
        ended = _first_end(sequences[:, prompt:length], options.eos_ids)
        state.crop(state.length - (length - prompt - ended))
        length = prompt + ended
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
        self.eos = frozenset(options.eos_ids)
        self.pad = options.checked_pad_id()
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


class _LateFinish:
    """As :class:`_Finish`, but rows are padded on the device, and the host looks now and then at whether any row is
    open, at a value that was on its way since the last look: it never waits for the step just launched."""

    def __init__(self, options: GenerateOptions, tokens: Tensor, every: int) -> None:
        self.pad, self.every, self.calls = options.checked_pad_id(), every, 0
        self.eos = torch.tensor(options.eos_ids, dtype=tokens.dtype, device=tokens.device)
        self.open = torch.ones_like(tokens, dtype=torch.bool)
        self.look: Callable[[], bool] = lambda: True

    def __call__(self, tokens: Tensor) -> bool:
        """Overwrite finished rows of i64[B, 1] by the pad token. Returns True when the last look found none open."""
        if self.pad is None or not self.eos.numel():
            return False
        tokens.masked_fill_(~self.open, self.pad)
        self.open &= ~torch.isin(tokens, self.eos)
        self.calls += 1
        if self.calls % self.every:
            return False
        was_open = self.look()
        self.look = _on_its_way(self.open.any())
        return not was_open


def _on_its_way(flag: Tensor) -> Callable[[], bool]:
    """Start to copy a flag to the host; gives a function that waits for it."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(flag.device))

    def look() -> bool:
        arrived.synchronize()
        return bool(host)

    return look


def _first_end(new: Tensor, eos_ids: tuple[int, ...]) -> int:
    """How many of the new tokens i64[B, n] count: up to the one with which the last row met its first end, or all."""
    if not eos_ids:
        return new.shape[1]
    ends = torch.isin(new, torch.tensor(eos_ids, dtype=new.dtype, device=new.device))
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])
    return int(first.max())
