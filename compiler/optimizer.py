"""Runs named passes over IR text: what ``tilewright opt`` does, as functions."""

from __future__ import annotations

from collections.abc import Iterable

from tilewright.errors import OptionError
from tilewright.ir.parser import parse_module
from tilewright.ir.verify import verify_module
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import PASSES


def available() -> list[tuple[str, str]]:
    """Name and reason of every pass, in the order in which the pipeline runs them."""
    return [(entry.name, entry.reason) for entry in PASSES]


def options(fixed: Iterable[str], last_tokens: bool = False, splits: int = 0) -> PassOptions:
    """Pass options from ``NAME=VALUE`` texts. Raises OptionError for text of another form."""
    dims = []
    for item in fixed:
        name, _, value = item.partition("=")
        if not name.isidentifier() or not value.isdecimal():
            raise OptionError(f"'{item}' does not fix a dim; write NAME=VALUE, for example S=1")
        dims.append((name, int(value)))
    return PassOptions(fixed=tuple(dims), last_tokens=last_tokens, splits=splits)


def run(text: str, names: Iterable[str], settings: PassOptions, verify: bool = True) -> str:
    """The module in ``text`` after the passes ``names``, as text.

    Raises ParseError, VerifyError (naming the pass after which it is broken) and OptionError for unknown names.
    """
    by_name = {entry.name: entry for entry in PASSES}
    chosen = list(names)
    unknown = [name for name in chosen if name not in by_name]
    if unknown:
        raise OptionError(f"no pass {', '.join(unknown)}; there are {', '.join(by_name)}")
    module = parse_module(text)
    if verify:
        verify_module(module)
    for name in chosen:
        module = by_name[name].run(module, settings)
        if verify:
            verify_module(module)
    return str(module)
