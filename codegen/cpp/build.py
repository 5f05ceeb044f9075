"""From C++ sources to shared libraries, kept on disk under the hash of what they were made from.

A cached library is loaded only when the folder is the user's own and nobody else may write to it, and when its bytes
have the hash that was written beside it. It is built under another name and renamed when complete, so an interruption,
or a second process doing the same, leaves nothing half-written to be found. Where the folder cannot be used (not
writable, full, not trustworthy), libraries are built in a private temporary folder and a warning says why.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tilewright.ir.errors import CacheError, CompilerNotFoundError, KernelBuildError

HEADERS = Path(__file__).parent / "include"
# GCC would use half of an AVX-512 register on most processors that have it, which the headers use in full.
_X86 = platform.machine() in ("x86_64", "AMD64")
_NATIVE = ("-march=native", "-mprefer-vector-width=512") if _X86 else ("-mcpu=native",)
FLAGS = (
    "-std=c++17", "-O3", "-fopenmp-simd", "-pthread", "-fPIC", "-shared", "-w",
    # Libraries stay on the machine that they are built on (the key names its processor), so all of it may be used.
    *_NATIVE,
    # Sums may be contracted to fused multiply-adds; nobody reads errno or floating-point traps. Infinities and NaNs
    # keep their meaning, so -ffast-math is not among them.
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
_FORMAT = "1"


@dataclass(frozen=True)
class Library:
    """A shared library that may be loaded, and whether it was found rather than built."""

    path: Path
    from_cache: bool


def build_libraries(
    sources: Mapping[str, str],
    folder: Path,
    compiler: str | None = None,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Library]:
    """Build each source that the cache folder does not hold, in parallel.

    sources: name -> C++ text. folder: where libraries are kept (made if missing). compiler: path or name of a C++
    compiler; by default g++, clang++ or c++ from the path, looked for only when something has to be built. ``done`` is
    called with each name. Raises CompilerNotFoundError, and KernelBuildError with the compiler's own words.
    """
    found = {name: _find(folder, key_of(text)) for name, text in sources.items()}
    missing = [name for name, path in found.items() if path is None]
    built: dict[str, Path] = {}
    if missing:
        toolchain = find_compiler(compiler)

        def build(name: str) -> Path:
            path = _build(sources[name], folder, toolchain)
            done(name)
            return path

        with ThreadPoolExecutor(max_workers=max(1, min(len(missing), os.cpu_count() or 1))) as pool:
            built = dict(zip(missing, pool.map(build, missing), strict=True))
    return {name: Library(path or built[name], path is not None) for name, path in found.items()}


def key_of(source: str) -> str:
    """The name under which a source's library is kept: what its bytes depend on, less the compiler's version, so that
    a process on a machine without a compiler finds it too."""
    digest = hashlib.sha256()
    for part in (_FORMAT, source, _headers(), *FLAGS, processor()):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:40]


@lru_cache(maxsize=1)
def _headers() -> str:
    return "\0".join(p.read_text(encoding="utf-8") for p in sorted(HEADERS.rglob("*.h")))


@lru_cache(maxsize=1)
def processor() -> str:
    """The name and the instruction sets of this machine, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return f"{platform.machine()} " + " ".join(sorted(set(kept)))


def find_compiler(wanted: str | None = None) -> str:
    """The path of a C++ compiler. Raises CompilerNotFoundError naming the remedy."""
    for name in (wanted,) if wanted else ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    tried = f"{wanted!r} (from TILEWRIGHT_CXX)" if wanted else "g++, clang++ or c++ on the path"
    raise CompilerNotFoundError(
        f"no C++ compiler: looked for {tried}; install one (Debian and Ubuntu: apt install g++), set TILEWRIGHT_CXX to "
        "its path, or use backend='reference', which needs none"
    )


# -- the cache folder --------------------------------------------------------------------------------------------------


def _find(folder: Path, key: str) -> Path | None:
    """A library that is whole and ours, or None."""
    library, digest = folder / f"{key}.so", folder / f"{key}.sha256"
    try:
        _require_private(folder)
        _require_private(library)
        expected = digest.read_text(encoding="ascii").strip()
        actual = hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError, CacheError):
        return None
    return library if actual == expected else None


def _require_private(path: Path) -> None:
    """Raise CacheError when somebody else owns or may write ``path``."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(
            f"{path} is not yours alone (owner {status.st_uid}, mode {stat.filemode(status.st_mode)})"
        )


def _build(source: str, folder: Path, compiler: str) -> Path:
    """Build into the cache folder, or into a private one where that cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(folder)
        return _compile_into(folder, source, compiler)
    except (OSError, CacheError) as error:
        warnings.warn(
            f"compiled kernels are not kept: {error}; fix the folder, or set TILEWRIGHT_CACHE to another one",
            stacklevel=2,
        )
    return _compile_into(_private_folder(), source, compiler)


@lru_cache(maxsize=1)
def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tilewright-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile_into(folder: Path, source: str, compiler: str) -> Path:
    """Compile under a temporary name, then rename: the library first, since without its hash it is not there."""
    key = key_of(source)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as draft:
        text, library, digest = (
            Path(draft) / name for name in ("kernels.cpp", "kernels.so", "kernels.sha256")
        )
        text.write_text(source, encoding="utf-8")
        _run_compiler([compiler, *FLAGS, f"-I{HEADERS}", str(text), "-o", str(library)], folder)
        digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest(), encoding="ascii")
        library.chmod(0o700)
        library.replace(folder / f"{key}.so")
        digest.replace(folder / f"{key}.sha256")
    return folder / f"{key}.so"


def _run_compiler(command: list[str], folder: Path) -> None:
    """Run the compiler. Raises OSError for a full disk, KernelBuildError for anything else that it says."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelBuildError(f"the C++ compiler {command[0]} does not run: {error}") from error
    if result.returncode == 0:
        return
    if "No space left" in result.stderr or shutil.disk_usage(folder).free < 1 << 20:
        raise OSError(f"no space left in {folder}")
    raise KernelBuildError(
        f"{command[0]} could not compile the generated kernels (exit status {result.returncode}); this is a bug in "
        f"tilewright or a compiler older than C++17:\n{result.stderr.strip()[-2000:]}"
    )
