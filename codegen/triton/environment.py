"""What printing a program's kernels depends on besides the kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tilewright.codegen.tunables import NONE, Tunables, tuned
from tilewright.ir.module import Op
from tilewright.ir.program import BufferKind, Program
from tilewright.ir.types import Value

from .candidates import interpreter_tile, ranked
from .cost_model import seconds
from .device import H100, Device
from .plan import Plan
from .pointwise_ops import prelude
from .tiling import Tile
from .unpack import unpacking
from .work import Sizes, Work, sizes_of


@dataclass(frozen=True)
class Environment:
    """What printing a kernel depends on besides the kernel: capacity of T, largest dims, target, tuned sizes.

    stored: dims that kernels read from memory, so that a recorded launch (a CUDA graph) serves every size of them.
    constants: kernel name -> its operands that are weights, which no kernel writes. first: the kernel that a run begins
    with; what comes before it is not ours, and writes the stored dims, so it starts when all of that is done.
    """

    capacity: int
    largest: Mapping[str, int]
    interpret: bool = False
    tunables: Tunables = field(default_factory=dict)
    device: Device = H100
    stored: frozenset[str] = frozenset()
    constants: Mapping[str, frozenset[Value]] = field(default_factory=dict)
    first: str = ""

    @staticmethod
    def of(program: Program, interpret: bool, tunables: Tunables, device: Device) -> Environment:
        """The environment of a program's kernels."""
        largest = {**program.largest[0], "T": program.capacity}
        return Environment(
            program.capacity,
            largest,
            interpret,
            tunables,
            device,
            constants=_constants(program),
            first=next((step.name for step, _, _ in program.trace()), ""),
        )

    @property
    def sizes(self) -> Sizes:
        """Largest sizes; generation asks for one position's logits, so L counts as 1."""
        return sizes_of({**self.largest, "L": 1})

    @property
    def prelude(self) -> str:
        """The helpers of a generated module; Triton's interpreter has neither f8 nor assembly."""
        first = prelude(self.device.has_f8 and not self.interpret, self.interpret)
        return f"{first}\n\n\n{unpacking(self.interpret)}".rstrip()

    @property
    def helpers(self) -> list[str]:
        """The names of the functions in the prelude, which no variable may hide."""
        return re.findall(r"^def (\w+)", self.prelude, re.MULTILINE)

    def tiles(self, op: Op, plans: Sequence[Plan]) -> list[Tile]:
        """The tile of each segment: the default, changed where a tuner said so, as far as the device can."""
        name = str(op.attr("name"))
        changes = self.tunables.get(name, NONE)
        tiles = [tuned(tile, changes) for tile in self._defaults([plan.work for plan in plans])]
        return [
            replace(
                tile,
                dependent=tile.dependent and name != self.first,
                descriptors=tile.descriptors and self.device.has_descriptors,
            )
            for tile in tiles
        ]

    def default(self, work: Work, warps: int = 0) -> Tile:
        """The interpreter's tile, or the cost model's first; with so many warps, where there is one."""
        if self.interpret:
            return interpreter_tile(work)
        tiles = ranked(work, self.device)
        tile = next((t for t in tiles if t.num_warps == warps), tiles[0])
        return replace(tile, dependent=self.device.has_dependent_launch)

    def _defaults(self, works: Sequence[Work]) -> list[Tile]:
        """The default of each segment of a kernel, with the warps of the one that takes longest: all of them run with
        the same number."""
        tiles = [self.default(work) for work in works]
        if len(works) == 1 or self.interpret:
            return tiles
        pairs = zip(works, tiles, strict=True)
        _, slowest = max(pairs, key=lambda pair: seconds(pair[0], pair[1], self.device))
        return [self.default(work, slowest.num_warps) for work in works]


def _constants(program: Program) -> dict[str, frozenset[Value]]:
    """The operands of each kernel that are weights in every call of its routine."""
    found: dict[str, frozenset[Value]] = {}
    for number, routine in enumerate(program.routines):
        calls = [c for c in program.calls if c.routine == number]
        fixed = {
            slot
            for slot in range(len(routine.slots))
            if all(program.buffers[c.buffers[slot]].kind is BufferKind.param for c in calls)
        }
        for step in routine.steps:
            pairs = zip(step.op.operands, step.reads, strict=True)
            found[step.name] = frozenset(value for value, slot in pairs if slot in fixed)
    return found
