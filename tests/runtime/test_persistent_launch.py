"""A persistent kernel takes the place of the launches that it stands for, and they its place where it does not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.codegen.triton_programs import Planned, plan
from tests.compiler.models import tiny
from tilewright.runtime import triton_executor
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import EngineSpec
from tilewright.runtime.kernel_modules import write_module
from tilewright.runtime.triton_executor import TritonExecutor

MODULE = """
from tests.runtime.test_persistent_launch import launched

LAUNCH = {{name: launched(name) for name in {names}}}
STORED_DIMS = ("T",)
PERSISTENT = {{"whole": {layer}}}
"""

calls: list[tuple[str, list[int], Any]] = []
refuses: set[str] = set()


def launched(name: str) -> Any:
    def launch(pointers: list[Any], dims: dict[str, Any], compiled: Any = None) -> None:
        if name in refuses:
            raise RuntimeError("too many blocks in cooperative launch")
        calls.append((name, [p.data_ptr() for p in pointers], pointers[-1]))

    return launch


@pytest.fixture(scope="module")
def planned() -> Planned:
    return plan(tiny("llama"), (1,), 64)


@pytest.fixture
def engine(planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(triton_executor, "require_device", lambda device: None)
    calls.clear()
    refuses.clear()
    program = planned.programs["decode_b1"]
    names = [s.name for s in program.kernels()]
    layer = tuple(n for n in names if n.startswith("layer0"))
    path = write_module(tmp_path, MODULE.format(names=[*names, "whole"], layer=layer))
    executor = TritonExecutor(program, planned.weights(), path, torch.device("cpu"))
    spec = EngineSpec.of(planned.programs["prefill"], "decoder", torch.device("cpu"), vocab_size=128)
    return Engine([executor], executor, spec)


def run(engine: Engine) -> list[str]:
    calls.clear()
    engine.advance(engine.new_state(1))
    return [name for name, _, _ in calls]


def test_it_gets_the_pointers_of_all_its_kernels_and_a_counter(engine: Engine) -> None:
    assert run(engine).count("whole") == 2  # layers
    assert not [n for n, _, _ in calls if n.startswith("layer0")]
    whole = [(pointers, counter) for n, pointers, counter in calls if n == "whole"]
    assert whole[0][1] is whole[1][1]
    assert whole[0][1].dtype == torch.int64
    refuses.add("whole")
    with pytest.warns(UserWarning, match=r"kernel whole does not run.*launched one by one"):
        run(engine)
    apart = [pointers for n, pointers, _ in calls if n.startswith("layer0")]
    half = len(apart) // 2
    for layer, (pointers, _) in zip((apart[:half], apart[half:]), whole, strict=True):
        flat = [p for each in layer for p in each]
        assert len(flat) == len(pointers) - 1


def test_where_it_does_not_run_its_kernels_do_from_then_on(engine: Engine) -> None:
    refuses.add("whole")
    with pytest.warns(UserWarning, match=r"too many blocks.*launched one by one"):
        first = run(engine)
    assert "whole" not in first
    refuses.clear()
    assert run(engine) == first
    assert engine.decode_executors[1].refused == {"whole"}  # type: ignore[attr-defined]
