"""Everything that tilewright reads from the environment, in one place.

====================  ==========================================================================
``TILEWRIGHT_CACHE``  folder for graphs, compiled kernels, tuning results and converted weights
``TILEWRIGHT_CXX``    C++ compiler to use instead of the ``g++`` or ``clang++`` on the path
====================  ==========================================================================
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder (not created here): ``TILEWRIGHT_CACHE``, else ``tilewright`` in the user's cache folder.

    The user's cache folder is ``$XDG_CACHE_HOME`` or ``~/.cache``, as the XDG base directory specification has it.
    """
    chosen = os.environ.get("TILEWRIGHT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tilewright"


def cxx() -> str | None:
    """The C++ compiler that the user asked for, or None to search the path."""
    return os.environ.get("TILEWRIGHT_CXX") or None
