"""Ways to print a kernel, and what the cost model expects of the one it is printed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from tilewright.codegen.tunables import NONE, Changes
from tilewright.ir.module import Op

from .candidates import ranked, smallest
from .cost_model import seconds, start_seconds
from .environment import Environment
from .plan import plan_parts
from .tiling import Tile
from .work import ProductWork, Work, sizes_of


def candidates(op: Op, env: Environment, most: int = 9) -> tuple[Changes, ...]:
    """Ways to print a kernel that are worth a measurement: the default, then what the cost model puts next.

    They are tiles of the segment that takes longest; the other segments change with it. What a dependent launch saves
    lies between kernels, where no timing of single kernels sees it, so all have one.
    """
    default, *others = ranked(_heaviest(op, env), env.device)
    return (NONE, *(_differences(default, tile) for tile in others[: most - 1]))


def fallbacks(op: Op, env: Environment) -> tuple[Changes, ...]:
    """Ways to print a kernel in the order to try them when one does not run: the candidates, then the tile that asks
    least of the device, whatever its time, since it is the estimates that were wrong."""
    work = _heaviest(op, env)
    last = _differences(ranked(work, env.device)[0], smallest(work, env.device))
    ways = candidates(op, env)
    return ways if last in ways else (*ways, last)


def _heaviest(op: Op, env: Environment) -> Work:
    """The segment that takes longest."""
    works = [plan.work for plan in plan_parts(op, env.sizes)]
    return max(works, key=lambda work: seconds(work, env.default(work), env.device))


def _differences(default: Tile, tile: Tile) -> Changes:
    named = ((f.name, getattr(default, f.name), getattr(tile, f.name)) for f in fields(Tile))
    return {name: int(new) for name, old, new in named if old != new}


def estimated_seconds(op: Op, env: Environment, dims: Mapping[str, int]) -> float:
    """The cost model's time of a kernel with the tiles that it is printed with, at the given sizes of the dims."""
    tiles = env.tiles(op, plan_parts(op, env.sizes))
    times = [
        seconds(plan.work, tile, env.device)
        for plan, tile in zip(plan_parts(op, sizes_of(dims)), tiles, strict=True)
    ]
    start = start_seconds(env.device)
    return start + sum(time - start for time in times)


def tiles_text(op: Op, env: Environment) -> str:
    """The tile of the segment that takes longest, for people."""
    plans = plan_parts(op, env.sizes)
    pairs = list(zip(plans, env.tiles(op, plans), strict=True))
    plan, tile = max(pairs, key=lambda pair: seconds(pair[0].work, pair[1], env.device))
    blocks = (tile.block_m, tile.block_n, *((tile.block_k,) if isinstance(plan.work, ProductWork) else ()))
    size = "x".join(map(str, blocks))
    turned = " transposed" if tile.transposed else ""
    copied = ", by TMA" if tile.descriptors else ""
    walked = f", walked by {tile.persistent} programs" if tile.persistent else ""
    return f"{plan.template} {size}{turned}, {tile.num_warps} warps, {tile.num_stages} stages{copied}{walked}"
