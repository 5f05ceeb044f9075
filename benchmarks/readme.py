"""Keeps the README's figures those of the newest stored run: ``python -m benchmarks.readme [--check]``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import results, tables
from benchmarks.results import Results

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


NOTHING = "No run is stored in `benchmarks/results` yet, so there are no figures to show."


def current(folder: Path = results.FOLDER) -> str:
    """What should stand between the markers now."""
    return block(results.newest(folder)) if any(folder.rglob("*.json")) else NOTHING


def block(found: Results) -> str:
    """The tables of a run, and what they were measured with."""
    parts = [rows.markdown() for rows in _tables(found) if rows.rows]
    machine, versions = found.machine, found.versions
    extensions = ", ".join(machine["extensions"])
    parts.append(
        f"{found.model}, batch 1, {found.settings['threads']} threads of {machine['cpu']} ({extensions}), load before "
        f"the run {machine['load']}; medians, quartiles in parentheses. PyTorch {versions['torch']}, Transformers "
        f"{versions['transformers']}, Python {versions['python']}; {found.date[:10]}; `{found.command}`."
    )
    return "\n\n".join(parts)


def _tables(found: Results) -> list[tables.Rows]:
    return [tables.speed(found), tables.bandwidth(found), tables.compile_times(found), tables.memory(found)]


def replaced(text: str, new: str) -> str:
    """``text`` with ``new`` between the markers. Raises ValueError unless each marker is there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README needs {BEGIN} and, below it, {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 when it is out of date.")
    ] = False,
) -> None:
    """Write the figures of the newest result file into the README."""
    old = README.read_text()
    new = replaced(old, current())
    if new == old:
        print("README.md is up to date")
    elif check:
        print("README.md does not show the newest results; run: python -m benchmarks.readme")
        raise typer.Exit(1)
    else:
        README.write_text(new)
        print("README.md has the newest results now")


if __name__ == "__main__":
    typer.run(main)
