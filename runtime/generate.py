"""Our own decoding loop for greedy search and plain sampling, with as little host work per token as we can.

It gives the tokens that ``GenerationMixin._sample`` of transformers gives: finished rows are filled with the pad
token, and the loop ends when all rows are finished or the length is reached.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tilewright.ir.program import InputError

from .checks import require_tensor
from .cuda_graph import Recorder, record
from .device_steps import DeviceSteps
from .engine import Engine
from .host import copy
from .host_steps import HostSteps
from .kv_state import RequestState
from .sampling import GenerateOptions

_LOOK_EVERY = 8


class Streamer(Protocol):
    """What transformers' streamers offer."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


def generate(
    engine: Engine,
    state: RequestState,
    input_ids: Tensor,
    options: GenerateOptions,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    streamer: Streamer | None = None,
    held: int = 0,
    logits: Tensor | None = None,
    look_every: int | None = None,
    recorder: Recorder | None = None,
) -> Tensor:
    """Continue every row of ``input_ids``, i64[B, S]. Returns i64[B, n] with S < n <= max_length, prompt included.

    The first ``held`` ids are in ``state`` already and not run again; all of them are, where ``logits`` [B, 1, V] are
    what the last one gave. Raises InputError, before a step is run, when the prompt and what is to come do not fit. A
    streamer is given each step's tokens, i64[B], but not the prompt.

    look_every: steps between two looks of the host at which rows are finished; more than one lets a GPU run on
    meanwhile, and what it computed in vain is taken back. By default 8 on a GPU without a streamer, else 1; always 1
    with recurrent layers, which cannot go back. recorder: what replays whole steps; by default CUDA graphs on a GPU.
    With either of them a CPU takes the steps of a GPU.
    """
    ids = engine.check_prompt(input_ids)
    batch, prompt = ids.shape
    fed = ids[:, held:]
    begun = state.length - held if logits is None else state.length - prompt
    position_ids = check_room(engine, ids, options, begun, position_ids, held)
    if logits is None:
        logits = engine.step(state, fed, attention_mask, position_ids, keep=1)
    copy(state.logits[:batch], logits)
    on_gpu = ids.device.type == "cuda"
    steps: HostSteps | DeviceSteps
    if on_gpu or look_every is not None or recorder is not None:
        every = look_every or (_LOOK_EVERY if on_gpu and streamer is None else 1)
        if engine.spec.recurrent:  # what such a layer has taken in cannot be taken back
            every = 1
        recorder = recorder or (_record_step if on_gpu else None)
        steps = DeviceSteps(engine, state, options, ids, every, recorder)
    else:
        steps = HostSteps(engine, state, options, ids)

    steps.first()
    length = prompt + 1
    while True:
        if streamer is not None:
            streamer.put(steps.sequences[:, length - 1].cpu())
        if steps.finished() or length == options.max_length:
            break
        steps.next()
        length += 1
    if streamer is not None:
        streamer.end()
    if isinstance(steps, DeviceSteps) and steps.every > 1:
        in_vain = length - prompt - _first_end(steps.sequences[:, prompt:length], options.eos_ids)
        steps.take_back(in_vain)
        state.crop(state.length - in_vain)
        length -= in_vain
    return steps.sequences[:, :length].clone()


def check_room(
    engine: Engine,
    ids: Tensor,
    options: GenerateOptions,
    begun: int = 0,
    position_ids: Tensor | None = None,
    held: int = 0,
) -> Tensor | None:
    """Raise InputError where a prompt i64[B, S], after ``begun`` tokens before it, and what is to come do not fit.

    Returns the positions of those tokens of the prompt that are to be run, all but the first ``held``.
    """
    prompt = ids.shape[1]
    if options.max_length <= prompt:
        raise InputError(
            f"the prompt has {prompt} tokens already, but max_length={options.max_length}; raise it"
        )
    engine.check_length(begun + options.max_length)
    if position_ids is not None:
        require_tensor("position_ids", position_ids)
        position_ids = position_ids[..., held - prompt :]
        # Each new token but the last is run at the position after the one before it.
        engine.check_length(int(position_ids.max()) + options.max_length - prompt)
    return position_ids


_record_step = partial(record, otherwise="decode steps go through the host")


def _first_end(new: Tensor, eos_ids: tuple[int, ...]) -> int:
    """How many of the new tokens i64[B, n] count: up to the one with which the last row met its first end, or all."""
    if not eos_ids:
        return new.shape[1]
    ends = torch.isin(new, torch.tensor(eos_ids, dtype=new.dtype, device=new.device))
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])
    return int(first.max())
