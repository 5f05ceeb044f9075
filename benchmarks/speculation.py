"""One command that measures speculative decoding with prompt lookup: ``python -m benchmarks.speculation``."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import machine, models, stored
from benchmarks.measure import in_turns
from benchmarks.models import PRECISIONS
from benchmarks.options import command_line, known
from benchmarks.results import EAGER, OURS
from benchmarks.speculation_results import (
    EAGER_GUESSING,
    OURS_GUESSING,
    Answered,
    Question,
    SpeculationResults,
    table,
)
from tilewright import pretrained
from tilewright.cli import readable_errors
from tilewright.options import MOST_SPECULATIVE
from tilewright.progress import Progress
from tilewright.trials import wait

console = Console()
notes = Console(stderr=True)

TEXT = (
    "Voyage 1, day 1: 7 gulls, 31 miles, and a wind from the north. The ship's cook, Ada Brown, wrote that the harbour "
    "of Lisbon was full of boats with red sails, and that the captain, who had lost his hat, bought a new one from a "
    "tailor named Pereira for three silver coins."
)
QUESTIONS = {
    "repeats the question's text": f"Repeat the following text exactly: {TEXT}",
    "corrects it": f"Correct the spelling of: {TEXT.replace('harbour', 'harbor').replace('captain', 'captian')}",
    "sums it up": f"Summarize in one sentence: {TEXT}",
    "has nothing of it": "Tell me a story about a cat.",
}
"""What is asked, by what the answer has in common with it."""
Answer = Callable[[], torch.Tensor]


@readable_errors
def main(
    model: Annotated[
        str, typer.Option(help="smollm2, or a Hugging Face folder or locally cached id.")
    ] = "smollm2",
    precisions: Annotated[
        str, typer.Option(help="Any of f32, bf16, int8, int4, separated by commas.")
    ] = "bf16,int8,int4",
    systems: Annotated[
        str, typer.Option(help="Any of tilewright and eager, separated by commas.")
    ] = "tilewright,eager",
    guesses: Annotated[
        int, typer.Option(min=1, max=MOST_SPECULATIVE, help="Tokens that are guessed at a time.")
    ] = 7,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer at most.")] = 96,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every system.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each system per question.")] = 7,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
) -> None:
    """Have each system answer, with and without prompt lookup, in turns, and store the samples."""
    torch.set_num_threads(threads)
    chosen = known("--precisions", precisions, tuple(PRECISIONS))
    names = known("--systems", systems, ("tilewright", "eager"))
    facts = machine.describe(torch.device(device))
    machine.warn_if_busy(facts, notes)
    questions: list[Question] = []
    for precision in chosen:
        source, tokenizer = pretrained.load(model, PRECISIONS[precision].dtype, Progress())
        source = source.to(device)
        asked = {
            task: {name: t.to(device) for name, t in pretrained.chat(tokenizer, text).items()}
            for task, text in QUESTIONS.items()
        }
        able: dict[str, Any] = {}
        if "tilewright" in names:
            room = tokens + max(given["input_ids"].shape[1] for given in asked.values())
            options = {"max_length": room, "speculative_tokens": guesses, "progress": Progress()}
            able[OURS] = models.compiled(source, precision, **options)
        if "eager" in names and PRECISIONS[precision].weights is None:  # else there is no such model to run
            able[EAGER] = source
        questions += [
            _asked(task, precision, able, given, guesses, tokens, repeats) for task, given in asked.items()
        ]
    results = SpeculationResults(
        date=stored.now(),
        command=command_line("benchmarks.speculation"),
        machine=facts,
        versions=machine.versions(),
        settings={"model": model, "threads": threads, "guesses": guesses, "tokens": tokens},
        questions=tuple(questions),
    )
    console.print(table(results).rich())
    console.print(f"stored in {stored.save(results, output)}", highlight=False)


def _asked(
    task: str,
    precision: str,
    able: dict[str, Any],
    given: dict[str, Any],
    guesses: int,
    tokens: int,
    repeats: int,
) -> Question:
    """Samples of one question, one of each system in each round; each has answered it before."""
    answers: dict[str, Answer] = {}
    for system, guessing in ((OURS, OURS_GUESSING), (EAGER, EAGER_GUESSING)):
        if system in able:
            plain = partial(able[system].generate, **given, do_sample=False, max_new_tokens=tokens)
            answers |= {guessing: partial(plain, prompt_lookup_num_tokens=guesses), system: plain}
    total = len(answers) + repeats
    with Progress().step(f"Measuring {task}, {precision}", total=total) as advance:
        counts = []
        for system, answer in answers.items():
            advance(f"{system} warms up")
            counts.append(answer().shape[1] - given["input_ids"].shape[1])
        runs = [partial(_seconds, answer) for answer in answers.values()]
        seconds = in_turns(runs, repeats, lambda: advance(task))
    found = (Answered(*row) for row in zip(answers, counts, seconds, strict=True))
    return Question(task, precision, tuple(found))


def _seconds(answer: Answer) -> float:
    start = time.perf_counter()
    wait(answer().device)
    return time.perf_counter() - start


def run() -> None:
    """The command line."""
    typer.run(main)


if __name__ == "__main__":
    run()
