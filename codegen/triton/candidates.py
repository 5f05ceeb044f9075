"""Tiles that a segment may have. The cost model orders them; the first is the default, and a tuner times the others.

* Product of one row (decode): bound by reading the weight. Blocks of weights in registers, or in a pipeline.
* Product of few rows: also bound by the weight; on Hopper the weight stands on the long side of the tensor cores.
* Product of many rows (prefill): large tiles on tensor cores. In float32 products run on the plain units, and their
  operands need the registers of eight warps.
* On Hopper, each tile of a product on tensor cores also with its factors copied by TMA, and with as many programs as
  fit at a time walking all tiles, in groups of rows. What that gains is not modelled: such tiles come right beside the
  plain one, so that a tuner measures them.
* Product of few rows because only the last positions' logits are wanted: dim L counts as 1, as in generation.
* Recurrent layers: few channels a program, since there are only so many, and each walks all tokens.
* Reductions: whole rows in registers up to 4096 elements, one row per program when it is long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from tilewright.ir.types import next_power_of_two

from .codes import UNIT
from .cost_model import FEW_QUERIES, INFEASIBLE, code_load, product_load, seconds, vector_load
from .device import Device
from .tiling import Tile, pointwise_tile, reduction_tile
from .work import AttentionWork, ProductWork, RecurrentWork, StreamWork, Work

_WITHIN = 2.0
"""Tiles that should take longer than so many times the best are not worth a measurement."""

FEW_ROWS = 64
"""A product of more rows has tiles of many rows."""


def ranked(work: Work, device: Device) -> tuple[Tile, ...]:
    """The tiles that fit and are not far behind, best first by the cost model; where none fits, the first of all."""
    tiles = dict.fromkeys(_tiles(work, device))
    scored = [(seconds(work, tile, device), n, tile) for n, tile in enumerate(tiles)]
    best = min(scored)[0]
    if best == INFEASIBLE:
        return (scored[0][2],)
    return tuple(tile for cost, _, tile in sorted(scored) if cost <= _WITHIN * best)


def smallest(work: Work, device: Device) -> Tile:
    """Of all tiles the one that asks least of a multiprocessor's registers and shared memory."""

    def size(tile: Tile) -> int:
        return tile.block_m * tile.block_n + (tile.block_m + tile.block_n) * tile.block_k * tile.num_stages

    return min(_tiles(work, device), key=size)


def interpreter_tile(work: Work) -> Tile:
    """The tile for Triton's interpreter: few programs with large blocks, since each costs milliseconds."""
    match work:
        case ProductWork():
            return Tile(
                block_m=min(64, max(16, next_power_of_two(work.rows))),
                block_n=min(512, max(16, next_power_of_two(work.columns))),
                block_k=min(512, max(16, next_power_of_two(work.k))),
            )
        case AttentionWork():
            return Tile(
                min(128, max(16, next_power_of_two(work.queries))),
                min(512, max(16, next_power_of_two(work.context))),
            )
        case RecurrentWork():
            # Two tokens at a time, as a GPU takes several: an odd number of them ends in the middle of a step.
            return Tile(min(2, work.tokens), min(512, max(16, next_power_of_two(work.channels))))
    if work.longest != 0:
        return reduction_tile(work.points, work.longest, True, work.sharers, work.own)
    return pointwise_tile(work.points, True)


def _tiles(work: Work, device: Device) -> Iterable[Tile]:
    match work:
        case ProductWork():
            return _without_thrift(_product_tiles(work, device), work, device)
        case AttentionWork():
            return _attention_tiles(work)
        case RecurrentWork():
            return _recurrent_tiles(work)
    return _stream_tiles(work)


def _product_tiles(work: ProductWork, device: Device) -> Iterator[Tile]:
    if integers := list(integer_tiles(work, device)):
        return iter(integers)
    if not work.rows:
        return vector_tiles(work, device)
    few = work.rows <= FEW_ROWS or (work.matrices and work.itemsize > 2)
    tiles: Iterable[Tile] = few_rows_tiles(work, device) if few else many_rows_tiles(work)
    if work.matrices:  # a block of rows is one tile
        tiles = [tile for tile in tiles if tile.block_m >= work.rows]
    return (variant for tile in tiles for variant in _variants(tile, work, device))


_GROUP = 8
"""Tiles of rows in a group: about the root of the programs of a large GPU, so that what they read at a time is nearly a
square, the shape with the fewest rows and columns."""


def _variants(tile: Tile, work: ProductWork, device: Device) -> Iterator[Tile]:
    """The tile, and other ways to bring its factors and to walk all tiles.

    What TMA copies comes first where several factors are copied per tile of rows, or many rows: there it was the faster
    one (by up to a quarter), and elsewhere the same.
    """
    able = device.has_descriptors and work.itemsize == 2
    copied = replace(tile, descriptors=able and work.plain)
    several = work.dots > 1 or work.rows > FEW_ROWS
    yield from dict.fromkeys((copied, tile) if several else (tile, copied))
    if not able:
        return
    group = _GROUP if work.rows > _GROUP * tile.block_m else 0
    walked = replace(copied, persistent=device.multiprocessors, group=group)
    load = product_load(work, walked, device)
    walkers = device.multiprocessors * load.resident(device)
    if 0 < walkers < load.programs:
        yield replace(walked, persistent=walkers)


