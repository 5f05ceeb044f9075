"""Whether what a compiled model will allocate fits its device: asked before weights are copied and kernels built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tilewright.errors import DeviceError
from tilewright.ir.program import STEPS, BufferKind, Program, concrete
from tilewright.runtime.device import device_facts

from .options import Options
from .report import size_text


@dataclass(frozen=True)
class Needs:
    """Bytes beyond the weights that the model holds already. prepared: weights in another form. kv: KV state of a
    request of the largest batch at max_length. arena: of such a request's decode steps and prompt."""

    prepared: int
    kv: int
    arena: int

    @staticmethod
    def of(programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options) -> Needs:
        """What the programs of a model with these weights ask for.

        A weight that is only rearranged takes the place of the original, so only forms of another dtype count.
        """
        own = {t.dtype for t in weights.values()}
        prepared = {
            b.name: int(b.type.nbytes)
            for p in programs
            for _, b in p.of_kind(BufferKind.param)
            if b.name not in weights and b.type.dtype.torch not in own
        }
        steps = [p.arena_bytes for p in programs if p.phase in STEPS]
        once = [p for p in programs if p.phase == "per_request"]
        # Of rival programs one stays; measuring the others is given up where memory does not suffice.
        rivals = [p.arena_bytes for p in programs if p.phase in ("prefill", "forward")]
        return Needs(
            prepared=sum(prepared.values()),
            kv=programs[-1].state_bytes_per_row * options.max_batch + sum(map(_most_held, once)),
            arena=max(steps, default=0) + sum(p.arena_bytes for p in once) + min(rivals, default=0),
        )

    @property
    def total(self) -> int:
        return self.prepared + self.kv + self.arena


def _most_held(program: Program) -> int:
    """Bytes that the results of a program take at its largest sizes."""
    results = [b.type for _, b in program.of_kind(BufferKind.output)]
    return max(
        sum(math.prod(concrete(t.shape, sizes)) * t.dtype.itemsize for t in results)
        for sizes in program.largest
    )


def require_memory(programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options) -> None:
    """Raise DeviceError, naming what needs how much and which options reduce it, when a model will not fit its GPU."""
    facts = device_facts(options.device)
    needs = Needs.of(programs, weights, options)
    if facts is None or needs.total <= facts.free_bytes:
        return
    storages = [t.untyped_storage() for t in weights.values()]
    held = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    parts = [
        f"{size_text(needs.kv)} for the KV state of {options.max_batch} sequences of max_length={options.max_length}",
        f"{size_text(needs.arena)} for intermediate results",
    ]
    remedies = ["smaller batch_sizes", "a smaller max_length"] if needs.kv else ["smaller batch_sizes"]
    if needs.prepared:
        parts.append(f"{size_text(needs.prepared)} for {options.weights} copies of the weights")
        remedies.append("no weights= (the original's stay beside the copies)")
    raise DeviceError(
        f"the compiled model needs {size_text(needs.total)} more on {options.device} ({facts.name}), where "
        f"{size_text(facts.free_bytes)} are free beside the model's own {size_text(held)}: {', '.join(parts)}. Pass "
        f"{' or '.join(remedies)}, or free memory of the device"
    )
