"""Converted weights on disk: written whole or not at all, and checked when they are found again.

A folder holds what ``save_pretrained`` wrote and ``manifest.json`` with the SHA-256 of every file. It is filled
under another name and renamed when complete, so that neither an interruption nor a second process that does the
same leaves something half-written to be found.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tilewright.errors import CacheError
from tilewright.settings import cache_dir

MANIFEST = "manifest.json"


def find(key: str) -> Path | None:
    """The folder stored under ``key``, or None where there is none or its files are not what was written."""
    folder = _folder(key)
    return folder if _is_whole(folder) else None


def store(key: str, model: PreTrainedModel, tokenizer: Any) -> Path:
    """Saves a model and its tokenizer under ``key`` and returns the folder. Raises ``CacheError``."""
    folder = _folder(key)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{key}-") as scratch:
            new = Path(scratch) / "new"
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            digests = {path.name: _digest(path) for path in sorted(new.iterdir())}
            (new / MANIFEST).write_text(json.dumps(digests, indent=1))
            _put_in_place(new, folder, Path(scratch) / "old")
    except OSError as error:
        raise CacheError(
            f"converted weights could not be saved in {folder.parent}: {error}\n"
            "Free some space there, or set TILEWRIGHT_CACHE to another folder."
        ) from error
    return folder


def _folder(key: str) -> Path:
    return cache_dir() / "weights" / key


def _put_in_place(new: Path, folder: Path, aside: Path) -> None:
    """Renames ``new`` to ``folder``; a damaged folder there goes to ``aside`` first."""
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists() and not _is_whole(folder):
        folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:
        if not _is_whole(folder):  # else another process was faster, with the same contents
            raise
        shutil.rmtree(new)


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        return bool(digests) and all(_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
