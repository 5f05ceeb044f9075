"""Tables as text, which become Markdown or a table on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from benchmarks.samples import Spread

NOTHING = "–"
"""A cell of what was not measured."""


@dataclass(frozen=True)
class Rows:
    """A table: the first column is words, the others are figures. A cell may have several lines."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The title and the table, for the README."""
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        table = [f"| {' | '.join(cells)} |".replace("\n", "<br>") for cells in lines]
        return "\n".join([f"{self.title}:", "", *table])

    def rich(self) -> Table:
        """A table for the terminal."""
        table = Table(title=self.title, title_justify="left")
        for n, name in enumerate(self.columns):
            table.add_column(name, justify="right" if n else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def quartiles(spread: Spread, unit: str = "", scale: float = 1.0) -> str:
    """``47.9 tokens/s (46.8–48.0)``."""
    low, median, high = (figure(v * scale) for v in (spread.low, spread.median, spread.high))
    return f"{median}{' ' if unit else ''}{unit} ({low}–{high})"


def times(ratio: Spread) -> str:
    """``1.35× (1.31–1.40)``."""
    return f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})"


def figure(value: float) -> str:
    """Three digits, which is more than such measurements hold."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
