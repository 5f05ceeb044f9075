"""One command that asks servers of one model over numbers of clients: ``python -m benchmarks.serving``."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import machine, stored
from benchmarks.options import command_line, known
from benchmarks.servers import SERVERS, Answers, Server, running
from benchmarks.serving_results import Load, Served, ServingResults, table
from tilewright import pretrained
from tilewright.cli import Dtype, readable_errors
from tilewright.errors import OptionError
from tilewright.progress import Progress

console = Console()
notes = Console(stderr=True)


@readable_errors
def main(
    model: Annotated[
        str, typer.Option(help="smollm2, or a Hugging Face folder or locally cached id.")
    ] = "smollm2",
    dtype: Annotated[Dtype, typer.Option(help="f32 or bf16, of every server.")] = Dtype.bf16,
    systems: Annotated[
        str,
        typer.Option(
            help="Any of tilewright, eager (transformers serve) and paged (its --continuous-batching), separated by "
            "commas."
        ),
    ] = "tilewright,eager,paged",
    clients: Annotated[str, typer.Option(help="Numbers of clients, separated by commas.")] = "1,2,4,8",
    conversations: Annotated[
        str, typer.Option(help="Numbers of clients that hold conversations, separated by commas.")
    ] = "1,4",
    turns: Annotated[int, typer.Option(min=2, help="Questions of a conversation.")] = 4,
    each: Annotated[int, typer.Option(min=1, help="Questions of each client per sample.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 48,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every server.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each server per number of clients.")] = 5,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
) -> None:
    """Have clients ask servers, all of them running, in turns, and store the samples."""
    names = [SERVERS[name] for name in known("--systems", systems, tuple(SERVERS))]
    asked = [(n, 1) for n in _counts(clients, "--clients")]
    asked += [(n, turns) for n in _counts(conversations, "--conversations")]
    if dtype is Dtype.f16:
        raise OptionError("--dtype: f32 or bf16")
    facts = machine.describe(torch.device(device))
    machine.warn_if_busy(facts, notes)
    batches = [n for n in (1, 2, 4, 8, 16, 32) if n < 2 * max(asked)[0]]
    options = ["--device", device, *(part for n in batches for part in ("--batch", str(n)))]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tilewright-serving-")))
        source, tokenizer = pretrained.load(model, dtype.in_torch, Progress())
        source.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del source
        servers = []
        for name in names:
            with Progress().step(f"Starting {name}"):
                servers.append(stack.enter_context(running(name, folder, dtype.value, options, threads)))
        loads = [
            _load(servers, dtype.value, n, each if long == 1 else 1, tokens, repeats, long)
            for n, long in asked
        ]
    results = ServingResults(
        date=stored.now(),
        command=command_line("benchmarks.serving"),
        machine=facts,
        versions=machine.versions(),
        settings={"model": model, "threads": threads, "tokens": tokens, "each": each},
        loads=tuple(loads),
    )
    console.print(table(results).rich())
    console.print(f"stored in {stored.save(results, output)}", highlight=False)


def _counts(text: str, option: str) -> list[int]:
    """The numbers in a list separated by commas. Raises OptionError for anything else."""
    names = [name.strip() for name in text.split(",")] if text else []
    if not all(name.isdecimal() and int(name) > 0 for name in names):
        raise OptionError(f"{option}: '{text}' is no list of numbers; write for example 1,4")
    return [int(name) for name in names]


def _load(
    servers: list[Server], dtype: str, clients: int, each: int, tokens: int, repeats: int, turns: int
) -> Load:
    """Samples of all servers, one of each in each round."""
    found: dict[str, list[Answers]] = {server.system: [] for server in servers}
    what = f"{clients} at once" if turns == 1 else f"{clients} conversations at once"
    with Progress().step(what, total=len(servers) * (repeats + 1)) as advance:
        for server in servers:
            advance(f"{server.system} warms up")
            server.ask(clients, 1, tokens, turns)
        for _ in range(repeats):
            for server in servers:
                advance(server.system)
                found[server.system].append(server.ask(clients, each, tokens, turns))
    served = (
        Served(
            name,
            tuple(a.seconds for a in answers),
            tuple(a.tokens for a in answers),
            tuple(a.first for a in answers),
        )
        for name, answers in found.items()
    )
    return Load(dtype, clients, tuple(served), turns)


def run() -> None:
    """The command line."""
    typer.run(main)


if __name__ == "__main__":
    run()
