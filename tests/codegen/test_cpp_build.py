"""The cache of compiled kernels: found again, never trusted blindly, and never the reason for a failure."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from tilewright.codegen.cpp.build import build_libraries, key_of
from tilewright.ir.errors import CompilerNotFoundError, KernelBuildError

SOURCE = 'extern "C" int answer() { return 42; }\n'
SLOW = "#include <regex>\n#include <map>\n#include <iostream>\n" + SOURCE


def _answer(path: Path) -> int:
    return int(ctypes.CDLL(str(path)).answer())


def _build(folder: Path, source: str = SOURCE, compiler: str | None = None) -> tuple[Path, bool]:
    library = build_libraries({"program": source}, folder, compiler)["program"]
    return library.path, library.from_cache


def test_a_library_is_built_once(tmp_path: Path) -> None:
    """The second build must come from the folder, and run."""
    path, cached = _build(tmp_path / "cache")
    assert not cached
    assert _answer(path) == 42
    assert _build(tmp_path / "cache") == (path, True)


def test_a_cached_library_needs_no_compiler(tmp_path: Path) -> None:
    """A process on a machine without a compiler starts from the cache."""
    path, _ = _build(tmp_path)
    assert _build(tmp_path, compiler="no-such-compiler") == (path, True)


def test_no_compiler_is_a_typed_error(tmp_path: Path) -> None:
    """The error names the remedy."""
    with pytest.raises(CompilerNotFoundError, match="TILEWRIGHT_CXX"):
        _build(tmp_path, compiler="no-such-compiler")


def test_source_that_does_not_compile(tmp_path: Path) -> None:
    """The compiler's own words reach the user, and nothing stays behind."""
    with pytest.raises(KernelBuildError, match="nonsense"):
        _build(tmp_path, "nonsense;")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "changed", "no hash", "empty hash"])
def test_a_damaged_library_is_built_again(tmp_path: Path, damage: str) -> None:
    """Bytes without their hash are never loaded."""
    path, _ = _build(tmp_path)
    digest = path.with_suffix(".sha256")
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:100])
        case "changed":
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        case "no hash":
            digest.unlink()
        case "empty hash":
            digest.write_text("")
    again, cached = _build(tmp_path)
    assert not cached
    assert _answer(again) == 42


@pytest.mark.parametrize("which", ["folder", "library"])
def test_what_others_may_write_is_not_loaded(tmp_path: Path, which: str) -> None:
    """Somebody else could have put code there."""
    path, _ = _build(tmp_path)
    (tmp_path if which == "folder" else path).chmod(0o777)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again, cached = _build(tmp_path)
    assert not cached
    assert _answer(again) == 42
    if which == "folder":
        assert again.parent != tmp_path
        assert "TILEWRIGHT_CACHE" in str(caught[0].message)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """A file where the folder should be: kernels are built in a private folder, with a warning."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        path, cached = _build(blocked)
    assert not cached
    assert _answer(path) == 42


def test_a_full_disk(tmp_path: Path) -> None:
    """A compiler that finds no space: kernels are built elsewhere, with a warning."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *{tmp_path / "cache"}*) echo "No space left on device" >&2; exit 1;; esac\n'
        'exec g++ "$@"\n'
    )
    compiler.chmod(0o700)
    with pytest.warns(UserWarning, match="no space left"):
        path, _ = _build(tmp_path / "cache", compiler=str(compiler))
    assert _answer(path) == 42


def _process(folder: Path, compiler: str | None = None) -> subprocess.Popen[bytes]:
    code = (
        # A shell has what it runs in the background ignore Ctrl-C, and so would all that comes from it.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from tilewright.codegen.cpp.build import build_libraries\n"
        f"build_libraries({{'p': {SLOW!r}}}, Path({str(folder)!r}), {compiler!r})"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both build the same program into one folder; what stays is whole."""
    processes = [_process(tmp_path) for _ in range(2)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    path, cached = _build(tmp_path, SLOW)
    assert cached
    assert _answer(path) == 42


def test_an_interruption_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Ctrl-C while the compiler runs: no library and no draft under a name that is looked for."""
    never_done = tmp_path / "compiler"
    never_done.write_text("#!/bin/sh\nexec sleep 100\n")
    never_done.chmod(0o700)
    process = _process(tmp_path, str(never_done))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".build-*/kernels.cpp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert not (tmp_path / f"{key_of(SLOW)}.so").exists()
    assert list(tmp_path.glob(".build-*")) == []
    path, cached = _build(tmp_path, SLOW)
    assert not cached
    assert _answer(path) == 42
