"""Every template of the Triton backend, and whole models, against the reference, on Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.experts_cases import CASES as EXPERTS

from .triton_cases import CASES
from .triton_greedy import CASES as GREEDY

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "tests.codegen.triton_worker"]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Callable[[str], list[str]]]:
    """Runs a case by name in a process of its own, and gives what is wrong with its results."""
    with subprocess.Popen(
        WORKER, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None

        def run(name: str) -> list[str]:
            worker.stdin.write(name + "\n")
            worker.stdin.flush()
            return json.loads(worker.stdout.readline())

        yield run
        worker.stdin.close()


@pytest.mark.parametrize(
    "model",
    [
        "llama:float32",
        "llama:bfloat16",
        "llama:float32:0:int8:3",
        "llama:float32:0:int4",
        "opt:float32",
        "gpt2:float32:0::3",
        "bloom:float32",
        "mamba:float32",
        "mamba:bfloat16",
        "bert:float32",
    ],
)
def test_tiny_model_matches_reference(model: str, interpret: Callable[[str], list[str]]) -> None:
    """Prefill in two pieces and decode, left-padded batch of three and batch of one."""
    assert interpret(f"model:{model}") == []


@pytest.mark.parametrize("model", ["llama:float32", "gpt2:bfloat16", "mamba:float32"])
def test_persistent_kernels_match_reference(model: str, interpret: Callable[[str], list[str]]) -> None:
    """The kernels of a layer in one launch, with barriers between them."""
    assert interpret(f"model:{model}:1") == []


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_of_models_match_hugging_face(family: str, interpret: Callable[[str], list[str]]) -> None:
    """Prefill with tokens grouped by expert, decode with experts spelled out."""
    assert interpret(f"architecture:{family}") == []


@pytest.mark.parametrize("family", ["qwen3_5", "kimi_linear"])
def test_hybrid_models_match_hugging_face(family: str, interpret: Callable[[str], list[str]]) -> None:
    """Attention and linear attention in turn: one decay for a head, and one for each row of its state."""
    assert interpret(f"architecture:{family}") == []


SLOW = ("more pairs than a block", "many experts", "many tokens", "everybody chose one")


@pytest.mark.parametrize("name", [n for n in EXPERTS if n not in SLOW])
def test_experts_match_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Products whose weights are looked up by the chosen experts."""
    assert interpret(f"experts:{name}") == []


@pytest.mark.parametrize("name", EXPERTS)
def test_grouped_experts_match_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Products of blocks that have one expert each: blocks of few rows, of nobody, of experts that all chose."""
    assert interpret(f"experts:{name}:16") == []


def test_an_order_of_several_blocks_of_ids_matches_reference(interpret: Callable[[str], list[str]]) -> None:
    assert interpret("experts:many experts:64 block_n=128") == []


@pytest.mark.parametrize("name", ["more pairs than a block", "biases", "transposed", "bf16, many tokens"])
@pytest.mark.parametrize("block", [16, 64])
def test_small_tiles_of_grouped_experts_match_reference(
    name: str, block: int, interpret: Callable[[str], list[str]]
) -> None:
    """Several tiles of columns and steps along K, some cut short, in either orientation; ids in several blocks."""
    for fields in (
        "block_n=16 block_k=16",
        "block_n=32 block_k=32 transposed=1",
        "block_n=16 block_k=16 persistent=3",
    ):
        assert interpret(f"experts:{name}:{block} {fields}") == []


def test_random_modules_keep_their_meaning(interpret: Callable[[str], list[str]]) -> None:
    """Shapes and combinations of ops that no case above thought of, through the whole pipeline."""
    assert interpret("random:120") == []


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    assert interpret(name) == []


SMALL = "block_m=16 block_n=16 block_k=16"
TILED = (
    "linear",
    "parts",
    "norm_linear",
    "gated",
    "rope",
    "quantized",
    "attention",
    "classifier",
    "causal_conv1d",
    "selective_scan",
    "linear_attention",
)


LONG = ("attention_around", "attention_long")  # many tiles: in f32 alone, and below in bf16 alone


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in CASES
        if n.startswith(TILED) and n != "linear-f64-many" and not (n.startswith(LONG) and "-f32" not in n)
    ],
)
def test_small_tiles_match_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Tiles of 16 x 16: rows, columns and contexts that are no multiple of a tile end in the middle of the last one."""
    assert interpret(f"{name} {SMALL}") == []


