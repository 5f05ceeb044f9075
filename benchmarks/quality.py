"""What precision costs in quality, on real text and real weights: ``python -m benchmarks.quality``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import gguf_files, machine, models, stored, texts
from benchmarks.closeness import closeness
from benchmarks.models import PRECISIONS
from benchmarks.options import SYSTEMS, command_line, known
from benchmarks.predictors import LlamaPredictor, ModelPredictor, Predictor, Through
from benchmarks.quality_results import QualityResults, tables
from benchmarks.results import EAGER, LLAMA_CPP, OURS
from benchmarks.sentences import similarities
from benchmarks.system import LeftOut
from tilewright.cli import readable_errors
from tilewright.errors import TilewrightError
from tilewright.progress import Progress

console = Console()
notes = Console(stderr=True)

FILES = {"int8": ("Q8_0",), "int4": ("Q4_0", "Q4_1")}
"""llama.cpp's file types at a precision; its f32 and bf16 would only say again that kernels agree. Q4_1 is the file
that SmolLM2's weights come from, and so exact where Q4_0 rounds a second time."""


@readable_errors
def main(
    model: Annotated[str, typer.Option(help="smollm2, or tiny (random weights).")] = "smollm2",
    precisions: Annotated[
        str, typer.Option(help="Any of f32, bf16, int8, int4, separated by commas.")
    ] = ",".join(PRECISIONS),
    systems: Annotated[str, typer.Option(help="Any of tilewright, llama.cpp.")] = "tilewright,llama.cpp",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    through: Annotated[
        Through, typer.Option(help="Feed the text token by token, or as a prompt.")
    ] = Through.decode,
    batch: Annotated[int, typer.Option(min=1, help="Windows that ours decodes side by side.")] = 8,
    pairs: Annotated[int, typer.Option(min=0, help="Sentence pairs for all-MiniLM-L6-v2; 0 for none.")] = 400,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    backend: Annotated[str | None, typer.Option(help="Ours: cpp or reference; by default cpp.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure perplexity, KL divergence and similarity of embeddings against float32, and store them."""
    torch.set_num_threads(threads)
    chosen = known("--precisions", precisions, tuple(PRECISIONS))
    names = [SYSTEMS[name] for name in known("--systems", systems, ("tilewright", "llama.cpp"))]
    text = texts.windows(models.tokenizer(model), windows, length)
    reference = ModelPredictor(EAGER, "f32", models.load(model, "f32", Progress()), Through.prefill)
    wanted = [(name, kind) for name in names for p in chosen for kind in _kinds(name, p)]
    others: list[Predictor] = []
    left_out: list[str] = []
    for name, kind in wanted:
        try:
            others.append(_predictor(name, kind, model, batch, length, through, threads, backend))
        except (LeftOut, TilewrightError) as error:
            left_out.append(f"{name}, {kind}: {error}")
    groups = -(-windows // batch)
    with Progress().step("Reading text", total=groups * (1 + len(others))) as advance:
        close = closeness(reference, others, text, batch, advance)
    for predictor in others:
        predictor.close()
    similar, missing = similarities(pairs, chosen, backend, Progress()) if pairs else ((), ())
    for reason in (*left_out, *missing):
        notes.print(f"[yellow]left out[/yellow] {reason}", highlight=False)
    results = QualityResults(
        date=stored.now(),
        command=command_line("benchmarks.quality"),
        model=model,
        machine=machine.describe(),
        versions=machine.versions(
            *({"llama-cpp-python"} if any(p.name == LLAMA_CPP for p in others) else ())
        ),
        settings={
            "threads": threads,
            "windows": windows,
            "length": length,
            "through": through.value,
            "batch": batch,
            "pairs": pairs,
        },
        closeness=close,
        similarity=similar,
        left_out=(*left_out, *missing),
    )
    for rows in tables(results):
        console.print(rows.rich())
    console.print(f"stored in {stored.save(results, output)}", highlight=False)


def _kinds(name: str, precision: str) -> tuple[str, ...]:
    """What a system is measured with at a precision: ours with itself, llama.cpp with files."""
    return (precision,) if name == OURS else FILES.get(precision, ())


def _predictor(
    name: str,
    kind: str,
    model: str,
    batch: int,
    length: int,
    through: Through,
    threads: int,
    backend: str | None,
) -> Predictor:
    """The system with ``kind``, one of ``_kinds``. Raises LeftOut or TilewrightError where that cannot be had."""
    if name == LLAMA_CPP:
        if model != "smollm2":
            raise LeftOut("there is a GGUF file for smollm2 only")
        file = gguf_files.requantised(kind, threads, Progress())
        return LlamaPredictor(kind, file, threads, length, through)
    source: Any = models.load(model, kind, Progress())
    fast = models.compiled(
        source,
        kind,
        backend=backend,
        batch_sizes=sorted({1, batch}),
        max_length=length,
        progress=Progress(),
    )
    return ModelPredictor(OURS, kind, fast, through)


def run() -> None:
    """The command line."""
    typer.run(main)


if __name__ == "__main__":
    run()
