"""The picture of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import picture
from benchmarks.system import LeftOut
from tests.benchmarks.sample_results import made_up


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_the_picture_is_drawn_the_same_each_time(ending: str, tmp_path: Path) -> None:
    once, again = (picture.draw(made_up(), tmp_path / f"{name}{ending}").read_bytes() for name in "ab")
    assert once == again
    assert once.startswith(b"<?xml" if ending == ".svg" else b"\x89PNG")


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(LeftOut, match="no decoding"):
        picture.draw(replace(made_up(), measures=()), tmp_path / "a.svg")


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LeftOut, match="pip install matplotlib"):
        picture.draw(made_up(), tmp_path / "a.svg")
