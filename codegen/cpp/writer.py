"""Source text under construction: lines, and blocks that indent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class Writer:
    """Collects lines of C++."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0
        self._numbers: dict[str, int] = {}

    def line(self, text: str = "") -> None:
        """Add one line (or several, split at newlines) at the current depth."""
        for part in text.split("\n"):
            self._lines.append("    " * self._depth + part if part else "")

    def pragma(self, text: str) -> None:
        self._lines.append(f"#pragma {text}")

    @contextmanager
    def block(self, header: str = "", end: str = "}") -> Iterator[None]:
        """``header {`` ... ``}`` with the lines between indented."""
        self.line(f"{header} {{" if header else "{")
        self._depth += 1
        yield
        self._depth -= 1
        self.line(end)

    def fresh(self, stem: str) -> str:
        """A name that was not given before: ``stem0``, ``stem1``, ..."""
        number = self._numbers.get(stem, 0)
        self._numbers[stem] = number + 1
        return f"{stem}{number}"

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def identifier(name: str) -> str:
    """``name`` as part of a C identifier."""
    return re.sub(r"\W", "_", name)
