"""What a tuner may change of a generated kernel: fields of a backend's ``Tile``, by kernel name.

Both backends choose tiles themselves; a tunable replaces one field of what they chose. Field names and sensible
values belong to the backend, which offers its candidates (``codegen.triton.candidates``, ``codegen.cpp.tiling``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from tilewright.ir.errors import OptionError

Changes = Mapping[str, int]
"""Field of a ``Tile`` -> the value that replaces what was chosen."""

Tunables = Mapping[str, Changes]
"""Kernel name -> changes to the tile of every segment of that kernel."""

NONE: Changes = {}

T = TypeVar("T")


def tuned(tile: T, changes: Changes) -> T:
    """A tile (a dataclass of integers and switches) with fields replaced.

    Raises OptionError for an unknown field, a block size that is no power of two, a number below 1 (or 0, where that is
    the field's default and leaves the choice to somebody else), or a switch that is neither 0 nor 1.
    """
    known: dict[str, Any] = {f.name: f.default for f in fields(tile)}  # type: ignore[arg-type]
    for name, value in changes.items():
        if name not in known:
            raise OptionError(f"unknown tunable {name!r}; a kernel has {', '.join(sorted(known))}")
        if isinstance(known[name], bool):
            if value not in (0, 1):
                raise OptionError(f"tunable {name}={value} must be 0 or 1")
        elif value < min(1, known[name]):
            raise OptionError(f"tunable {name}={value} is too small")
        elif name.startswith("block") and value & (value - 1):
            raise OptionError(f"tunable {name}={value} must be a power of two")
    return replace(tile, **{name: type(known[name])(value) for name, value in changes.items()})  # type: ignore[type-var]


def text_of(changes: Changes) -> str:
    """Changes for people: ``block_n=32 num_warps=8``, or ``default``."""
    return " ".join(f"{name}={value}" for name, value in changes.items()) or "default"