def _without_thrift(tiles: Iterable[Tile], work: ProductWork, device: Device) -> Iterator[Tile]:
    """Let the assembler take what it needs where it would rather spill some bytes than pass 80 or 128 registers: before
    Hopper, and where a thread sums many products."""
    for tile in tiles:
        many = tile.block_n * tile.block_k * work.dots >= 64 * 32 * tile.num_warps
        many = many and not (work.rows or work.weight_ops)
        yield replace(tile, max_registers=255) if device.arch < 90 or many else tile


def vector_tiles(work: ProductWork, device: Device) -> Iterator[Tile]:
    """For a product of one row. Pipelines through shared memory were faster than loads to registers wherever they leave
    room for four programs on a multiprocessor; eight warps wait for each other too long."""
    if work.weight_ops:
        yield from converted_tiles(work)
        return
    for block_n, block_k, warps in product((1, 2, 4, 8, 16), (128, 256, 512, 1024, 2048), (2, 4, 8)):
        elements = block_n * block_k * work.dots
        if 512 <= elements <= 16384 and block_k <= max(128, next_power_of_two(work.k)):
            plain = Tile(1, block_n, block_k, num_warps=warps, num_stages=2)
            yield plain
            piped = replace(plain, num_stages=3)
            load = vector_load(work, piped)
            fits = load.registers <= 128 and load.resident(device) >= 4
            if fits and warps <= 4 and work.k >= 4 * block_k:
                yield piped


def integer_tiles(work: ProductWork, device: Device) -> Iterator[Tile]:
    """For a product whose factors are integers: sums a thread at a time, and tensor cores; none for other products."""
    if work.integers:
        yield from code_tiles(work, device)
    yield from byte_tiles(work, device)


_COLUMNS = 8192
"""Columns of K that a program walks at a time: most models' hidden sizes, padded, are no more."""
_MOST_SUMS = 64
"""Of a thread: each takes a register."""


