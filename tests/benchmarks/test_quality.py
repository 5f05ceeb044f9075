"""The quality benchmark on tiny models: what is fed, what is scored, and what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer import Typer
from typer.testing import CliRunner

import tilewright as tw
from benchmarks import models, quality, sentences, stored
from benchmarks.closeness import closeness
from benchmarks.distances import kl_divergence, surprise
from benchmarks.predictors import ModelPredictor, Piece, Through
from benchmarks.quality_results import QualityResults


class Fixed:
    """Predicts the same distribution everywhere, its logits given one position at a time."""

    precision = "f32"

    def __init__(self, name: str, logits: list[float]) -> None:
        self.name = name
        self._logits = torch.tensor(logits)

    def logits(self, ids: Tensor) -> Iterator[Piece]:
        for t in range(ids.shape[1]):
            yield slice(None), slice(t, t + 1), self._logits.expand(ids.shape[0], 1, -1)

    def close(self) -> None:
        pass


def test_one_command_measures_and_stores(tmp_path: Path) -> None:
    app = Typer()
    app.command()(quality.main)
    file = tmp_path / "q.json"
    arguments = ["--model", "tiny", "--backend", "reference", "--precisions", "f32,int4", "--pairs", "0"]
    few = ["--windows", "3", "--length", "9", "--batch", "2", "--output", str(file)]
    result = CliRunner().invoke(app, [*arguments, *few])
    assert result.exit_code == 0, result.output
    found = stored.from_json(QualityResults, file.read_text())
    names = [(c.system, c.precision) for c in found.closeness]
    assert names == [("Hugging Face eager", "f32"), ("tilewright", "f32"), ("tilewright", "int4")]
    assert all(len(c.kl) == len(c.surprise) == len(c.agreement) == 3 for c in found.closeness)
    reference, exact, rough = found.closeness
    assert max(exact.kl) < 1e-8 < min(rough.kl)
    assert exact.perplexity == pytest.approx(reference.perplexity, rel=1e-5)
    assert found.left_out == tuple(
        f"llama.cpp, {kind}: there is a GGUF file for smollm2 only" for kind in ("Q4_0", "Q4_1")
    )
    assert "perplexity" in result.stdout


@pytest.mark.parametrize("through", list(Through))
def test_both_ways_of_feeding_give_the_logits_of_the_model(through: Through) -> None:
    source = models.tiny_llama(torch.float32)
    fast = tw.compile(source, backend="reference", batch_sizes=(1, 3))
    ids = torch.cat([models.prompt(source, 7) + n for n in range(3)])
    with torch.no_grad():
        expected = source(input_ids=ids).logits
    found = torch.full_like(expected, torch.nan)
    for rows, positions, logits in ModelPredictor("ours", "f32", fast, through).logits(ids):
        found[rows, positions] = logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_decoding_is_what_runs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for prompts need not quantise activations, so a prompt would say nothing about decoding."""
    fast = tw.compile(models.tiny_llama(torch.float32), backend="reference")
    engine = fast._tilewright.engine
    monkeypatch.setattr(engine, "prefill_executor", None)
    pieces = list(ModelPredictor("ours", "f32", fast, Through.decode).logits(torch.tensor([[3, 4, 5]])))
    assert [positions for _, positions, _ in pieces] == [slice(t, t + 1) for t in range(3)]


def test_scores_by_hand() -> None:
    """Uniform over 4 tokens against a distribution that prefers token 2; the first window has no 2 as a target."""
    uniform, other = Fixed("reference", [0.0] * 4), Fixed("other", [0.0, 0.0, 1.0, 0.0])
    windows = torch.tensor([[0, 1, 1], [0, 2, 1], [0, 2, 2]])
    reference, found = closeness(uniform, [other], windows, 2, lambda name: None)
    base, log_probs = torch.zeros(4).log_softmax(-1), torch.tensor([0.0, 0.0, 1.0, 0.0]).log_softmax(-1)
    assert reference.surprise == pytest.approx([torch.log(torch.tensor(4.0)).item()] * 3)
    assert reference.kl == (0, 0, 0)
    assert reference.agreement == (1, 1, 1)
    rare, liked = (float(surprise(log_probs, torch.tensor(n))) for n in (1, 2))
    assert found.surprise == pytest.approx([rare, (rare + liked) / 2, liked])
    assert found.kl == pytest.approx([float(kl_divergence(base, log_probs))] * 3, rel=1e-5)
    assert found.agreement == (0, 0, 0)  # the first of equals is token 0


def test_similarities_of_sentences_by_hand() -> None:
    seen = []

    def embed(sentence: str) -> Tensor:
        seen.append(sentence)
        return {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0]), "c": torch.tensor([0.6, 0.8])}[
            sentence
        ]

    found = sentences.cosines([("a", "b"), ("a", "c"), ("b", "c")], embed)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.6, 0.8]))
    assert seen == ["a", "b", "c"]
    moved = sentences.similarity("ours", "int8", found, torch.tensor([0.1, 0.9, 0.7]))
    assert moved.spearman == pytest.approx(0.5)
    assert moved.difference == pytest.approx((0.1 + 0.3 + 0.1) / 3)
    assert moved.largest == pytest.approx(0.3)


def test_an_embedding_is_the_mean_of_its_tokens(tiny_bert: torch.nn.Module) -> None:
    class Tokens(dict):  # type: ignore[type-arg]
        pass

    def tokenizer(text: str, return_tensors: str) -> Tokens:
        ids = torch.tensor([[ord(c) % 50 for c in text]])
        return Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))

    found = sentences.embedder(tiny_bert, tokenizer)("words")
    with torch.no_grad():
        hidden = tiny_bert(**tokenizer("words", "pt")).last_hidden_state[0].mean(0)
    torch.testing.assert_close(found, hidden / hidden.norm())
