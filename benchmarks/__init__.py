"""Measurements of compiled models beside Hugging Face eager; ``README.md`` says how they are taken."""

import os

# PyTorch's profiler, which counts allocations, else writes a line to stderr for each use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