def code_tiles(work: ProductWork, device: Device) -> Iterator[Tile]:
    """For a product of integers (see ``code_sums``). One row: all of K at a time where that is not too long, and up to
    eight warps for it. With many sums the row is rounded less often, as long as there is room for two programs on a
    multiprocessor, one of which loads while the other sums. Several rows: a warp or two walk K, and fold what they have
    summed once."""
    columns = 32 * UNIT * (2 if work.weight_bytes < 0.8 else 1)  # of a warp, at a time
    if work.rows:
        rows = next_power_of_two(work.rows)
        most = (
            _MOST_SUMS // 2 if work.weight_bytes < 0.8 else _MOST_SUMS
        )  # two words of a row to each of codes
        for sums, warps in product((8, 4, 16), (1, 2)):
            tile = Tile(rows, _share(sums, work.dots, 1), columns * warps, num_warps=warps, num_stages=2)
            if (sums == 4 or sums * rows <= most) and (warps == 1 or work.k > columns):
                yield tile
        return
    block_k = max(columns, min(_COLUMNS, next_power_of_two(work.k)))
    for sums in (16, 8, 4):
        tile = Tile(
            1, _share(sums, work.dots, 1), block_k, num_warps=min(8, block_k // columns), num_stages=2
        )
        if sums == 4 or code_load(work, tile).resident(device) > 1:
            yield tile


def byte_tiles(work: ProductWork, device: Device) -> Iterator[Tile]:
    """For rows of bytes on tensor cores (see ``integer_tiles``); none where rows or weights are no such bytes. Hopper's
    are fast on 64 columns at least: fewer only where those would leave multiprocessors idle, and nothing else does it.
    """
    if not work.group or not work.rows:
        return
    rows, fills = (
        max(8, next_power_of_two(work.rows)),
        work.batch * work.columns >= 64 * device.multiprocessors,
    )
    for columns, groups, warps, stages in (
        (64, 4, 4, 4), (64, 2, 4, 5), (64, 1, 4, 5), (32, 4, 2, 4), (32, 2, 2, 5), (32, 1, 2, 5), (16, 2, 1, 6),
        (16, 1, 1, 6), (16, 1, 2, 6),
    ):  # fmt: skip
        tile = Tile(rows, columns, groups * work.group, num_warps=warps, num_stages=stages, transposed=True)
        # One product of few numbers: tensor cores take 16 at least on either side.
        wide = columns == 64 or not (fills or work.integers)
        if wide and work.k % tile.block_k == 0 and rows * groups >= 16:
            yield tile


def converted_tiles(work: ProductWork) -> Iterator[Tile]:
    """For a product of one row with weights that are only converted, as floats of 8 bits: few elements in a thread."""
    for sums, warps in ((4, 2), (4, 1), (8, 2)):
        block_k = min(32 * warps * 16, max(128, next_power_of_two(work.k)))
        yield Tile(1, _share(sums, work.dots, 1), block_k, num_warps=warps, num_stages=2)


def few_rows_tiles(work: ProductWork, device: Device) -> Iterator[Tile]:
    """For a product whose rows fit one tile."""
    rows = next_power_of_two(work.rows)
    if work.itemsize > 2:
        for block_n, block_k in product((16, 32, 64), (32, 64)):
            # Plain units take their operands from registers.
            if block_n * work.dots <= 64 and rows * block_n * block_k <= 1 << 18:
                yield Tile(max(16, rows), block_n, _block_k(work.k, block_k), num_warps=4, num_stages=3)
        return
    for block_n, block_k, stages in product((16, 32, 64, 128), (64, 128, 256), (3, 4, 6)):
        if block_n * work.dots > 256 or (block_k > 128 and work.row_ops):  # rows that are made fill registers
            continue
        size = _block_k(work.k, block_k)
        yield Tile(max(16, rows), block_n, size, num_warps=4, num_stages=stages)
        if block_n >= 64 and device.arch >= 90:
            yield Tile(max(16, rows), block_n, size, num_warps=4, num_stages=stages, transposed=True)


def many_rows_tiles(work: ProductWork) -> Iterator[Tile]:
    """For a product of many rows."""
    if work.itemsize > 2:
        yield Tile(64, _share(96, work.dots), _block_k(work.k, 16), num_warps=8, max_registers=255)
        return
    for block_m, block_n, block_k, warps, stages in (
        (64, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3),
        (128, 256, 64, 8, 3), (64, 64, 128, 4, 3), (128, 128, 32, 8, 4),
    ):  # fmt: skip
        tile = Tile(
            block_m, _share(block_n, work.dots), _block_k(work.k, block_k), num_warps=warps, num_stages=stages
        )
        if tile.block_m <= max(64, next_power_of_two(work.rows)):
            yield tile


def _attention_tiles(work: AttentionWork) -> Iterator[Tile]:
    rows, wide = next_power_of_two(work.queries), work.depth > 256
    if work.itemsize == 8:  # sums of products in registers
        yield Tile(16, 16, num_warps=8, num_stages=1)
        return
    if work.itemsize > 2:
        block_m = min(64, max(16, rows))
        for block_n, warps in ((16 if block_m > 16 else 32, 4), (16, 8)):
            yield from _softmaxes(Tile(block_m, block_n, num_warps=warps, num_stages=2))
        return
    if rows <= FEW_QUERIES and not wide and work.cache_itemsize == work.itemsize:
        # A single query: fastest first as measured, a warp by itself, which waits for no other.
        for block_n, warps, stages in (
            (16, 1, 3),
            (32, 1, 2),
            (64, 4, 2),
            (32, 2, 2),
            (16, 2, 3),
            (32, 4, 2),
        ):
            yield from _softmaxes(Tile(16, block_n, num_warps=warps, num_stages=stages))
        return
    heights = [n for n in (16, 32, 64, 128) if n <= max(16, rows) and (n >= 64 or n >= min(rows, 64))]
    for block_m, block_n, stages in product(heights, (64, 32, 128), (2, 3)):
        if wide and block_n > 32:
            continue
        # Keys and values that are converted in registers may need more threads to hold them.
        converted = work.cache_itemsize < work.itemsize
        for warps in (4, 8) if converted else (8,) if block_m >= 128 else (4,):
            yield from _softmaxes(Tile(block_m, block_n, num_warps=warps, num_stages=stages))


def _softmaxes(tile: Tile) -> Iterator[Tile]:
    """Both ways to keep a softmax, the one that always holds first. The other has its second walk's registers too."""
    yield tile
    yield replace(tile, agreed=True, max_registers=255)


def _recurrent_tiles(work: RecurrentWork) -> Iterator[Tile]:
    """Few channels a program and few warps; some tokens of a prompt at a time."""
    together = min(8, next_power_of_two(work.tokens))
    for block_n, warps in product((32, 16, 64, 128, 256), (1, 2, 4)):
        lanes = block_n * next_power_of_two(work.states)
        if block_n <= max(16, next_power_of_two(work.channels)) and lanes <= 64 * 32 * warps:
            yield Tile(together, block_n, num_warps=warps)


def _stream_tiles(work: StreamWork) -> Iterator[Tile]:
    if work.longest != 0:
        yield reduction_tile(work.points, work.longest, False, work.sharers, work.own)
        return
    usual = pointwise_tile(work.points, False)
    yield usual
    for block_n in (128, 256, 1024, 2048):
        if block_n <= next_power_of_two(work.points):
            yield Tile(block_n=block_n)


def _share(columns: int, dots: int, least: int = 16) -> int:
    """The largest power of two with which the tiles of all ``dots`` have at most ``columns`` columns together, or the
    least there is."""
    return max(least, 1 << max(0, (columns // dots).bit_length() - 1))


def _block_k(k: int, largest: int) -> int:
    """The block size along K: a divisor of K where there is one, as a masked tail costs time."""
    size = min(largest, max(16, next_power_of_two(k)))
    while size > 32 and k % size:
        size //= 2
    return size
