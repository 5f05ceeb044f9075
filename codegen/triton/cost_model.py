"""How long a segment would take with a given tile: an estimate that orders candidates, and that reports show.

A kernel is bound by whichever takes longest: bytes from device memory, bytes through the second-level cache (operands
that several programs read), tensor cores, or plain instructions (unpacking codes, sums of a matrix-vector product).
Memory reaches its bandwidth only with enough bytes under way: by Little's law, bandwidth x latency. What a program has
under way is what its pipeline holds, so tiles trade programs per multiprocessor against stages and sizes:

    under way = busy multiprocessors x programs on each x bytes of a block x (stages - 1)
    seconds   = launch + 2 latency + max(bytes / rate of memory, flops / rate, ...)
    rate of memory = 1 / sqrt(1 / bandwidth^2 + (latency / under way)^2)

and a little of what the largest hides. How much of the latency counts, and what a sum of products costs in
instructions, was fitted to some 900 kernels of Llama2-7B timed on an H100, each product in 40 to 80 tiles. The form is
that of roofline models (Williams et al., 2009) with the concurrency term of Hong and Kim, "An analytical model for a
GPU architecture with memory-level and thread-level parallelism awareness", 2009. Registers and shared memory are
estimates too; ``offline.compile_program`` tells the truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilewright.ir.types import next_power_of_two

from .codes import UNIT
from .device import Device
from .tiling import Tile
from .work import AttentionWork, ProductWork, RecurrentWork, StreamWork, Work

INFEASIBLE = math.inf
REGISTERS = 65536  # 32-bit, of a multiprocessor
_MOST_REGISTERS = 224  # of a thread; the assembler has 255 and needs some room
_WARPS = 64  # of a multiprocessor
_PROGRAMS = 32
_RUN = 32.0  # bytes that every run of neighbours in memory costs beside its own
FEW_QUERIES = 16  # which fit the shortest tile of an attention
_CACHE_LATENCY = 0.45  # of the second-level cache, as a share of device memory's
_OVERLAP = 0.1  # how much of the lesser costs shows beside the largest
# Of memory's latency what bytes under way have to cover: for blocks in registers, and for a pipeline in shared memory.
_IN_REGISTERS, _PIPELINED = 0.72, 1.3
# Shares of the tensor rate: with the instruction that a GPU was built for (measured), and with an older one (assumed).
_WGMMA, _MMA = 0.95, 0.5
# Seconds that a loop waits for the loads of each iteration, where they go to registers.
_WAIT = 0.3e-6
# Seconds of an iteration on tensor cores beside its loads; of one that makes its rows first, which has nothing under
# way meanwhile; and in which four warps make 1024 elements of rows.
_ITERATION, _ALONE, _MADE_ROWS = 0.1e-6, 0.9e-6, 0.3e-6


# Instructions for a unit of codes of 8 and of 4 bits, to sum it over a program's threads, and to round an element of
# the row: what they take, waits for each other included.
_UNIT, _PACKED_UNIT, _FOLD, _ROUND = 16.0, 50.0, 12.0, 20.0
# Instructions to load and cut out a unit of codes, and for each of several rows that it is multiplied with; warps of a
# multiprocessor that hide what each of them waits for (fitted to 24 tiles of Llama2-7B at eight rows on an H200, within
# a tenth).
_LOAD, _ROW, _PACKED_ROW, _HIDING = 2.7, 10.5, 21.0, 22.5
# Instructions of bytes on tensor cores: for 16 of a row's, and of a thread for an iteration (fitted to 24 tiles of
# hand-written kernels of this form on an H200, within an eighth; sums cost nothing beside them).
_SIXTEEN, _AROUND = 106.0, 193.0
# Of weights that are loaded before the kernel before has ended, what costs no time of their own.
_EARLY = 0.7


@dataclass(frozen=True)
class Load:
    """What a tile asks of a multiprocessor. ``programs`` is the number of tiles, which ``walkers`` walk between them
    (0: a program per tile). Bytes under way are those of one program."""

    programs: int
    threads: int
    registers: int
    shared: int
    under_way: float
    walkers: int = 0

    @property
    def running(self) -> int:
        """Programs of the grid."""
        return min(self.programs, self.walkers) if self.walkers else self.programs

    def resident(self, device: Device) -> int:
        """Programs that fit on one multiprocessor at a time; 0 when none does."""
        if self.registers > _MOST_REGISTERS or self.shared > device.shared:
            return 0
        by_shared = device.shared // self.shared if self.shared else _PROGRAMS
        by_registers = REGISTERS // (max(32, self.registers) * self.threads)
        return min(_PROGRAMS, by_shared, by_registers, _WARPS * 32 // self.threads)


def seconds(work: Work, tile: Tile, device: Device) -> float:
    """Estimated time of a segment's launch; infinite for a tile that does not fit."""
    match work:
        case ProductWork():
            if work.group and tile.transposed:
                return _bytes(work, tile, device)
            if work.integers:
                return _codes(work, tile, device)
            return (_tiles if work.rows else _vectors)(work, tile, device)
        case AttentionWork():
            return _attention(work, tile, device)
        case RecurrentWork():
            return _recurrent(work, tile, device)
    return _stream(work, tile, device)


