"""What one run of the quality benchmark measured; stored as JSON (``stored.py``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from benchmarks import stored
from benchmarks.rows import Rows
from benchmarks.stored import records


@dataclass(frozen=True)
class Closeness:
    """Predictions of one system beside those of the reference: a mean per window of text, all of equal length.

    precision: of ours, or the file type of llama.cpp. surprise: negative log-likelihood of the text, in nats per token.
    kl: divergence of its distribution from the reference's, in nats. agreement: share of positions with the same most
    likely token.
    """

    system: str
    precision: str
    surprise: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood."""
        return math.exp(fmean(self.surprise))


@dataclass(frozen=True)
class Similarity:
    """Cosine similarities of sentence pairs beside those of the reference.

    spearman: rank correlation. difference: mean absolute difference. largest: the largest one.
    """

    system: str
    precision: str
    spearman: float
    difference: float
    largest: float


@dataclass(frozen=True)
class QualityResults:
    """One run. The reference is Hugging Face eager in float32, which stands first in ``closeness``."""

    KIND: ClassVar[str] = "quality"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "python -m benchmarks.quality"

    date: str
    command: str
    model: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    closeness: tuple[Closeness, ...]
    similarity: tuple[Similarity, ...]
    left_out: tuple[str, ...] = ()

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> QualityResults:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        return cls(
            **data
            | {
                "closeness": records(Closeness, data["closeness"]),
                "similarity": records(Similarity, data["similarity"]),
                "left_out": tuple(data["left_out"]),
            }
        )


def newest(folder: Path = stored.FOLDER) -> tuple[Path, QualityResults] | None:
    """The latest stored run and its file; None when there is none."""
    return stored.newest(QualityResults, folder)


def tables(results: QualityResults) -> list[Rows]:
    """Everything that was measured."""
    return [rows for rows in (language(results), sentences(results)) if rows.rows]


def language(results: QualityResults) -> Rows:
    """Perplexity, and how far each system's predictions are from those of the reference."""
    rows = []
    for n, found in enumerate(results.closeness):
        beside = (f"{fmean(found.kl):.5f}", f"{fmean(found.agreement):.1%}") if n else ("0", "100%")
        rows.append((f"{found.system}, {found.precision}", f"{found.perplexity:.3f}", *beside))
    settings = results.settings
    title = (
        f"{results.model} on {settings['windows'] * (settings['length'] - 1)} tokens of documentation and licences, "
        f"logits of {settings['through']}, beside Hugging Face eager in f32 (KL divergence in nats per token)"
    )
    columns = ("", "perplexity", "KL divergence", "same top token")
    return Rows(title, columns, tuple(rows))


def sentences(results: QualityResults) -> Rows:
    """Similarities of sentence pairs beside those of the reference."""
    rows = tuple(
        (f"{s.system}, {s.precision}", f"{s.spearman:.5f}", f"{s.difference:.5f}", f"{s.largest:.5f}")
        for s in results.similarity
    )
    title = (
        f"all-MiniLM-L6-v2, cosine similarities of {results.settings['pairs']} sentence pairs beside those of "
        "Hugging Face eager in f32 (Spearman rank correlation, absolute differences)"
    )
    return Rows(title, ("", "rank correlation", "mean difference", "largest"), rows)
