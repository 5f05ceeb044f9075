"""What the program that runs prompts takes of each token beside its id and position, and the pieces of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tilewright.ir.program import InputError

from .executor import EngineSpec


def completed(
    spec: EngineSpec,
    ids: Tensor,
    past: int,
    given: Mapping[str, Tensor],
    embed: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """What is given of the tokens i64[B, S] that come after ``past`` others, and for the rest what holds for texts:
    the model's own vectors, no others to add, and no key after a token that it sees."""
    found = dict(given)
    for wanted in spec.prompt_inputs:
        if wanted.name in found:
            continue
        if wanted.name == "inputs_embeds" and embed is not None:
            found[wanted.name] = embed(ids)
        elif wanted.dtype.is_floating_point:
            dims = {"B": ids.shape[0], "S": ids.shape[1]}
            found[wanted.name] = wanted.empty(dims, spec.device).zero_()
        else:
            found[wanted.name] = torch.arange(past, past + ids.shape[1], device=spec.device).expand(ids.shape)
    return found


def pieces(
    spec: EngineSpec, total: int, past: int, tokens: Mapping[str, Tensor]
) -> Iterator[tuple[int, int]]:
    """First token and end of each piece of a prompt: as long as may be, and no token sees one of a later piece.

    Raises InputError where tokens that see each other are more than a piece may have.
    """
    reaches = [tokens[i.name] for i in spec.reaches]
    last = torch.stack(reaches).amax((0, 1)).cummax(0).values.sub(past).tolist() if reaches else []
    start = 0
    while start < total:
        stop = min(start + spec.chunk, total)
        while last and stop > start and last[stop - 1] >= stop:
            stop -= 1
        if stop == start:
            raise InputError(
                f"{last[start] + 1 - start} tokens of a prompt see each other, but prompts run in pieces of "
                f"{spec.chunk} tokens; use the original model for this prompt"
            )
        yield start, stop
        start = stop
