"""What the commands have in common on their command lines."""

from __future__ import annotations

import shlex
import sys

from benchmarks.results import EAGER, LLAMA_CPP, OURS, TORCH_COMPILE
from tilewright.errors import OptionError

SYSTEMS = {"tilewright": OURS, "eager": EAGER, "torch.compile": TORCH_COMPILE, "llama.cpp": LLAMA_CPP}
"""Systems by their names on the command line."""


def known(option: str, text: str, names: tuple[str, ...]) -> list[str]:
    """The names in a list separated by commas. Raises OptionError for one that is not among ``names``."""
    given = [name.strip() for name in text.split(",")]
    unknown = [name for name in given if name not in names]
    if unknown:
        raise OptionError(f"{option}: '{unknown[0]}' is none of {', '.join(names)}")
    return list(dict.fromkeys(given))


def lengths(option: str, text: str) -> list[int]:
    """The numbers in a list separated by commas. Raises OptionError unless each is 2 or more."""
    names = [name.strip() for name in text.split(",")]
    if not all(name.isdecimal() and int(name) > 1 for name in names):
        raise OptionError(f"{option}: '{text}' is no list of lengths of 2 or more; write for example 64,1024")
    return [int(name) for name in names]


def command_line(module: str) -> str:
    """What was typed to get here, less where the result was to go, which is a place on that machine."""
    given = iter(sys.argv[1:])
    kept = [a for a in given if not (a.startswith("--output=") or (a == "--output" and next(given, "")))]
    return shlex.join(["python", "-m", module, *kept])
