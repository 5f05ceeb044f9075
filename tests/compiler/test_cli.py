"""The command line, run in this process: what it prints, where, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
import typer.core
import typer.main
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tilewright import pretrained
from tilewright.cli import app
from tilewright.ir.parser import parse_module
from tilewright.passes.pipeline import PIPELINE

IR = """\
entry @main
symbol S [1, 16]

func @main(%x: f32[S, 4]) -> (%b) {
  %a = neg %x : f32[S, 4]
  %a2 = neg %x : f32[S, 4]
  %b = add %a, %a2 : f32[S, 4]
  %c = exp %b : f32[S, 4]
}
"""
WORDS = ("hello", "world", "what", "is", "this", "?", "[PAD]", "[UNK]", *(f"word{i}" for i in range(8, 128)))


def run(*arguments: str, stdin: str | None = None, status: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a command that ends with ``status``."""
    result = CliRunner().invoke(app, arguments, input=stdin)
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a word for each of a tiny model's tokens."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: PreTrainedModel) -> str:
    """A tiny model and a tokenizer, as ``save_pretrained`` writes them."""
    tiny_llama.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("command", ["generate", "serve", "report", "opt"])
def test_help_describes_every_option(command: str) -> None:
    text, _ = run(command, "--help")
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for parameter in group.commands[command].params:
        assert getattr(parameter, "help", None), parameter.name
        assert parameter.param_type_name == "argument" or parameter.opts[0] in text
    assert command in run("--help")[0]


def test_opt_runs_the_named_passes_in_order(tmp_path: Path) -> None:
    file = tmp_path / "module.txt"
    file.write_text(IR)
    text, _ = run("opt", str(file), "--passes", "cse,dce")
    assert [op.opcode for op in parse_module(text).functions[0].ops] == ["neg", "add"]


def test_opt_without_passes_reads_and_prints_the_same_text() -> None:
    assert run("opt", stdin=IR)[0] == IR


def test_opt_fixes_dims() -> None:
    text, _ = run("opt", "-", "--passes", "specialize", "--fix", "S=1", stdin=IR)
    assert "neg %x : f32[1, 4]" in text


def test_opt_lists_the_passes_in_order() -> None:
    text, _ = run("opt", "--list")
    listed = [line.split()[0] for line in text.splitlines() if line.split()[0] in {p.name for p in PIPELINE}]
    assert listed == [entry.name for entry in PIPELINE]


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (("--passes", "no_such_pass"), IR, "no_such_pass"),
        (("--fix", "S"), IR, "NAME=VALUE"),
        ((), IR + "?", "ParseError"),
        ((), IR.replace("add %a, %a2", "add %a, %x2"), "x2"),
        ((), IR.replace("%b = add %a, %a2 : f32[S, 4]", "%b = add %a, %a2 : f32[S, 5]"), "VerifyError"),
        (("missing.txt",), "", "cannot read missing.txt"),
    ],
)
def test_opt_names_what_is_wrong(arguments: tuple[str, ...], text: str, message: str) -> None:
    output, errors = run("opt", *arguments, stdin=text, status=1)
    assert message in errors
    assert output == ""


def test_opt_shows_broken_ir_when_asked_not_to_verify() -> None:
    broken = IR.replace("%b = add %a, %a2 : f32[S, 4]", "%b = add %a, %a2 : f32[S, 5]")
    assert run("opt", "--no-verify", stdin=broken)[0] == broken


def test_generate_streams_what_the_model_says(folder: str, tiny_llama: PreTrainedModel) -> None:
    text, errors = run("generate", "-m", folder, "-p", "what is this ?", "--max-new-tokens", "6")
    ids = torch.tensor([[WORDS.index(word) for word in ("what", "is", "this", "?")]])
    tokens = tiny_llama.generate(ids, max_new_tokens=6, do_sample=False)[0, 4:]
    _, tokenizer = pretrained.load(folder)
    assert len(text.split()) == 6
    assert text.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
    assert "tokens/s" in errors


def test_generate_answers_a_batch(folder: str) -> None:
    text, _ = run("generate", "-m", folder, "-p", "hello", "-p", "what is this ?", "--max-new-tokens", "4")
    assert text.index("hello") < text.index("what is this ?")


def test_generate_samples_by_seed(folder: str) -> None:
    arguments = ("generate", "-m", folder, "-p", "hello", "--max-new-tokens", "8", "--temperature", "2.0")
    first = run(*arguments, "--seed", "1")[0]
    assert first == run(*arguments, "--seed", "1")[0]


def test_generate_refuses_what_does_not_fit(folder: str) -> None:
    arguments = ("generate", "-m", folder, "-p", "hello", "--max-length", "16", "--max-new-tokens", "64")
    _, errors = run(*arguments, status=1)
    assert "InputError" in errors
    assert "max_length" in errors


def test_generate_names_a_model_that_is_not_there(tmp_path: Path) -> None:
    _, errors = run("generate", "-m", str(tmp_path / "nothing"), "-p", "hello", status=1)
    assert "WeightsError" in errors


def test_generate_needs_a_tokenizer(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    tiny_llama.save_pretrained(tmp_path)
    _, errors = run("generate", "-m", str(tmp_path), "-p", "hello", status=1)
    assert "no tokenizer" in errors


def test_report_tells_of_kernels_and_dumps(folder: str, tmp_path: Path) -> None:
    text, _ = run("report", "-m", folder, "--dump", str(tmp_path / "dump"))
    assert "kernel" in text.lower()
    assert any((tmp_path / "dump").iterdir())


def test_report_prints_ir_that_parses(folder: str) -> None:
    text, _ = run("report", "-m", folder, "--ir", "decode")
    assert parse_module(text).functions


def test_report_names_the_stages_that_exist(folder: str) -> None:
    _, errors = run("report", "-m", folder, "--ir", "no-such-stage", status=1)
    assert "decode" in errors
