"""What a check of a GPU measures, at the size that a GPU is for and at one that runs anywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """model and layers: what kernels are timed on. batch_sizes: decode buckets. side: of the large product. limit:
    seconds that a system may take to get ready. torch_kernels: seconds for torch.compile to take on single kernels.
    chart: arguments of ``benchmarks.chart`` without torch.compile, and rivals: those with it. seconds: that each part
    may take, in the order in which they run."""

    model: str
    layers: int
    batch_sizes: tuple[int, ...]
    max_length: int
    side: int
    limit: int
    torch_kernels: int
    chart: tuple[str, ...]
    rivals: tuple[str, ...]
    seconds: dict[str, int]


_POINTS = "1:1024,prompt:4096,8:1024,2:4096"
SCALES = {
    "paper": Scale(
        "llama2-7b", 2, (1, 16), 2048, 8192, 300, 60,
        ("--models", "llama2-7b", "--systems", "eager,bf16,int8,int4", "--repeats", "2", "--points", _POINTS),
        ("--models", "llama2-7b", "--repeats", "2", "--points", "1:1024"),
        {
            "tests": 150, "rates": 30, "kernels": 80, "chart": 150, "compile": 90, "tuned": 120,
            "kernels, torch.compile": 90, "layers": 120, "chart, torch.compile": 400,
        },
    ),
    "tiny": Scale(
        "tiny-llama", 2, (1, 2), 64, 256, 60, 20,
        ("--models", "tiny-llama", "--systems", "eager,bf16", "--repeats", "1", "--points", "1:16,prompt:32"),
        ("--models", "tiny-llama", "--systems", "eager,torch.compile,bf16", "--repeats", "1", "--points", "1:16"),
        {
            "tests": 60, "rates": 60, "kernels": 120, "chart": 120, "compile": 120, "tuned": 120,
            "kernels, torch.compile": 90, "layers": 120, "chart, torch.compile": 120,
        },
    ),
}  # fmt: skip
"""The parts' seconds are limits, and their sum is more than there is: what one does not need, later ones have. The
surest figures come first. (The first five took 300 s on an H200; the last needs more than 144 there, for torch.compile
to get ready for the whole model, and so more minutes than the command takes by default.)"""
