"""What ``compile(dump=folder)`` leaves behind: IR after every pass, kernel sources, memory plans, the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tilewright.errors import OptionError
from tilewright.ir.module import Module
from tilewright.ir.program import Program

from .report import Report


class Dump:
    """Writes into ``folder``, or nowhere when it is None; each file as soon as what it shows exists, so that a failed
    compilation shows how far it came.

        00_lowered.ir                      decode_b1/plan.txt
        decode_b1/01_last_tokens.ir        kernels/<as the backend names them>
        decode_b1/02_specialize.ir ...     report.json, report.txt
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def lowered(self, module: Module) -> None:
        """The module before any pass."""
        self._write("00_lowered.ir", str(module))

    def after_pass(self, program: str, number: int, name: str, module: Module) -> None:
        """The module after a pass on the way to ``program``."""
        if self.folder is not None:
            self._write(f"{program}/{number:02d}_{name}.ir", str(module))

    def plan(self, program: Program) -> None:
        """The memory plan and call table."""
        self._write(f"{program.name}/plan.txt", str(program))

    def sources(self, sources: Mapping[str, str]) -> None:
        """Generated source files by name."""
        for name, text in sources.items():
            self._write(f"kernels/{name}", text)

    def report(self, report: Report) -> None:
        """The report, for people and for machines."""
        self._write("report.txt", f"{report}\n")
        self._write("report.json", json.dumps(report.to_dict(), indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise OptionError(
                f"the dump cannot be written to {path}: {error.strerror}; pass another folder"
            ) from error
