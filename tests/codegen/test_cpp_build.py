"""The cache of compiled kernels: trusted only when whole and ours, never in the way when it is not."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewright.codegen.cpp import build as build_module
from tilewright.codegen.cpp.build import Library, build_libraries
from tilewright.errors import CompilerNotFoundError, KernelBuildError

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "kernels"
    path.mkdir(mode=0o700)
    return path


def build(folder: Path, source: str = SOURCE, compiler: str | None = None) -> Library:
    return build_libraries({"it": source}, folder, compiler)["it"]


def answer(library: Library) -> int:
    return int(ctypes.CDLL(str(library.path)).answer())


def test_second_build_comes_from_the_cache(folder: Path) -> None:
    first = build(folder)
    assert not first.from_cache
    again = build(folder)
    assert again.from_cache
    assert again.path == first.path
    assert answer(again) == 42


def test_cached_library_needs_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    monkeypatch.setenv("PATH", "")
    assert build(folder).from_cache


def test_no_compiler_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompilerNotFoundError, match="TILEWRIGHT_CXX"):
        build(folder)
    with pytest.raises(CompilerNotFoundError, match="no-such-compiler"):
        build(folder, compiler="no-such-compiler")


def test_source_that_does_not_compile(folder: Path) -> None:
    with pytest.raises(KernelBuildError, match="nonsense"):
        build(folder, "nonsense;")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "digest", "no digest"])
def test_damaged_library_is_built_again(folder: Path, damage: str) -> None:
    library = build(folder).path
    digest = library.with_suffix(".sha256")
    content = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        library.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "digest":
        digest.write_bytes(b"\xff\x00 not a digest")
    else:
        digest.unlink()
    again = build(folder)
    assert not again.from_cache
    assert answer(again) == 42
    assert build(folder).from_cache


def test_folder_that_others_may_write_is_not_used(folder: Path) -> None:
    build(folder)
    folder.chmod(0o777)
    with pytest.warns(UserWarning, match="TILEWRIGHT_CACHE"):
        library = build(folder)
    assert not library.from_cache
    assert library.path.parent != folder
    assert answer(library) == 42


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    with pytest.warns(UserWarning, match="not kept"):
        library = build(blocked / "kernels")
    assert answer(library) == 42


def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while the library is written costs a warning, not the compilation."""
    run = build_module._run_compiler

    def full(command: list[str], where: Path) -> None:
        if where == folder:
            raise OSError(28, "No space left on device")
        run(command, where)

    monkeypatch.setattr(build_module, "_run_compiler", full)
    with pytest.warns(UserWarning, match="No space left"):
        library = build(folder)
    assert answer(library) == 42
    assert list(folder.iterdir()) == []


def test_interrupted_compilation_leaves_nothing(folder: Path) -> None:
    """Ctrl-C while the compiler runs: nothing half-written is there, and the next build is a whole one."""
    slow = folder.parent / "slow-compiler"
    slow.write_text("#!/bin/sh\nsleep 30\n")
    slow.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from tilewright.codegen.cpp.build import build_libraries; "
        "print('ready', flush=True); build_libraries({'it': sys.argv[1]}, Path(sys.argv[2]), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, SOURCE, str(folder), str(slow)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while not any(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode != 0
    assert [p.name for p in folder.iterdir() if p.suffix in (".so", ".sha256")] == []
    assert not build(folder).from_cache
    assert build(folder).from_cache


def _build_in_process(folder: str) -> int:
    return answer(build(Path(folder)))


def test_processes_may_build_at_once(folder: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_build_in_process, [str(folder)] * 3) == [42, 42, 42]
    assert build(folder).from_cache
