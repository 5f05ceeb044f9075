"""Every template compiled for GPUs that are not there: no spills, and shared memory within the limit."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from tilewright.codegen.triton.device import A100, H100, Device
from tilewright.codegen.triton.greedy import greedy_source
from tilewright.codegen.triton.offline import SHARED_LIMIT, Resources, compile_program
from tilewright.codegen.triton.program import TritonSource
from tilewright.ir.types import DType

from .triton_cases import CASES
from .triton_run import source_of

# Single pointwise ops compile alike, and so does what differs in its numbers; the reference tests run all of them.
REPEATED = (
    "unary", "binary", "integers", "predicate", "reduce", "embedding", "attention_hostile", "attention_around",
    "attention_reach", "attention_bias_shared", "rounded_nan", "lost",
)  # fmt: skip
EXTRA = [
    "unary-tanh",
    "unary-erf",
    "binary-pow",
    "binary-maximum",
    "integers-mod",
    "reduce-prod",
    "lost-max-f32-9000",
    "lost-min-f64-40",
    "embedding-bf16",
    "attention_around-bf16-3-90",
    "attention_reach-bf16-7",
]
CHOSEN = EXTRA + [n for n in CASES if n.split("-")[0] not in REPEATED and "f16" not in n.split("-")]


@pytest.mark.parametrize("name", CHOSEN)
def test_compiles_for_hopper(name: str) -> None:
    assert _compile(name, 90).fits


@pytest.mark.parametrize(
    "name", ["rope-bf16-many", "gated-bf16-many", "linear-f32-many", "attention-f16", "gated-bf16-one"]
)
def test_compiles_for_ampere(name: str) -> None:
    assert _compile(name, 80).fits


@pytest.mark.parametrize("gpu", [A100, H100])
def test_the_choice_of_tokens_fits(gpu: Device) -> None:
    """Of the largest vocabularies and batches, too."""
    source = greedy_source(262_144, DType.f32, (1, 64), device=gpu)
    assert all(r.fits for r in compile_program(source, gpu.arch))


@pytest.mark.parametrize("kind", ["int8", "int8_groups", "int4"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("arch", [80, 90])
def test_codes_are_multiplied_as_they_are_loaded(kind: str, dtype: str, arch: int) -> None:
    """Each thread loads its codes in whole vectors, whose words are factors without being taken apart; shared memory is
    for the results alone."""
    tile = {"block_n": 4, "block_k": 1024 if kind == "int4" else 512, "num_warps": 1}
    found = _compile(f"quantized_gated-{kind}-{dtype}-one-32", arch, tile)
    assert found.fits
    assert found.shared <= 64
    assert len(_words_of_codes(found.ptx, kind)) == 2 * 4 * 4  # dots, columns, words of a unit
    assert "max.NaN.f32" in found.ptx  # what is no number is not lost in rounding


def test_a_largest_number_is_one_instruction_that_keeps_nan() -> None:
    """Within a thread, across its warp, and across warps; no number is compared with itself."""
    ptx = _compile("lost-max-f32-9000", 90).ptx
    assert "max.NaN.f32" in ptx
    assert not re.search(r"max\.f32|testp|setp\.nan", ptx)


def _words_of_codes(ptx: str, kind: str) -> set[str]:
    """Words of loads of 16 bytes that are factors of integers as they are, or cut into halves where they hold two."""
    loads = re.findall(r"ld\.global\.v4\.b32 \{([^}]*)\}", ptx)
    words = {word.strip() for load in loads for word in load.split(",")}
    taken = r"dp4a\.s32\.s32 %r\d+, (%r\d+), %r\d+, 0"
    if kind == "int4":
        taken = rf"and\.b32\s+%r\d+, (%r\d+), {0x0F0F0F0F};"
    return words.intersection(re.findall(taken, ptx))


@pytest.mark.parametrize("kind", ["int8", "int8_groups", "int4"])
def test_rows_of_codes_are_multiplied_as_they_are_loaded(kind: str) -> None:
    """The same of rows that are stored as codes: nothing passes through shared memory but the results."""
    tile = {"block_m": 8, "block_n": 4, "block_k": 1024 if kind == "int4" else 512, "num_warps": 1}
    found = _compile(f"stored_rows-{kind}-8-bf16", 90, tile)
    assert found.fits
    assert found.shared <= 256
    assert len(_words_of_codes(found.ptx, kind)) == 2 * 4 * 4


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_of_bytes_reach_tensor_cores(groups: int) -> None:
    """Integers are multiplied as integers; sums of groups are told apart in registers, so that shared memory is for
    factors and results."""
    tile = {
        "transposed": 1,
        "block_m": 32,
        "block_n": 64,
        "block_k": 32 * groups,
        "num_warps": 4,
        "num_stages": 3,
    }
    found = _compile("stored_rows-int8-20-bf16-256", 90, tile)
    assert found.fits
    assert re.search(r"wgmma.mma_async.sync.aligned.m64n\d+k32.s32.s8.s8", found.ptx)
    assert found.shared <= 3 * 32 * groups * (2 * 64 + 32 * groups) + 4096
    ampere = _compile("stored_rows-int8-20-bf16-256", 80, tile)
    assert ampere.fits
    assert re.search(r"mma.sync.aligned.m16n8k32.\S*s32.s8.s8.s32", ampere.ptx)


@pytest.mark.parametrize("name", ["linear-bf16-four", "norm_linear-f16-four", "gated-bf16-four"])
@pytest.mark.parametrize("arch", [80, 90])
def test_transposed_tiles_reach_hoppers_tensor_cores(name: str, arch: int) -> None:
    """wgmma has 64 rows on the left at least: a batch of 4 gets it only where columns stand there."""
    plain, transposed = _compile(name, arch), _compile(name, arch, {"transposed": 1, "block_n": 64})
    assert transposed.fits
    assert "wgmma" not in plain.ptx
    assert ("wgmma" in transposed.ptx) == (arch == 90)
    assert ("mma.sync" in transposed.ptx) == (arch == 80)


COPIED = {
    "plain": {"block_m": 64, "block_n": 64},
    "flat": {"block_m": 16, "block_n": 64, "transposed": 1},
}


@pytest.mark.parametrize("walked", [{}, {"persistent": 2, "group": 2}], ids=["each", "walked"])
@pytest.mark.parametrize("name", ["matrix-bf16-many", "matrix-f16-many", "matrix_gated-bf16-many"])
@pytest.mark.parametrize("shape", COPIED)
def test_tma_feeds_hoppers_tensor_cores(name: str, shape: str, walked: Mapping[str, int]) -> None:
    """Blocks are copied, not loaded by threads, in either orientation, for one tile or many."""
    tile = {**COPIED[shape], "block_k": 64, **walked}
    copied, loaded = (_compile(name, 90, tile | {"descriptors": n}) for n in (1, 0))
    assert copied.fits
    assert "wgmma" in copied.ptx
    assert "cp.async.bulk.tensor" in copied.ptx
    assert "cp.async.bulk.tensor" not in loaded.ptx


@pytest.mark.parametrize("walked", [{}, {"persistent": 2}], ids=["each", "walked"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_tma_in_kernels_of_several_segments(transposed: int, walked: Mapping[str, int]) -> None:
    """Halves of heads of 32 are matrices of 16 rows."""
    tile = {"block_n": 16, "block_k": 32, "descriptors": 1, "transposed": transposed, **walked}
    found = _compile("matrix_heads-bf16-four", 90, tile)
    assert found.fits
    assert found.ptx.count("cp.async.bulk.tensor") >= 5  # two products in two segments, and one


def test_a_walk_waits_once_for_its_predecessor() -> None:
    ptx = _compile("matrix-bf16-many", 90, {"block_m": 64, "persistent": 2, "descriptors": 1}).ptx
    assert ptx.count("griddepcontrol.wait") == 1
    assert ptx.index("griddepcontrol.wait") < ptx.index("cp.async.bulk.tensor")


def test_ampere_has_no_tma() -> None:
    """A choice made for another GPU does no harm."""
    tile = {"block_m": 64, "block_n": 64, "block_k": 64}
    told = _compile("matrix-bf16-many", 80, tile | {"descriptors": 1})
    assert told.fits
    assert told == _compile("matrix-bf16-many", 80, tile)


@pytest.mark.parametrize("name", ["norm_linear-bf16-one", "gated-bf16-four", "attention-bf16", "softmax"])
def test_kernels_overlap_their_predecessors_on_hopper(name: str) -> None:
    """A kernel lets the next one start, and waits for the one before it; only indices come earlier."""
    ptx = _compile(name, 90).ptx
    start, wait = ptx.index("griddepcontrol.launch_dependents"), ptx.index("griddepcontrol.wait")
    assert start < wait
    assert not re.search(r"(ld|st)\.global|cp\.async", ptx[:wait])
    assert "griddepcontrol" not in _compile(name, 80).ptx
    assert "griddepcontrol" not in _compile(name, 90, {"dependent": 0}).ptx


@pytest.mark.parametrize("name", ["attention-bf16", "attention_split-bf16", "attention_sinks-bf16-1"])
@pytest.mark.parametrize("arch", [80, 90])
def test_agreed_softmax_compiles(name: str, arch: int) -> None:
    """Its second walk, in a branch, costs no spills."""
    assert _compile(name, arch, {"agreed": 1, "max_registers": 255}).fits


def test_limits() -> None:
    assert not Resources("k", 80, 255, 8, 0).fits
    assert not Resources("k", 80, 255, 0, SHARED_LIMIT[80] + 1).fits
    assert Resources("k", 90, 255, 0, SHARED_LIMIT[80] + 1).fits


def _compile(name: str, arch: int, tuned: Mapping[str, int] | None = None) -> Resources:
    kernel, text = source_of(CASES[name](), False, tuned, {80: A100, 90: H100}[arch])
    (resources,) = compile_program(TritonSource(name, text, (kernel,)), arch)
    return resources
