"""Files that other processes may look for at the same time, in folders that other users must not write to."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from tilewright.ir.program import CacheError


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it; its folder is made if missing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def require_private(path: Path) -> None:
    """Raise CacheError when somebody else owns or may write ``path``, OSError when it is not there."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(
            f"{path} is not yours alone (owner {status.st_uid}, mode {stat.filemode(status.st_mode)})"
        )
