"""What our own code is, as a hash: what was kept by other code is not found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def files_of(folders: Iterable[Path]) -> list[Path]:
    """Sources in folders and below, C++ headers among them, in an order that does not depend on the machine."""
    return [p for folder in folders for p in sorted(folder.rglob("*")) if p.suffix in (".py", ".h")]


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
