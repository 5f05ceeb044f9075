"""The choice of text depends on contents alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models, texts

ROOT = Path(__file__).parents[2]
DIGEST = (
    "import hashlib; from benchmarks import texts; "
    "print(hashlib.sha256(repr(texts.texts()).encode()).hexdigest(), len(texts.sentence_pairs(300)))"
)


def characters(text: str, **_options: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(c) for c in text]}


def test_another_process_chooses_the_same() -> None:
    """String hashes differ between processes, and with them the order of sets."""
    seen = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", DIGEST]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        result = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        seen.add(result.stdout)
    assert len(seen) == 1
    assert seen.pop().split()[1] == "300"


def test_there_is_enough_text_for_the_default() -> None:
    """A token of SmolLM2 is some four characters; licences and documentation are both there."""
    found = texts.texts()
    assert sum(map(len, found)) > 4 * 4 * 4000
    assert len(set(found)) == len(found)
    assert any("Apache License" in text for text in found)
    assert texts.windows(models.tokenizer("tiny"), 8, 512).shape == (8, 512)


def test_windows_take_turns_among_texts() -> None:
    found = texts.windows(characters, 4, 2, among=["abcdef", "x", "uvwx"])
    expected = ["ab", "uv", "cd", "wx"]
    assert torch.equal(found, torch.tensor([[ord(c) for c in row] for row in expected]))


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match="3 windows of 2 tokens, not 9"):
        texts.windows(characters, 9, 2, among=["abcdef"])
    with pytest.raises(ValueError, match="too few sentences"):
        texts.sentence_pairs(4, among=["Nothing."])


def test_sentences_are_prose_on_one_line() -> None:
    text = (
        "Some module\n***********\n\nThis is a sentence that goes over\ntwo lines of the text. Short one. And here is "
        "another sentence, which ends as well.\n\n    Indented code is never taken for a sentence at all.\n"
    )
    assert texts.sentences(text) == [
        "This is a sentence that goes over two lines of the text.",
        "And here is another sentence, which ends as well.",
    ]


def test_half_of_the_pairs_are_neighbours() -> None:
    first = "The first text begins with one sentence here. It goes on with a second sentence after that."
    second = "Another text has a sentence of its own too. It has got exactly two sentences in it, as well."
    near, other, far, last = texts.sentence_pairs(4, among=[first, second, "Nothing.", first])
    assert near[0] in first
    assert near[1] in first
    assert other[0] in second
    assert other[1] in second
    assert far[0] in first
    assert far[1] in second
    assert last[0] in second
    assert last[1] in first
