"""The table of architectures, MODELS.md: ``python -m benchmarks.architectures [--check]`` writes it from its rows.

Rows come from the tests that compile each architecture: ``pytest --record-architectures tests/compiler`` stores them,
and without the option the same tests find that what they see is what is stored.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from tilewright.report import Report

ROOT = Path(__file__).parent.parent
ROWS, PAGE = ROOT / "tests" / "compiler" / "architectures.json", ROOT / "MODELS.md"
_SMALLEST = -7  # float32 says nothing about smaller differences


@dataclass(frozen=True)
class Row:
    """kernels: phase -> kernels of a layer. fallbacks: ATen op -> PyTorch's calls of it, over all programs.
    magnitude: ten to this power bounds the largest error, relative to the largest number of Hugging Face's result."""

    kind: str
    kernels: Mapping[str, int]
    fallbacks: Mapping[str, int]
    magnitude: int

    @staticmethod
    def of(kind: str, report: Report, error: float) -> Row:
        """What a compilation reports. The bound is three times the error at least: other machines round otherwise."""
        calls: Counter[str] = Counter()
        for fallback in report.fallbacks:
            calls[fallback.target] += fallback.calls
        kernels = {phase.phase: phase.kernels_per_layer for phase in report.phases}
        magnitude = max(math.ceil(math.log10(3 * error)), _SMALLEST) if error else _SMALLEST
        return Row(kind, kernels, dict(sorted(calls.items())), magnitude)


def error_of(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference of any two tensors of the same float type and shape, by the second's largest number."""
    pairs = zip(found, expected, strict=True)
    return max(((f - e).abs().max() / e.abs().max()).item() for f, e in pairs)


def read(file: Path = ROWS) -> dict[str, Row]:
    """Architecture -> row, by name; empty where nothing is stored."""
    if not file.exists():
        return {}
    return {name: Row(**fields) for name, fields in json.loads(file.read_text(encoding="utf-8")).items()}


def write(rows: Mapping[str, Row], file: Path = ROWS) -> None:
    text = json.dumps({name: asdict(rows[name]) for name in sorted(rows)}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def page(rows: Mapping[str, Row]) -> str:
    """The page as Markdown: by kind, then by name."""
    lines = [
        "# Architectures",
        "",
        "Small random models of each architecture, compiled in float32 and compared with Hugging Face's own by the "
        "tests. The reference backend runs the fused program, so kernels are those before a backend's own choices. "
        "Kernels per layer: those of the longest layer; – where layers are not compiled one by one. "
        "Largest error: relative to the largest number of the result. "
        "`python -m benchmarks.architectures` writes this page.",
        "",
        "| architecture | kind | kernels per layer | PyTorch's ops (calls) | largest error |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: (item[1].kind, item[0])):
        kernels = ", ".join(f"{phase} {count or '–'}" for phase, count in sorted(row.kernels.items()))
        fallbacks = ", ".join(f"`{op}` ({count})" for op, count in row.fallbacks.items()) or "–"
        lines.append(f"| {name} | {row.kind} | {kernels} | {fallbacks} | < 1e{row.magnitude} |")
    return "\n".join(lines) + "\n"


def main(
    check: Annotated[bool, typer.Option(help="Change nothing; fail where the page is out of date.")] = False,
) -> None:
    text = page(read())
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{PAGE} is out of date: run python -m benchmarks.architectures")


if __name__ == "__main__":
    typer.run(main)
