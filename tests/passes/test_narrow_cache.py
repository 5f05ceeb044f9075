"""What narrowing a cache leaves as it is, in words."""

from __future__ import annotations

from pathlib import Path

from tilewright.ir.parser import parse_module
from tilewright.passes.base import PassOptions
from tilewright.passes.narrow_cache import kept_wide, narrow_cache
from tilewright.passes.pipeline import run_passes

TEXTS = Path(__file__).parent / "texts"
F8 = PassOptions(kv_cache="f8")


def test_what_stays_wide_is_said() -> None:
    """Nobody asked; it was done; it could not be done."""
    narrowed, kept = (
        parse_module((TEXTS / name).read_text().split("input:")[1].split("expected:")[0])
        for name in ("narrow_cache.txt", "narrow_cache_kept.txt")
    )
    assert kept_wide(kept, PassOptions()) == ()
    assert kept_wide(narrow_cache(narrowed, F8), F8) == ()
    (line,) = kept_wide(narrow_cache(kept, F8), F8)
    # By the time that a report is made, the appends are inside of kernels.
    assert kept_wide(run_passes(kept, F8), F8) == (line,)
    assert line.startswith("keys and values stay bf16 (distinct layers: 1): something besides attention")
