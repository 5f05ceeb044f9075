"""The demo: compile a chat model, watch it answer, and see it beside Hugging Face eager. ``make demo`` runs it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, TextStreamer

import tilewright as tw
from tilewright import pretrained
from tilewright.cache import cache_of, with_cache
from tilewright.cli import BackendOption, DeviceOption, Dtype, DtypeOption, ModelOption, readable_errors
from tilewright.errors import OptionError
from tilewright.progress import Progress
from tilewright.report import size_text
from tilewright.timing import TimedStreamer, Timing

console = Console()


@dataclass(frozen=True)
class Comparison:
    """Answers to the same prompt by the compiled model and by Hugging Face eager, taken in turns."""

    ours: tuple[Timing, ...]
    theirs: tuple[Timing, ...]
    same_tokens: bool


@readable_errors
def main(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")] = "What is gravity?",
    model: ModelOption = "smollm2",
    dtype: DtypeOption = Dtype.f32,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="Timed answers of each; the median counts.")] = 3,
) -> None:
    """Compile MODEL, stream its answer to PROMPT, then print ours beside Hugging Face eager."""
    progress = Progress()
    source, tokenizer = pretrained.load(model, dtype.in_torch, progress)
    if tokenizer is None or not source.can_generate():
        raise OptionError(f"'{model}' writes no text; try --model smollm2")
    source = source.to(device)
    start = time.perf_counter()
    fast = tw.compile(source, backend=backend, progress=progress)
    compile_seconds = time.perf_counter() - start

    inputs = {name: tensor.to(device) for name, tensor in pretrained.chat(tokenizer, prompt).items()}
    console.print(f"\n[bold cyan]{prompt}[/bold cyan]")
    show = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer(fast, inputs, max_new_tokens, show)
    console.print()

    result = compare(fast, source, inputs, max_new_tokens, rounds, progress)
    console.print(table(fast, source, result, compile_seconds, inputs))
    if dtype is Dtype.f32:
        verdict = "the same, token for token" if result.same_tokens else "[red]different[/red]"
        console.print(f"Both answers are {verdict}.", highlight=False)


def answer(
    model: Any, inputs: dict[str, Tensor], max_new_tokens: int, show: TextStreamer | None = None
) -> tuple[Tensor, Timing]:
    """A greedy answer, prompt included, i64[1, n], and when its tokens came."""
    streamer = TimedStreamer(show)
    start = time.perf_counter()
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, streamer=streamer)
    return tokens, streamer.timing(start)


def compare(
    fast: Any,
    source: PreTrainedModel,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    rounds: int,
    progress: Progress,
) -> Comparison:
    """Times both in turns, after one untimed answer each, so that a busy moment of the machine hits both alike."""
    ours, theirs = [], []
    with progress.step("Measuring ours and Hugging Face in turns", total=2 * rounds + 2) as advance:
        advance("warm-up")
        mine, _ = answer(fast, inputs, max_new_tokens)
        advance("warm-up")
        other, _ = answer(source, inputs, max_new_tokens)
        for _ in range(rounds):
            advance("ours")
            ours.append(answer(fast, inputs, max_new_tokens)[1])
            advance("Hugging Face")
            theirs.append(answer(source, inputs, max_new_tokens)[1])
    return Comparison(tuple(ours), tuple(theirs), torch.equal(mine, other))


def table(
    fast: Any,
    source: PreTrainedModel,
    result: Comparison,
    compile_seconds: float,
    inputs: dict[str, Tensor],
) -> Table:
    """The comparison as a table; times and rates are medians."""
    report = fast.report()
    prompt = inputs["input_ids"].shape[1]
    rows = Table(
        title=f"prompt of {prompt} tokens, batch 1, {torch.get_num_threads()} threads", title_justify="left"
    )
    rows.add_column("")
    rows.add_column("tilewright", justify="right", style="bold")
    rows.add_column("Hugging Face eager", justify="right")
    rows.add_column("", justify="right", style="green")
    ours = statistics.median(t.tokens_per_second for t in result.ours)
    theirs = statistics.median(t.tokens_per_second for t in result.theirs)
    rows.add_row("tokens/s", f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.1f}×")
    first = statistics.median(t.first for t in result.ours)
    their_first = statistics.median(t.first for t in result.theirs)
    rows.add_row(
        "time to first token",
        f"{first * 1e3:.0f} ms",
        f"{their_first * 1e3:.0f} ms",
        f"{their_first / first:.1f}×",
    )
    rows.add_row("compile time", f"{compile_seconds:.1f} s", "none", "")
    rows.add_row(
        "kernels per layer", str(report.kernels_per_layer), str(eager_ops_per_layer(source, inputs)), ""
    )
    rows.add_row("arena, one token", size_text(report.arena_bytes), "", "")
    prefill = report.phase("prefill")
    peak = report.eager_peak_bytes
    rows.add_row(
        f"arena, prompt of {prefill.dims['S']}",
        size_text(prefill.arena_bytes),
        f"{size_text(peak)} at its peak",
        f"{peak / prefill.arena_bytes:.1f}×" if prefill.arena_bytes else "",
    )
    return rows


class _CountOps(TorchDispatchMode):
    """Counts the ops that reach the dispatcher and do work; views do none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def eager_ops_per_layer(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """How many ops PyTorch runs for the first decoder layer when ``model`` decodes one token after ``inputs``."""
    depth = model.config.num_hidden_layers
    stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    layer = next(stacks)[0]
    counter = _CountOps()
    with torch.no_grad():
        past = with_cache(model.forward, cache_of(model(**inputs, use_cache=True)))
        hooks = [
            layer.register_forward_pre_hook(lambda *_: counter.__enter__() and None),
            layer.register_forward_hook(lambda *_: counter.__exit__(None, None, None)),
        ]
        try:
            model(input_ids=inputs["input_ids"][:, -1:], use_cache=True, **past)
        finally:
            for hook in hooks:
                hook.remove()
    return counter.count


if __name__ == "__main__":
    typer.run(main)
