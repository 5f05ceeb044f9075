"""``python -m benchmarks`` is ``python -m benchmarks.cpu``."""

from benchmarks.cpu import run

run()
