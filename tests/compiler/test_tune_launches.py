"""Persistent kernels are used where they are measured to be clearly faster, and only there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.codegen.triton_programs import plan
from tests.compiler.models import tiny
from tilewright import compilation
from tilewright.backends import Built, build
from tilewright.options import Options, check_options
from tilewright.runtime.executor import EngineSpec
from tilewright.tune_launches import RESIDENTS, choose, recall


class _Pretender:
    """Takes so many milliseconds for a step, and may have refused its persistent kernel."""

    def __init__(self, milliseconds: float, refused: bool = False) -> None:
        self.seconds, self.refused = milliseconds / 1e3, {"whole"} if refused else set()

    def run(self, *_request: object) -> None:
        time.sleep(self.seconds)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def setting(model: Any) -> tuple[Any, Options, EngineSpec]:
    planned = plan(model, (1,), 64)
    options = check_options(model, (1,), 64, None, None, "full", "reference", None)
    spec = EngineSpec.of(planned.programs["prefill"], "decoder", options.device, vocab_size=128)
    return planned.programs["decode_b1"], options, spec


def chosen(setting: tuple[Any, Options, EngineSpec], executors: Sequence[_Pretender]) -> tuple[int, str]:
    program, options, spec = setting
    return choose(program, {}, options, spec, lambda residents: executors)  # type: ignore[arg-type, return-value]


def test_the_fastest_is_chosen_recorded_and_recalled(setting: tuple[Any, Options, EngineSpec]) -> None:
    assert recall(setting[0], {}, setting[1]) == 0
    residents, line = chosen(setting, [_Pretender(3), _Pretender(2), _Pretender(1), _Pretender(3)])
    assert residents == RESIDENTS[2]
    assert "decode_b1, persistent kernels: one launch per kernel" in line
    assert recall(setting[0], {}, setting[1]) == RESIDENTS[2]
    assert recall(setting[0], {"layer0_0_matmul": {"num_warps": 8}}, setting[1]) == 0


def test_a_refused_kernel_and_noise_change_nothing(setting: tuple[Any, Options, EngineSpec]) -> None:
    residents, line = chosen(
        setting, [_Pretender(2), _Pretender(0.5, refused=True), _Pretender(2.2), _Pretender(4)]
    )
    assert residents == 0
    assert "1 per multiprocessor" not in line
    assert recall(setting[0], {}, setting[1]) == 0


def test_compile_builds_with_what_was_chosen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a backend that pretends to have persistent kernels: what is built at last has the chosen number."""
    given: list[list[int]] = []

    def noted(programs: Any, weights: Any, options: Any, tunables: Any = (), residents: Any = ()) -> Built:
        given.append(list(residents))
        return build(programs, weights, options, tunables)

    monkeypatch.setattr(compilation, "build", noted)
    monkeypatch.setattr(compilation, "has_persistent_kernels", lambda options: True)
    monkeypatch.setattr(
        compilation, "choose_launches", lambda *a: (2 if a[0].batch == 4 else 0, f"{a[0].name} tuned")
    )
    import tilewright as tw

    fast = tw.compile(model, batch_sizes=(1, 4), max_length=64, backend="reference", autotune="full")
    assert given == [[0, 0, 0], [0, 2, 0]]
    assert "decode_b4 tuned" in fast.report().notes
