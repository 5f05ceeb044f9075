"""Which kernels are compiled before the first launches, and where none are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.codegen.triton_programs import Planned, plan
from tests.compiler.models import tiny
from tilewright import backends
from tilewright.codegen.triton import compiling
from tilewright.options import Options
from tilewright.runtime import triton_executor

OPTIONS = Options((1,), 64, "", "", "off", "triton", torch.device("cpu"), None)


@pytest.fixture(scope="module")
def planned() -> Planned:
    return plan(tiny("llama"))


@pytest.mark.parametrize("residents", [0, 1])
def test_all_that_first_launches_need_is_compiled_and_no_more(
    residents: int, planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every program; a persistent kernel spares those that it stands for."""
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))
    for module in (backends, triton_executor):
        monkeypatch.setattr(module, "require_device", lambda device: None)
    asked: list[tuple[Any, Any]] = []
    archs: list[int] = []
    monkeypatch.setattr(
        compiling, "compile_ahead", lambda wanted, arch: (asked.extend(wanted), archs.append(arch))
    )
    programs = list(planned.programs.values())
    assert [p.phase for p in programs] == ["decode", "prefill"]
    backends.build(programs, planned.weights(), OPTIONS, residents=[residents, 0])
    assert archs == [90]
    assert all(isinstance(f, JITFunction) and f.__name__ == k.name for f, k in asked)
    decode, prefill = ([s.name for s in p.kernels()] for p in programs)
    if residents:
        assert {n.split("_")[0] for n in decode} == {"main", "layer0"}
        decode = ["main_0_persistent", "layer0_persistent", "main_2_matmul"]
    assert sorted(k.name for _, k in asked) == sorted(decode + prefill)


INTERPRETED = """
import tilewright as tw
from tests.compiler.models import tiny
from tilewright.codegen.triton import compiling

def never(*_):
    raise AssertionError("the interpreter compiles nothing")

compiling.compile_ahead = compiling.get_ready = never
fast = tw.compile(tiny("llama"), backend="triton", max_length=32)
print(fast.report().backend)
"""


def test_the_interpreter_compiles_nothing(tmp_path: Path) -> None:
    """It has to be chosen before a process imports triton."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "TILEWRIGHT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "triton", done.stdout + done.stderr
