"""A kernel that does not run gets the printer's next tile; the model goes on, and says so."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.codegen.triton_programs import plan
from tests.compiler.models import tiny
from tilewright.backends import candidates
from tilewright.errors import KernelBuildError
from tilewright.fallback import TileFallback
from tilewright.ir.program import Program
from tilewright.options import Options
from tilewright.tune_kernels import KernelTuner

OPTIONS = Options((1,), 64, "", "", "cached", "triton", torch.device("cpu"), None)
ERROR = RuntimeError("out of resource: shared memory")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def program() -> Program:
    return plan(tiny("llama").to(torch.bfloat16)).programs["prefill"]


def product_of(program: Program) -> str:
    return next(s.name for s in program.kernels() if any(o.opcode == "matmul" for o in s.op.body))


def test_every_tile_is_tried_once_and_then_the_error_says_which(program: Program) -> None:
    fallback, kernel = TileFallback(program, {}, OPTIONS, record=False), product_of(program)
    paths: list[Path] = []

    def exhaust() -> None:
        for _ in range(20):
            paths.append(fallback(kernel, ERROR))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(KernelBuildError) as caught:
            exhaust()
    assert 2 <= len(paths) <= 9  # the tuner offers nine, the first of which had failed; then the smallest
    assert len({p.read_text() for p in paths}) == len(paths)
    messages = [str(w.message) for w in said]
    assert len(messages) == len(paths)
    for before, after in pairwise(messages):
        tile = before.split("it goes on as ")[1].removesuffix(", which may be slower")
        assert f"kernel {kernel} of prefill does not run as {tile}: out of resource" in after
    assert "runs in none of its tiles on H100" in str(caught.value)
    assert str(caught.value).count(" warps, ") == len(paths) + 1
    assert "another version of Triton" in str(caught.value)


def test_only_the_kernel_that_failed_changes(program: Program) -> None:
    fallback, kernel = TileFallback(program, {}, OPTIONS, record=False), product_of(program)
    with pytest.warns(UserWarning, match=kernel):
        fallback(kernel, ERROR)
    assert set(fallback.tunables) == {kernel}
    other = next(s.name for s in program.kernels() if s.name != kernel)
    with pytest.warns(UserWarning, match=other):
        fallback(other, ERROR)
    assert set(fallback.tunables) == {kernel, other}


def test_a_tuned_kernel_falls_back_to_its_default_first(program: Program) -> None:
    kernel = product_of(program)
    tuned = KernelTuner.of(program, candidates(OPTIONS), OPTIONS).ways[kernel][2]
    fallback = TileFallback(program, {kernel: tuned}, OPTIONS, record=False)
    with pytest.warns(UserWarning, match="it goes on as"):
        fallback(kernel, ERROR)
    assert fallback.tunables[kernel] == {}


@pytest.mark.parametrize("record", [True, False])
def test_a_later_compilation_starts_with_what_ran(program: Program, record: bool) -> None:
    kernel = product_of(program)
    fallback = TileFallback(program, {}, OPTIONS, record)
    with pytest.warns(UserWarning, match="it goes on as"):
        fallback(kernel, ERROR)
    found = KernelTuner.of(program, candidates(OPTIONS), OPTIONS).recall()
    assert {c.kernel: c.changes for c in found} == ({kernel: fallback.tunables[kernel]} if record else {})


SCRIPT = """
import warnings
import torch, tilewright as tw
from tests.compiler.models import tiny
from tests.quick_interpreter import hurry
from tilewright.runtime import kernel_modules, kernels

hurry()
genuine, broken = kernels.load_launchers, []

def first_product_fails(path):
    launchers = genuine(path)
    names = [n for n in launchers.of if "linear" in n or "matmul" in n] or list(launchers.of)
    if len(broken) < 2:  # the first module of each program
        def fail(pointers, dims, compiled=None):
            raise RuntimeError("out of resource: shared memory")
        broken.append(names[0])
        return kernel_modules.Launchers({**launchers.of, names[0]: fail}, launchers.stored_dims)
    return launchers

kernels.load_launchers = first_product_fails
model = tiny("llama")
fast = tw.compile(model, backend="triton", max_length=32)
ids = torch.tensor([[5, 17, 99, 23, 42]])
given = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = [fast.generate(ids, **given) for _ in range(2)]
assert all(torch.equal(f, model.generate(ids, **given)) for f in found)
said = [str(w.message) for w in said if "it goes on as" in str(w.message)]
assert len(said) == 2, said
assert all(name in text for name, text in zip(sorted(broken), sorted(said))), (broken, said)
print("survived")
"""


def test_a_model_goes_on_when_its_first_tiles_do_not_run(folder: Path) -> None:
    """On Triton's interpreter, which has to be chosen before a process imports triton."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TILEWRIGHT_CACHE": str(folder)}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "survived", done.stdout + done.stderr
