"""Kernels as torch.compile gets them: the same results, in a form that it can do something with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tilewright as tw
from benchmarks import torch_kernels
from benchmarks.large_models import with_random_values
from benchmarks.torch_kernels import CannotCompareError, Kernel, check, strided, traced
from tilewright.trials import Trial

CPU = torch.device("cpu")


def kernels(model: str) -> Iterator[tuple[str, Kernel]]:
    """Every kernel of decoding and prefill, with its program's phase."""
    fast = tw.compile(
        with_random_values(model, CPU, 64), batch_sizes=(2,), max_length=64, backend="reference"
    )
    engine = fast._tilewright.engine
    for executor in (*engine.decode_executors.values(), engine.prefill_executor):
        trial = Trial.of(executor.program, engine.spec)
        for kernel in torch_kernels.kernels(executor.program, trial, CPU):
            yield executor.program.phase, kernel


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt"])
def test_every_kernel_but_split_attention_is_said_in_torch(model: str) -> None:
    """With the reference's results; without as_strided, for which a compiler puts its operand into memory; and without
    constants in memory."""
    left_out, found = [], []
    for phase, kernel in kernels(model):
        given = kernel.tensors()
        try:
            graph = traced(kernel, given)
        except CannotCompareError as error:
            left_out.append((phase, str(error)))
            continue
        check(graph, kernel, given)
        nodes = [node for node in graph.graph.nodes if node.op in ("call_function", "get_attr")]
        assert not [n for n in nodes if n.op == "get_attr" or "as_strided" in str(n.target)], kernel.step.name
        found.append((phase, " ".join(str(n.target) for n in nodes)))
    assert left_out == [("decode", "torch has no form of attention_split")]
    assert any(phase == "decode" and "copy_" in names for phase, names in found)  # keys and values, in place
    assert any(phase == "prefill" and "scaled_dot_product" in names for phase, names in found)


def test_a_kernel_is_compiled_and_timed() -> None:
    kernel = next(k for phase, k in kernels("tiny-llama") if "pointwise" in k.step.name)
    assert torch_kernels.seconds(kernel) > 0


def test_another_result_is_no_comparison() -> None:
    kernel = next(k for _, k in kernels("tiny-llama") if "matmul" in k.step.name and not k.caches)
    given = kernel.tensors()
    graph = traced(kernel, given)
    with pytest.raises(CannotCompareError, match="another result"):
        check(lambda *args: [2 * t for t in graph(*args)], kernel, given)


@pytest.mark.parametrize(
    ("shape", "offset", "strides"),
    [
        ((2, 3, 4), 0, (12, 4, 1)),
        ((3, 2, 4), 0, (4, 12, 1)),  # two axes change places
        ((2, 1, 2), 5, (12, 7, 1)),  # a slice
        ((2, 5, 3), 1, (12, 0, 4)),  # one axis is read again and again, of another every fourth
        ((1,), 23, (1,)),
    ],
)
def test_a_strided_view_is_said_by_ordinary_ones(
    shape: tuple[int, ...], offset: int, strides: tuple[int, ...]
) -> None:
    x = torch.arange(24).view(2, 3, 4)
    found = strided(x, shape, offset, strides)
    assert found is not None
    assert torch.equal(found, x.as_strided(shape, strides, offset))


def test_overlapping_rows_are_no_ordinary_view() -> None:
    assert strided(torch.arange(24), (20, 3), 0, (1, 1)) is None
