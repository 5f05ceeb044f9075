"""The demo on a tiny model: every part of what a newcomer sees."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel
from typer import Typer
from typer.testing import CliRunner

from tests.compiler.test_cli import word_tokenizer
from tilewright import demo


def test_the_demo_answers_and_compares(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    tiny_llama.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    app = Typer()
    app.command()(demo.main)
    arguments = ["--model", str(tmp_path), "--prompt", "what is this ?", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, [*arguments, "--rounds", "1"])
    assert result.exit_code == 0, result.output
    for row in ("tokens/s", "time to first token", "compile time", "kernels per layer", "arena"):
        assert row in result.stdout
    assert "the same, token for token" in result.stdout


def test_eager_ops_are_those_of_one_layer(tiny_llama: PreTrainedModel) -> None:
    """A decoder layer has seven linears, two norms, an attention and more; a second layer changes nothing."""
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    whole = demo.eager_ops_per_layer(tiny_llama, inputs)
    assert 10 < whole < 100
    deeper = type(tiny_llama)(
        tiny_llama.config.__class__(**{**tiny_llama.config.to_dict(), "num_hidden_layers": 4})
    )
    assert demo.eager_ops_per_layer(deeper.eval(), inputs) == whole
