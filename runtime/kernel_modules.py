"""Generated Triton modules as files: written once, named by their content, and imported.

Triton names a compiled kernel by the text of its function, of the functions that it calls and by its line in the file,
not by the file's path. A program printed to the same bytes therefore finds its kernels in Triton's own cache on disk: a
second process imports the same file and compiles nothing, as long as Triton, its options and the device are the same.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tilewright.ir.program import CacheError, KernelBuildError

from .files import require_private, write_atomically

Launch = Callable[..., Any]
"""launch(pointers, dims, compiled=None): launch a kernel, through Triton's JIT, or as what an earlier launch gave."""


def write_module(folder: Path, text: str) -> Path:
    """The path of a file that holds exactly ``text``, to be imported: in ``folder``, or, with a warning, in a private
    temporary one where that cannot be written, or is not the user's alone.

    The name follows from the content; a file that was damaged is replaced, and none is ever seen half-written.
    """
    name = f"kernels_{hashlib.sha256(text.encode()).hexdigest()[:24]}.py"
    try:
        return _write(folder / name, text)
    except (OSError, CacheError) as error:
        warnings.warn(
            f"generated kernels are not kept: {error}; fix the folder, or set TILEWRIGHT_CACHE to another one",
            stacklevel=2,
        )
        # Triton reads a kernel's source from its file, so there must be one somewhere.
        return _write(_private_folder() / name, text)


@lru_cache(maxsize=1)
def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tilewright-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write(path: Path, text: str) -> Path:
    """Raises OSError, or CacheError when somebody else could change what is going to be imported."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(path.parent)
    if path.is_file() and path.read_bytes() == text.encode():
        require_private(path)
    else:
        write_atomically(path, text)
    return path


@dataclass(frozen=True)
class Launchers:
    """What a generated module holds: a function per kernel that launches it, the dims that kernels read from memory, of
    each persistent kernel the names of those that it stands for, and the kernels themselves, under ``triton.jit``."""

    of: Mapping[str, Launch]
    stored_dims: tuple[str, ...]
    persistent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    functions: Mapping[str, Any] = field(default_factory=dict)


def load_launchers(path: Path) -> Launchers:
    """Import a generated module. Raises KernelBuildError when it is none."""
    spec = importlib.util.spec_from_file_location(f"tilewright_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise KernelBuildError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        functions = {name: found for name, found in vars(module).items() if name in module.LAUNCH}
        return Launchers(module.LAUNCH, module.STORED_DIMS, getattr(module, "PERSISTENT", {}), functions)
    except Exception as error:
        raise KernelBuildError(f"generated Triton module {path} cannot be loaded: {error}") from error