def start_seconds(device: Device) -> float:
    """What a kernel costs beside its work: its launch, its first load and its last store."""
    return device.launch + 2 * device.latency


def floor_seconds(moved: int, flops: int, half: bool, device: Device) -> float:
    """The least time for bytes of device memory and floating-point operations, at the rates that ``device`` reaches."""
    return max(moved / device.bandwidth, flops / (device.tensor_flops if half else device.vector_flops))


def _tiles(work: ProductWork, tile: Tile, device: Device) -> float:
    """Rows x columns on tensor cores, or on plain units in float32. What copies a tile (threads or TMA), and in which
    order tiles are taken, makes no difference here: nothing has been measured that says how much."""
    weights = tile.block_n * tile.block_k * work.dots
    half = work.itemsize == 2
    load, block = product_load(work, tile, device), _product_block(work, tile)
    flops = 2.0 * load.programs * tile.block_m * tile.block_n * work.dots * work.k
    steps = load.programs * _blocks(work.k, tile.block_k)
    right = (work.matrices or work.batch) * work.columns * work.dots * work.weight_bytes
    unique = work.k * (right + work.batch * work.rows * work.itemsize) + float(
        work.batch * work.rows * work.columns * work.stored_bytes
    )
    made = tile.block_m * tile.block_k / 1024 / (tile.num_warps / 4)
    iteration = _ALONE + made * _MADE_ROWS if work.row_ops else _ITERATION
    waves = _blocks(load.programs, device.multiprocessors * max(1, load.resident(device)))
    return _total(
        load,
        device,
        memory=unique * (1 + _RUN / (tile.block_k * work.weight_bytes)),
        cache=steps * block,
        tensor=flops / _tensor_rate(tile, half, device),
        plain=steps
        * float(weights * work.weight_ops + tile.block_m * tile.block_k * work.row_ops)
        / (device.vector_flops / 2),
        walk=waves * _blocks(work.k, tile.block_k) * iteration,
        hidden=_PIPELINED,
    )


def _product_block(work: ProductWork, tile: Tile) -> float:
    """Bytes that a tile reads for a block of k."""
    weights = tile.block_n * tile.block_k * work.dots
    return weights * work.weight_bytes + tile.block_m * tile.block_k * work.itemsize


