"""Each file in texts/ is a module before and after some passes, side by side.

    passes: canonicalize dce              names, in order
    options: S=1 splits=2 weights=int8    optional, see ``PassOptions``

    input:
    func @main(...) ...

    expected:
    func @main(...) ...

Text after ``#`` is a comment. ``python -m tests.passes.test_texts`` prints what each file gives now.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tilewright.ir.module import Module
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.verify import verify_module
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import PASSES, find_passes, run_passes

FILES = sorted((Path(__file__).parent / "texts").glob("*.txt"))


class TextCase(NamedTuple):
    """A file's sections."""

    passes: list[str]
    options: PassOptions
    before: Module
    after: Module


def read_case(path: Path) -> TextCase:
    parts = re.split(r"^(passes|options|input|expected):", path.read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    words = sections.get("options", "").split("#")[0].split()
    given = dict(w.split("=") for w in words if "=" in w)
    flags = {w: True for w in words if "=" not in w}
    fixed = tuple((name, int(n)) for name, n in given.items() if name[0].isupper())
    counts = {name: int(n) if n.isdecimal() else n for name, n in given.items() if not name[0].isupper()}
    options = PassOptions(fixed=fixed, **counts, **flags)  # type: ignore[arg-type]
    before, after = (parse_module(sections[s]) for s in ("input", "expected"))
    return TextCase(sections["passes"].split("#")[0].split(), options, before, after)


def result_of(case: TextCase) -> Module:
    return run_passes(case.before, case.options, find_passes(case.passes))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_passes_turn_the_input_into_the_expected_text(path: Path) -> None:
    """A pass that does less, more or something else than its file shows."""
    case = read_case(path)
    verify_module(case.before)
    verify_module(case.after)
    found, expected = print_module(result_of(case)), print_module(case.after)
    diff = "\n".join(
        difflib.unified_diff(
            expected.splitlines(), found.splitlines(), "expected", "found", lineterm="", n=99
        )
    )
    assert found == expected, diff


def test_every_pass_has_a_text() -> None:
    """A new pass without a readable example."""
    assert {name for path in FILES for name in read_case(path).passes} == set(PASSES)


def test_no_text_is_vacuous() -> None:
    """An input that its passes leave alone shows nothing, unless its name says that it must be left alone."""
    for path in FILES:
        case = read_case(path)
        assert (result_of(case) == case.before) == path.stem.endswith("_kept"), path.stem


if __name__ == "__main__":
    for file in FILES:
        print(f"-- {file.stem}\n{print_module(result_of(read_case(file)))}")
