"""Writing, loading and refusing generated Triton modules; running them is tested on the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tilewright.errors import DeviceError, KernelBuildError
from tilewright.runtime.device import require_device
from tilewright.runtime.kernel_modules import Launchers, load_launchers, write_module

EMPTY = 'LAUNCH = {}\nSTORED_DIMS = ("T",)\n'


def test_a_module_is_written_once_and_named_by_content(tmp_path: Path) -> None:
    first = write_module(tmp_path, EMPTY)
    assert first == write_module(tmp_path, EMPTY)
    assert first != write_module(tmp_path, "LAUNCH = {'k': None}\n")
    assert len(list(tmp_path.iterdir())) == 2
    assert load_launchers(first) == Launchers({}, ("T",))


def test_a_damaged_module_is_replaced(tmp_path: Path) -> None:
    path = write_module(tmp_path, EMPTY)
    path.write_text("LAUNCH = {")
    assert write_module(tmp_path, EMPTY).read_text() == EMPTY


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    path = write_module(obstacle / "folder", EMPTY)
    assert path.read_text() == EMPTY


def test_a_module_that_does_not_load_is_a_build_error(tmp_path: Path) -> None:
    with pytest.raises(KernelBuildError, match="cannot be loaded"):
        load_launchers(write_module(tmp_path, "x = 1\n"))
    with pytest.raises(KernelBuildError, match="cannot be loaded"):
        load_launchers(write_module(tmp_path, "this is no python\n"))


def test_a_cpu_needs_the_interpreter() -> None:
    with pytest.raises(DeviceError, match="TRITON_INTERPRET=1"):
        require_device(torch.device("cpu"))