def product_load(work: ProductWork, tile: Tile, device: Device) -> Load:
    """What the tiles of a product of several rows ask of a multiprocessor."""
    rows, columns = _blocks(work.rows, tile.block_m), _blocks(work.columns, tile.block_n)
    threads = 32 * tile.num_warps
    weights = tile.block_n * tile.block_k * work.dots
    block = _product_block(work, tile)
    unpacked = work.weight_bytes < work.itemsize
    half = work.itemsize == 2
    return Load(
        programs=rows * columns * work.batch,
        threads=threads,
        registers=_operand_registers(device)
        + tile.block_m * tile.block_n * work.dots // threads
        # Codes are unpacked in registers, with their scales and minima beside them; so is what rows are made of.
        + weights * work.itemsize // (4 * threads) * (3 if unpacked else 1 if not half else 0)
        + (2 * tile.block_m * tile.block_k // threads if work.row_ops else 0),
        # Where programs walk, results are stored while the loads of the next tile are under way.
        shared=int(
            tile.num_stages * block
            + (weights * work.itemsize if unpacked else 0)
            + (tile.block_m * tile.block_n * work.stored_bytes if tile.persistent else 0)
        ),
        under_way=block * max(1, tile.num_stages - 1),
        walkers=tile.persistent,
    )


def _operand_registers(device: Device) -> int:
    """Addresses and, before Hopper, the operands of tensor cores, which those then take from registers."""
    return 40 if device.arch >= 90 else 104


def _tensor_rate(tile: Tile, half: bool, device: Device) -> float:
    if not half:
        return device.vector_flops * 0.5
    if device.arch < 90:
        return device.tensor_flops * _WGMMA
    left = tile.block_n if tile.transposed else tile.block_m
    return device.tensor_flops * (_WGMMA if left >= 64 and tile.num_warps % 4 == 0 else _MMA)


def _vectors(work: ProductWork, tile: Tile, device: Device) -> float:
    """One row: sums of products in registers."""
    threads, elements = 32 * tile.num_warps, tile.block_n * tile.block_k * work.dots
    load, block = vector_load(work, tile), elements * work.weight_bytes
    steps = load.programs * _blocks(work.k, tile.block_k)
    unique = work.batch * work.columns * (work.k * work.dots * work.weight_bytes + work.stored_bytes) + float(
        work.batch * work.k * work.itemsize
    )
    # An element is widened, or converted, and multiplied and added in one; the row's cost more, as every program makes
    # its own. A thread has addresses and a branch in each step besides, and a sum over its neighbours at the end.
    each = 3.4 if work.weight_ops else 2.3
    step = elements * each + (4.0 + work.row_ops) * tile.block_k + 2.0 * threads
    instructions = steps * step + 230.0 * threads * load.programs
    runs = 1 + _RUN / (tile.block_k * work.weight_bytes)
    waits = 0 if load.shared else _blocks(work.k, tile.block_k)
    return waits * _WAIT + _total(
        load,
        device,
        memory=unique * runs,
        cache=steps * (block + tile.block_k * work.itemsize),
        plain=instructions / (device.vector_flops / 2),
    )


def _codes(work: ProductWork, tile: Tile, device: Device) -> float:
    """Codes times one row, or few: sums of integers in registers (see ``code_sums``)."""
    load, units, packed = code_load(work, tile), _units(work, tile), work.weight_bytes < 0.8
    sums, columns, whole = tile.block_n * work.dots, tile.block_k / units, _is_whole(work, tile)
    if work.rows:
        of_row = _PACKED_ROW if packed else _ROW
        unit = sums * (_LOAD + work.rows * of_row) + work.rows * columns / UNIT * _LOAD
    else:  # every program rounds the row for itself
        unit = sums * (_PACKED_UNIT if packed else _UNIT) + columns * (_ROUND + work.row_ops)
    steps = _blocks(work.k, tile.block_k)
    step = load.threads * math.ceil(units / load.threads) * unit
    fold = _FOLD * sums * max(1, work.rows)
    instructions = load.programs * (steps * step + load.threads * (100.0 + fold))
    if work.rows:  # a warp that waits for what it has loaded needs others to hide that
        warps = min(load.resident(device), load.programs / device.multiprocessors) * tile.num_warps
        instructions *= max(1.0, _HIDING / max(warps, 0.1)) ** 0.5
    results = max(1, work.rows) * work.stored_bytes
    weights = work.batch * work.columns * (work.k * work.dots * work.weight_bytes + results)
    rows = work.k * (work.rows or work.itemsize)
    early = min(weights, load.resident(device) * device.multiprocessors * load.under_way) if whole else 0.0
    return (-device.latency if whole else steps * _WAIT) + _total(
        load,
        device,
        memory=weights + float(work.batch * rows) - _EARLY * early,
        cache=load.programs * (work.k * sums * work.weight_bytes + rows),
        plain=instructions / (device.vector_flops / 2),
    )


def _bytes(work: ProductWork, tile: Tile, device: Device) -> float:
    """Bytes times bytes of several rows on tensor cores (see ``integer_tiles``)."""
    load, steps = byte_load(work, tile), work.k // tile.block_k
    lanes = tile.block_m * tile.block_k // work.group  # a row's groups stand beside each other
    of_rows = tile.block_k * lanes / 16 * _SIXTEEN
    unique = work.columns * (work.k * work.dots + work.rows * work.stored_bytes) + float(work.rows * work.k)
    flops = 2.0 * load.programs * steps * tile.block_n * work.dots * tile.block_k * lanes
    return _total(
        load,
        device,
        memory=work.batch * unique,
        cache=load.programs * steps * load.under_way / (tile.num_stages - 1),
        tensor=flops
        / (2 * device.tensor_flops * (_WGMMA if tile.block_n >= 64 and device.arch >= 90 else _MMA)),
        plain=load.programs * steps * (of_rows + load.threads * _AROUND) / (device.vector_flops / 2),
        hidden=_PIPELINED,
    )


def byte_load(work: ProductWork, tile: Tile) -> Load:
    """What the tiles of bytes ask of a multiprocessor."""
    threads, lanes = 32 * tile.num_warps, tile.block_m * tile.block_k // work.group
    block = float(tile.block_k * (tile.block_n * work.dots + lanes))
    return Load(
        programs=_blocks(work.rows, tile.block_m) * _blocks(work.columns, tile.block_n) * work.batch,
        threads=threads,
        registers=32 + 5 * tile.block_n * (lanes + work.dots * tile.block_m) // (4 * threads),
        shared=int(tile.num_stages * block),
        under_way=block * (tile.num_stages - 1),
    )


def _is_whole(work: ProductWork, tile: Tile) -> bool:
    """Whether all weights of a program are loaded at once."""
    return not work.rows and work.k <= tile.block_k


def code_load(work: ProductWork, tile: Tile) -> Load:
    """What the tiles of a product of codes ask of a multiprocessor: all bytes of a program are under way where an
    iteration has them, else a few loads of 16 bytes of each thread."""
    threads, packed = 32 * tile.num_warps, work.weight_bytes < 0.8
    sums, units, whole = tile.block_n * work.dots, _units(work, tile), _is_whole(work, tile)
    held = sums * (units / threads * UNIT / 4 + (4 if packed else 0.5))
    block = units * UNIT * sums
    # Of several rows, a unit of each and all sums are in registers.
    several = work.rows * (sums + 5 * tile.block_k / units / UNIT) if work.rows else 0.0
    return Load(
        programs=_blocks(work.columns, tile.block_n) * work.batch,
        threads=threads,
        registers=int(32 + held * (1 if whole else 0.5) + several),
        shared=0,
        under_way=block if whole or work.rows else min(block, 64.0 * threads),
    )


def _units(work: ProductWork, tile: Tile) -> float:
    """Of codes, of each sum and in an iteration."""
    return tile.block_k / (UNIT * (2 if work.weight_bytes < 0.8 else 1))


def vector_load(work: ProductWork, tile: Tile) -> Load:
    """What the tiles of a product of one row ask of a multiprocessor. Blocks of weights are under way one at a time, to
    registers, or several, to shared memory."""
    threads = 32 * tile.num_warps
    elements = tile.block_n * tile.block_k * work.dots
    block, ahead = elements * work.weight_bytes, tile.num_stages - 1 if tile.num_stages > 2 else 0
    each = elements / threads
    if ahead:
        registers = 60 + int(each * (1 + (work.dots - 1) / 3))
    else:
        registers = 20 + int(1.95 * each)
    row = tile.block_k * work.itemsize * (2 if work.row_ops else 1)
    return Load(
        programs=_blocks(work.columns, tile.block_n) * work.batch,
        threads=threads,
        registers=registers,
        shared=int(ahead * (block + row)),
        under_way=ahead * block or block,
    )


def _attention(work: AttentionWork, tile: Tile, device: Device) -> float:
    threads = 32 * tile.num_warps
    tiles = _blocks(work.queries, tile.block_m)
    half = work.itemsize == 2
    block = tile.block_n * work.depth * work.cache_itemsize
    operands = tile.block_n * work.depth * work.itemsize
    widened = work.cache_itemsize < work.itemsize
    query = tile.block_m * work.depth // 2 * work.itemsize
    share = 0.5 + 0.5 / tiles if work.causal else 1.0  # of the positions that are visited
    visited = work.context * share
    under_way = float(block * max(1, tile.num_stages - 1))
    if work.queries <= FEW_QUERIES:  # how the walk of one query is cut makes no difference to memory
        under_way = max(under_way, float(work.context * work.depth * work.cache_itemsize))
    load = Load(
        programs=work.parts * tiles,
        threads=threads,
        registers=48
        + tile.block_m * (work.depth // 2 + 2 * tile.block_n) // threads
        + (0 if half else (operands + query) // (4 * threads))
        + (tile.block_n * work.depth * 2 // threads if half and widened else 0),
        shared=tile.num_stages * block + query + (operands if widened else 0),
        under_way=under_way,
    )
    padded = math.ceil(visited / tile.block_n) * tile.block_n
    flops = 2.0 * load.programs * tile.block_m * padded * work.depth
    results = float(work.parts * work.queries * work.depth // 2)
    return _total(
        load,
        device,
        memory=work.parts * work.context * work.depth * float(work.cache_itemsize)
        + results * (work.itemsize + work.stored_bytes),
        cache=load.programs * padded * work.depth * work.cache_itemsize,
        tensor=flops / _tensor_rate(tile, half, device),
        # A score costs a scale, a mask, an exponential (four slots), and its part of two reductions; an element of the
        # cache that is stored in another type, its conversion.
        plain=load.programs
        * padded
        * (12.0 * tile.block_m + (2.0 * work.depth if widened else 0.0))
        / (device.vector_flops / 2),
    )


def _recurrent(work: RecurrentWork, tile: Tile, device: Device) -> float:
    """Memory, arithmetic, and the walk: what some tokens bring comes out of the second-level cache at best, then what
    the next ones bring."""
    threads = 32 * tile.num_warps
    lanes = tile.block_n * next_power_of_two(work.states)
    programs = work.rows * _blocks(work.channels, tile.block_n)
    each = work.bytes / max(1, programs * work.tokens)
    load = Load(
        programs,
        threads,
        32 + (3 * lanes + 4 * tile.block_m * tile.block_n) // threads,
        0,
        each * tile.block_m,
    )
    walk = _blocks(work.tokens, tile.block_m) * _CACHE_LATENCY * device.latency
    # An exponential takes four slots; the sum over states and the rest some more.
    plain = 10.0 * programs * max(lanes, threads) * work.tokens / device.vector_flops
    return walk + _total(load, device, memory=float(work.bytes), plain=plain)


def _stream(work: StreamWork, tile: Tile, device: Device) -> float:
    threads = 32 * tile.num_warps
    if work.longest == 0:
        points = tile.block_n
    else:
        points = tile.block_m
    programs = _blocks(work.points, points)
    each = work.bytes / max(1, work.points)
    lanes = points * (tile.block_k if work.longest != 0 else 1)
    if points > 1 and work.sharers % points == 0:
        lanes = points * next_power_of_two(work.own) + tile.block_k
    load = Load(programs, threads, 24 + 4 * lanes // threads, 0, each * points)
    return _total(load, device, memory=float(work.bytes), plain=8.0 * programs * lanes / device.vector_flops)


def _total(
    load: Load,
    device: Device,
    memory: float,
    cache: float = 0.0,
    tensor: float = 0.0,
    plain: float = 0.0,
    walk: float = 0.0,
    hidden: float = _IN_REGISTERS,
) -> float:
    """memory, cache: bytes. tensor, plain: seconds if every multiprocessor were busy all the time. walk: seconds of
    what a program does one after the other. hidden: part of the latency that bytes under way have to cover."""
    resident = load.resident(device)
    if not resident or not load.programs:
        return INFEASIBLE
    busy = min(device.multiprocessors, load.running)
    each = min(resident, _blocks(load.running, device.multiprocessors))
    under_way = busy * each * load.under_way
    share = busy / device.multiprocessors
    rate = under_way / (hidden * device.latency)
    bandwidth = min(1 / math.hypot(1 / device.bandwidth, 1 / rate), device.cache_bandwidth * share)
    through_cache = min(device.cache_bandwidth * share, under_way / (device.latency * _CACHE_LATENCY))
    # The last programs of each multiprocessor end together only if all have as many.
    uneven = _blocks(load.programs, device.multiprocessors) * device.multiprocessors / load.programs
    uneven = uneven if load.programs > device.multiprocessors else 1.0
    costs = sorted(
        (
            memory / bandwidth * (1 + (uneven - 1) / 3),
            walk,
            cache / through_cache,
            tensor / share * uneven,
            plain / share * uneven,
        )
    )
    return start_seconds(device) + costs[-1] + _OVERLAP * sum(costs[:-1])


def _blocks(extent: int, block: int) -> int:
    return -(-extent // block)
