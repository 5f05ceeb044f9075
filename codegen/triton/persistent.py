"""The kernels of a routine (a layer) as one persistent kernel: one launch, and grid barriers between them.

Every program stays on its multiprocessor for the whole routine and walks its share of each kernel's tiles:

    launch k1; launch k2          ->   for tile in mine(k1): k1(tile)
                                       grid barrier
                                       for tile in mine(k2): k2(tile)

A barrier costs less than the end of one kernel and the start of the next. On the other hand all kernels get the same
number of warps, the registers and the shared memory of the greediest, and no request for weights crosses a barrier; so
which is faster has to be measured. All programs have to be resident at once, or the barrier would wait forever: a
cooperative launch refuses what does not fit. (Gupta, Stuart and Owens, "A Study of Persistent Threads Style GPU
Programming for GPGPU Workloads", 2012; the barrier by a counter is Xiao and Feng's, 2010.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sympy import Integer

from tilewright.ir.module import Op
from tilewright.ir.program import Program, Routine

from .cost_model import REGISTERS
from .environment import Environment
from .kernel import Body, KernelSource, launch_options, print_body, signature
from .plan import Plan, plan_parts
from .text import INDENT, identifier, print_index
from .tiling import Tile

BARRIER = '''@triton.jit
def grid_barrier(counter, programs):
    """Wait until as many programs have come here. The counter only grows, by ``programs`` for each barrier."""
    tl.debug_barrier()
    ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = (ticket // programs + 1) * programs
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < last:
        pass
    tl.debug_barrier()'''

COUNTER = ("p_counter", "i64")


@dataclass(frozen=True)
class Persistent:
    """A persistent kernel, and the names of the kernels that it stands for, in order. Its pointers are theirs, one
    kernel after the other, and at last an i64 counter, which is zero before the first launch."""

    source: KernelSource
    of: tuple[str, ...]


def persistent_kernels(program: Program, env: Environment, residents: int) -> tuple[Persistent, ...]:
    """One for each routine with several kernels, all of whose steps are kernels with a number of tiles that is known.

    residents: programs on each multiprocessor.
    """
    programs = 1 if env.interpret else residents * env.device.multiprocessors
    bodies = {r.name: _bodies(r, env, residents) for r in program.routines if _is_suitable(r)}
    return tuple(
        _print(identifier(f"{name}_persistent"), found, env, programs)
        for name, found in bodies.items()
        if all(body.tiles.is_Integer for body, _ in found)
    )


def _is_suitable(routine: Routine) -> bool:
    return len(routine.steps) > 1 and all(s.op.opcode == "kernel" for s in routine.steps)


def _bodies(routine: Routine, env: Environment, residents: int) -> list[tuple[Body, list[Tile]]]:
    """The kernels' bodies, printed for one number of warps, which may use all registers that so many programs leave."""
    planned: list[tuple[Op, tuple[Plan, ...], list[Tile]]] = []
    for step in routine.steps:
        plans = plan_parts(step.op, env.sizes)
        planned.append((step.op, plans, env.tiles(step.op, plans)))
    warps = max(t.num_warps for _, _, tiles in planned for t in tiles)
    registers = min(255, REGISTERS // (max(1, residents) * 32 * warps) // 8 * 8)
    found = []
    for op, plans, tiles in planned:
        own = [
            replace(
                t, num_warps=warps, max_registers=registers, persistent=0, dependent=False, descriptors=False
            )
            for t in tiles
        ]
        found.append((print_body(op, env, plans, own), own))
    return found


def _print(name: str, bodies: list[tuple[Body, list[Tile]]], env: Environment, programs: int) -> Persistent:
    pointers = [(f"k{n}_{p}", kind) for n, (body, _) in enumerate(bodies) for p, kind in body.pointers]
    dims = tuple(sorted({d for body, _ in bodies for d in body.dims}))
    arguments = [*(p for p, _ in pointers), COUNTER[0], *dims]
    functions, lines = [], signature(name, arguments, dims, env.stored)
    for n, (body, _) in enumerate(bodies):
        if n:
            lines.append(f"{INDENT}grid_barrier({COUNTER[0]}, {programs})")
        part = f"{name}_{n}"
        given = [*(f"k{n}_{p}" for p, _ in body.pointers), *body.dims]
        lines.append(f"{INDENT}for pid in range(tl.program_id(0), {print_index(body.tiles)}, {programs}):")
        lines += body.dispatch(part, given, 2 * INDENT)
        functions.append(body.functions(part))
    options = dict(launch_options([t for _, tiles in bodies for t in tiles]))
    source = KernelSource(
        name,
        "\n\n\n".join([*functions, "\n".join(lines)]),
        (*pointers, COUNTER),
        dims,
        Integer(programs),
        (*options.items(), ("launch_cooperative_grid", True)),
        tuple(p.template for body, _ in bodies for p in body.parts),
        env.stored & set(dims),
    )
    return Persistent(source, tuple(str(body.op.attr("name")) for body, _ in bodies))
