"""Sentence embeddings of all-MiniLM-L6-v2: do similarities keep their order at lower precision?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import models, texts
from benchmarks.distances import spearman
from benchmarks.models import PRECISIONS
from benchmarks.quality_results import Similarity
from benchmarks.results import OURS
from tilewright import pretrained
from tilewright.errors import TilewrightError
from tilewright.progress import Progress

Embed = Callable[[str], Tensor]
"""A sentence to its embedding [H] of unit length."""


def similarities(
    count: int, precisions: Sequence[str], backend: str | None, progress: Progress
) -> tuple[tuple[Similarity, ...], tuple[str, ...]]:
    """Ours at each precision beside Hugging Face eager in float32, on ``count`` pairs; and what was left out."""
    pairs = texts.sentence_pairs(count)
    found: list[Similarity] = []
    left_out: list[str] = []
    with progress.step("Comparing sentences", total=1 + len(precisions)) as advance:
        advance("Hugging Face eager")
        model, tokenizer = pretrained.load_minilm()
        expected = cosines(pairs, embedder(model, tokenizer))
        for precision in precisions:
            advance(f"{OURS} {precision}")
            source, _ = pretrained.load_minilm(PRECISIONS[precision].dtype)
            try:
                fast = models.compiled(source, precision, backend=backend)
            except TilewrightError as error:
                left_out.append(f"{OURS}, sentences, {precision}: {error}")
                continue
            found.append(similarity(OURS, precision, expected, cosines(pairs, embedder(fast, tokenizer))))
    return tuple(found), tuple(left_out)


def similarity(system: str, precision: str, expected: Tensor, found: Tensor) -> Similarity:
    """Cosines [n] beside the reference's [n]."""
    difference = (found - expected).abs()
    return Similarity(
        system,
        precision,
        spearman(expected, found),
        float(difference.mean()),
        float(difference.max()),
    )


def cosines(pairs: Sequence[tuple[str, str]], embed: Embed) -> Tensor:
    """Similarity of each pair, f32[n]; a sentence is embedded once however often it occurs."""
    known = {
        sentence: embed(sentence).float() for sentence in dict.fromkeys(s for pair in pairs for s in pair)
    }
    return torch.stack([known[a] @ known[b] for a, b in pairs])


def embedder(model: Any, tokenizer: Any) -> Embed:
    """Mean pooling over an encoder's last hidden state, one sentence at a time and so without padding."""

    @torch.no_grad()
    def embed(sentence: str) -> Tensor:
        inputs = tokenizer(sentence, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        return pretrained.mean_pool(hidden.float(), inputs["attention_mask"])[0]

    return embed