CODES = [n for n in CASES if n.startswith(("quantized", "rounded")) and {"1", "32"} & set(n.split("-"))]
CODES += [n for n in CASES if n.startswith("rounded_halves")]


@pytest.mark.parametrize("name", CODES)
def test_sums_of_codes_match_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """One row and codes, whose columns are printed one by one: several iterations and one, units beyond the row, and
    columns beyond the last."""
    for fields in ("block_n=8 block_k=64", "block_n=1 block_k=256", "block_n=4 block_k=1024 num_warps=1"):
        assert interpret(f"{name} {fields}") == []


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("stored_rows")])
def test_rows_of_codes_match_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Few rows, printed one by one as their columns are: a tile of the rows that there are, or of more; iterations and
    columns beyond the last. Other tiles multiply floats."""
    for fields in (
        "block_m=8 block_n=4 block_k=64",
        "block_m=16 block_n=1 block_k=128 num_warps=1",
        "block_m=2 block_n=16 block_k=32",
        "transposed=1",
    ):
        assert interpret(f"{name} {fields}") == []


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("stored_rows-int8-")])
def test_rows_of_bytes_match_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Products of bytes, of one group of columns at a time or of several, in tiles of more rows than there are, or of
    fewer, and of more columns."""
    for fields in (
        "block_m=8 block_n=64 block_k=32",
        "block_m=32 block_n=16 block_k=128",
        "block_m=16 block_k=256",
    ):
        assert interpret(f"{name} transposed=1 {fields}") == []


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("round_shared")])
def test_groups_that_share_a_reduction_match_reference(
    name: str, interpret: Callable[[str], list[str]]
) -> None:
    """In tiles of some of a row's groups, of all of them, and of too many to share; in one iteration and in several."""
    for fields in ("block_m=4", "block_m=2 block_k=64", "block_m=64"):
        assert interpret(f"{name} {fields}") == []


@pytest.mark.parametrize("name", [n for n in CASES if {"many", "four"} & set(n.split("-"))])
def test_transposed_tiles_match_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Products of several rows with columns on the left of the tensor cores: each block has its lanes exchanged."""
    assert interpret(f"{name} transposed=1") == []


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("matrix")])
def test_copied_blocks_match_reference(
    name: str, transposed: int, interpret: Callable[[str], list[str]]
) -> None:
    """Factors that TMA copies: what lies beyond the last row and column of a matrix, and of a part of one."""
    for block_k in (16, 32, 128):
        fields = f"block_m=16 block_n=16 block_k={block_k} descriptors=1 transposed={transposed}"
        assert interpret(f"{name} {fields}") == []


WALKED = [
    "linear-f32-one",
    "quantized-int4-rows-many",
    "rope-bf16-four",
    "attention-bf16",
    "batched-bf16",
    "merge",
]
WALKED += [n for n in CASES if n.startswith("matrix")]


@pytest.mark.parametrize("name", WALKED)
def test_walked_tiles_match_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Few programs that walk many tiles, in groups of two or four rows of tiles; and more programs than tiles."""
    for fields in ("persistent=3 group=2", "persistent=7 group=4 transposed=1", "persistent=128"):
        assert interpret(f"{name} {SMALL} descriptors=1 {fields}") == []


ATTENTIONS = [n for n in CASES if n.startswith(("attention", "narrow_cache")) and "f64" not in n]
ATTENTIONS = [n for n in ATTENTIONS if not (n.startswith(LONG) and "-bf16" not in n)]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_agreed_softmax_matches_reference(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Weights relative to 0: masked rows, sinks, windows, parts of the context; scores that call for a second walk."""
    assert interpret(f"{name} block_m=16 block_n=16 agreed=1") == []


@pytest.mark.parametrize(
    ("name", "holds"),
    [(n, "usual" in n or "sinks" in n) for n in ATTENTIONS if "hostile" in n or "sinks-f32" in n],
)
def test_agreed_softmax_walks_again_where_it_must(
    name: str, holds: bool, interpret: Callable[[str], list[str]]
) -> None:
    """Usual scores need one walk; without the second one, huge and strongly negative scores give something else."""
    assert (interpret(f"{name} block_m=16 block_n=16 agreed=1 never_again=1") == []) == holds


@pytest.mark.parametrize("name", GREEDY)
def test_tokens_are_chosen_as_by_operations(name: str, interpret: Callable[[str], list[str]]) -> None:
    """Equal scores, scores that are no numbers, ends that come too early, and rows that are at their end."""
    assert interpret(f"greedy:{name}") == []
