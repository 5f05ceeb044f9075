"""The set-up script says what is missing, before it makes anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def setup(venv: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(ROOT / "scripts" / "setup.sh"), str(venv), "demo"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder that holds what the script itself needs, and neither Python nor a C++ compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "bash"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_a_missing_compiler_is_named(tmp_path: Path, tools: Path) -> None:
    result = setup(tmp_path / "venv", PATH=str(tools))
    assert result.returncode == 1
    assert "g++ was not found" in result.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("broken", ["absent", "fails", "too old"])
def test_a_missing_python_is_named(tmp_path: Path, tools: Path, broken: str) -> None:
    executable(tools / "g++", "#!/bin/bash\n")
    if broken == "fails":  # such as the stand-in of a version manager for a version that is not chosen
        executable(tools / "python3.12", "#!/bin/bash\nexit 127\n")
    elif broken == "too old":
        executable(tools / "python3", "#!/bin/bash\nexit 1\n")
    result = setup(tmp_path / "venv", PATH=str(tools), PYTHON="")
    assert result.returncode == 1
    assert "no usable Python 3.11 or 3.12" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_named_python_is_the_only_one_tried(tmp_path: Path) -> None:
    result = setup(tmp_path / "venv", PYTHON="/nowhere/python3")
    assert result.returncode == 1
    assert "PYTHON=/nowhere/python3" in result.stderr
