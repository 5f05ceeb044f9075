"""Progress on the terminal: one bar per step that may take more than a second.

Library code takes a ``Progress`` and never prints by itself; ``SILENT`` is the default everywhere, the demo and
the command line pass ``Progress(show=True)``. Bars go to stderr, so that stdout holds only results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

Advance = Callable[[str], None]
"""Called with the name of the sub-step that begins; the bar moves by one at each call after the first."""


@dataclass(frozen=True)
class Progress:
    """Shows (or, with ``show=False``, does not show) what is being done."""

    show: bool = True

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """A bar named ``title`` while the block runs, then one line with the seconds it took.

        ``total`` is the number of sub-steps that the block announces by calling what it is given; without it the
        bar only shows that work goes on.
        """
        if not self.show:
            yield lambda name: None
            return
        console = Console(stderr=True)
        columns: list[ProgressColumn] = [
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
        ]
        columns += [MofNCompleteColumn()] if total else []
        start = time.perf_counter()
        # Without a terminal (a log file, CI) there is nothing to redraw: only the closing lines are written.
        still = not console.is_terminal
        with Bars(*columns, TimeElapsedColumn(), console=console, transient=True, disable=still) as bars:
            task = bars.add_task(title, total=total)
            begun = 0

            def advance(name: str) -> None:
                nonlocal begun
                bars.update(task, description=f"{title}: {name}", completed=begun)
                begun += 1

            yield advance
        console.print(f"[green]✓[/green] {title} [dim]({time.perf_counter() - start:.1f} s)[/dim]")


SILENT = Progress(show=False)
