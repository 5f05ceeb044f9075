"""Another tile for a kernel that does not run in its own: chosen by the printer's order, and announced by a warning."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.estimate import candidates, fallbacks, tiles_text
from tilewright.codegen.triton.kernel import print_kernel
from tilewright.codegen.triton.program import emit_program
from tilewright.codegen.tunables import NONE, Changes, Tunables
from tilewright.ir.errors import KernelBuildError
from tilewright.ir.module import Op
from tilewright.ir.program import Program
from tilewright.runtime.device import is_interpreting
from tilewright.runtime.kernel_modules import write_module

from .estimates import gpu
from .options import Options
from .settings import cache_dir
from .tune_kernels import KernelTuner


@dataclass
class TileFallback:
    """The runtime's ``Replacement`` for the kernels of one program. It is called by one thread at a time.

    tunables: what the program is printed with. record: keep what is chosen beside the tuner's choices, where a later
    ``compile(autotune="cached")`` finds it.
    """

    program: Program
    tunables: Tunables
    options: Options
    record: bool
    _failed: dict[str, list[Changes]] = field(default_factory=dict)

    def __call__(self, kernel: str, error: Exception) -> Path:
        """A module with the next tile of ``kernel``. Raises KernelBuildError when every tile has failed."""
        op = next(s.op for s in self.program.kernels() if s.name == kernel)
        current = self.tunables.get(kernel, NONE)
        failed = self._failed.setdefault(kernel, [])
        failed.append(current)
        # A field of a tile may change nothing in a kernel, as TMA where a factor is no matrix.
        tried = {self._printed(op, way) for way in failed}
        way = next(
            (w for w in fallbacks(op, self._environment({})) if self._printed(op, w) not in tried), None
        )
        if way is None:
            raise self._hopeless(op, failed, error) from error
        chosen = {**self.tunables, kernel: way}
        warnings.warn(
            f"kernel {kernel} of {self.program.name} does not run as {self._tile(op, self.tunables)}: {error}; it goes "
            f"on as {self._tile(op, chosen)}, which may be slower",
            stacklevel=2,
        )
        self.tunables = chosen
        measured = candidates(op, self._environment({}))
        if self.record and way in measured:
            KernelTuner(self.program, {kernel: measured}, self.options).keep(kernel, way)
        text = emit_program(self.program, is_interpreting(), self.tunables, gpu(self.options.device)).text
        return write_module(cache_dir() / "triton", text)

    def _printed(self, op: Op, changes: Changes) -> tuple[str, object]:
        """A kernel in one way: its text and launch options."""
        printed = print_kernel(op, self._environment({str(op.attr("name")): changes}))
        return printed.text, printed.options

    def _hopeless(self, op: Op, failed: list[Changes], error: Exception) -> KernelBuildError:
        kernel = str(op.attr("name"))
        tried = "; ".join(self._tile(op, {kernel: changes}) for changes in failed)
        return KernelBuildError(
            f"kernel {kernel} of {self.program.name} runs in none of its tiles on {gpu(self.options.device).name} "
            f"(tried {tried}); the last one failed with: {error}. Try another version of Triton, or "
            "backend='reference', and please report the model and this message"
        )

    def _tile(self, op: Op, tunables: Tunables) -> str:
        return tiles_text(op, self._environment(tunables))

    def _environment(self, tunables: Tunables) -> Environment:
        return Environment.of(self.program, is_interpreting(), tunables, gpu(self.options.device))
