"""The command line: ``tilewright generate | serve | report | opt``. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

import tilewright as tw
from tilewright import pretrained
from tilewright.errors import OptionError, TilewrightError, WeightsError
from tilewright.ir.parser import parse_module
from tilewright.ir.verify import verify_module
from tilewright.options import MOST_SPECULATIVE, cache_form, weights_form
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import PIPELINE, find_passes, run_passes
from tilewright.progress import Progress
from tilewright.serve import (
    PREFIX_CACHE,
    SERVED_BATCHES,
    check_log_level,
    listen,
    make_server,
    require_packages,
    url_of,
)
from tilewright.serve import run as run_server
from tilewright.timing import TimedStreamer

app = typer.Typer(
    help="Compiles Hugging Face transformers to generated kernels, and runs them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
notes = Console(stderr=True)


class Dtype(StrEnum):
    """Dtypes that the command line offers."""

    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"

    @property
    def in_torch(self) -> torch.dtype:
        return {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[self.value]


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="smollm2, minilm, or a Hugging Face folder or locally cached id.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the weights and activations.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        help="int8, int4 or fp8 stores the weights of products in that form; by default they stay as they are."
    ),
]
CacheOption = Annotated[
    str | None,
    typer.Option(help="bf16 or fp8 keeps keys and values in that form; by default in the model's dtype."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda.")]
BackendOption = Annotated[
    str | None, typer.Option(help="cpp, triton or reference; by default the one that fits the device.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads, ours and torch's; by default torch's choice.")
]
BatchOption = Annotated[list[int] | None, typer.Option(help="Batch sizes to build for; repeatable.")]
AutotuneOption = Annotated[str, typer.Option(help="off, cached or full.")]
DumpOption = Annotated[
    Path | None, typer.Option(help="Folder for the IR after every pass, kernel sources and the memory plan.")
]
LengthOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Longest sequence, prompt and answer together; by default 2048 or the model's limit."
    ),
]


def readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Ends a command with the message alone, and exit status 1, when it raises one of our errors."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except TilewrightError as error:
            text = "\n".join([str(error), *getattr(error, "__notes__", [])])
            notes.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
            # A terminal wraps by itself; in a log, a message in one piece can be searched.
            notes.print(text, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return run


@app.command()
@readable_errors
def generate(
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="A question; give several for a left-padded batch.")
    ],
    model: ModelOption = "smollm2",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="Sample; higher is wilder.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens that make up this mass.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    prompt_lookup: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_SPECULATIVE,
            help="Guess so many tokens from the text so far and check them in one step; the answer is the same. Of one "
            "prompt.",
        ),
    ] = 0,
    dtype: DtypeOption = Dtype.f32,
    weights: WeightsOption = None,
    kv_cache: CacheOption = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    max_length: LengthOption = None,
    autotune: AutotuneOption = "cached",
    dump: DumpOption = None,
) -> None:
    """Answer one or more prompts; a single answer is streamed. Greedy unless a sampling option is given."""
    if prompt_lookup and len(prompt) > 1:
        raise OptionError("--prompt-lookup goes with one prompt; leave it out for several")
    source, tokenizer = _load_writer(model, dtype)
    fast = _compiled(
        source,
        threads,
        device,
        [len(prompt)],
        max_length=max_length,
        weights=weights,
        kv_cache=kv_cache,
        autotune=autotune,
        backend=backend,
        speculative_tokens=prompt_lookup,
        dump=dump,
    )
    encode = pretrained.plain if raw else pretrained.chat
    inputs = {name: tensor.to(device) for name, tensor in encode(tokenizer, *prompt).items()}
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    options["do_sample"] = bool(options)
    torch.manual_seed(seed)
    streamer = None
    if len(prompt) == 1:
        streamer = TimedStreamer(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    start = time.perf_counter()
    tokens = fast.generate(
        **inputs,
        **options,
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        prompt_lookup_num_tokens=prompt_lookup or None,
    )
    seconds = time.perf_counter() - start
    if streamer is not None:
        notes.print(f"[dim]{streamer.timing(start)}[/dim]")
        return
    width = inputs["input_ids"].shape[1]
    for question, answer in zip(prompt, tokens[:, width:], strict=True):
        console.rule(question, align="left")
        console.print(
            tokenizer.decode(answer, skip_special_tokens=True), markup=False, highlight=False, soft_wrap=True
        )
    count = tokens[:, width:].numel()
    notes.print(f"[dim]{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s together[/dim]")


@app.command()
@readable_errors
def serve(
    model: Annotated[
        str,
        typer.Argument(help="smollm2, or a Hugging Face folder or locally cached id; requests name it so."),
    ] = "smollm2",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = (
        "localhost"
    ),
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any free one.")
    ] = 8000,
    enable_cors: Annotated[
        bool, typer.Option("--enable-cors", help="Let web pages of any origin ask.")
    ] = False,
    log_level: Annotated[
        str, typer.Option(help="What is told on stderr: debug, info, warning, error or critical.")
    ] = "warning",
    batch: Annotated[
        list[int] | None,
        typer.Option(
            help="Numbers of requests to build decode steps for; repeatable. The largest, by default 8, is how many "
            "run at once; others wait."
        ),
    ] = None,
    prefix_cache: Annotated[
        int,
        typer.Option(
            min=0,
            help="MiB for keys and values of requests that ended, which those that begin alike need not compute; 0 for "
            "none.",
        ),
    ] = PREFIX_CACHE,
    dtype: DtypeOption = Dtype.f32,
    weights: WeightsOption = None,
    kv_cache: CacheOption = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    max_length: LengthOption = None,
    autotune: AutotuneOption = "cached",
    dump: DumpOption = None,
) -> None:
    """Serve a model with transformers' own server, by OpenAI's protocol: chat completions, completions, responses.

    Needs the packages of the extra 'serve'. Requests that come at once share their steps. Ctrl-C stops.
    """
    require_packages()
    check_log_level(log_level)
    with listen(host, port) as sock:
        source, tokenizer = _load_writer(model, dtype)
        fast = _compiled(
            source,
            threads,
            device,
            batch or list(SERVED_BATCHES),
            max_length=max_length,
            weights=weights,
            kv_cache=kv_cache,
            autotune=autotune,
            backend=backend,
            dump=dump,
        )
        server = make_server(
            model,
            fast,
            tokenizer,
            enable_cors=enable_cors,
            log_level=log_level,
            prefix_cache=prefix_cache,
        )
        address = url_of(sock, host)
        notes.print(
            f"Serving {model} at {address} (Ctrl-C stops)", markup=False, highlight=False, soft_wrap=True
        )
        run_server(server, sock)


def _compiled(source: Any, threads: int | None, device: str, batch: list[int] | None, **options: Any) -> Any:
    """A model compiled as the command line asks, with a bar for the time that it takes."""
    if threads:
        torch.set_num_threads(threads)
    return tw.compile(source.to(device), batch_sizes=tuple(batch or (1,)), progress=Progress(), **options)


def _load_writer(model: str, dtype: Dtype) -> pretrained.Loaded:
    """A model that writes text, and its tokenizer. Raises WeightsError, OptionError."""
    source, tokenizer = pretrained.load(model, dtype.in_torch, Progress())
    if tokenizer is None:
        raise WeightsError(f"'{model}' has no tokenizer; save one beside the model with save_pretrained")
    if not source.can_generate():
        raise OptionError(f"'{model}' is an encoder and writes no text; try smollm2")
    return source, tokenizer


@app.command()
@readable_errors
def report(
    model: ModelOption = "smollm2",
    ir: Annotated[str | None, typer.Option(help="Print the IR of this stage instead, e.g. decode.")] = None,
    batch: BatchOption = None,
    dtype: DtypeOption = Dtype.f32,
    weights: WeightsOption = None,
    kv_cache: CacheOption = None,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    threads: ThreadsOption = None,
    max_length: LengthOption = None,
    autotune: AutotuneOption = "cached",
    dump: DumpOption = None,
) -> None:
    """Compile a model and tell what came out: kernels, launches, bytes and FLOPs, memory, fallbacks."""
    source, _ = pretrained.load(model, dtype.in_torch, Progress())
    fast = _compiled(
        source,
        threads,
        device,
        batch,
        max_length=max_length,
        weights=weights,
        kv_cache=kv_cache,
        autotune=autotune,
        backend=backend,
        dump=dump,
    )
    text = str(fast.report()) if ir is None else fast.ir(ir)
    typer.echo(text)


@app.command()
@readable_errors
def opt(
    file: Annotated[str, typer.Argument(help="A file of IR text; - for standard input.")] = "-",
    passes: Annotated[
        str, typer.Option("--passes", "-P", help="Names, separated by commas, run in order.")
    ] = "",
    verify: Annotated[
        bool, typer.Option(help="Verify the module before the first and after every pass.")
    ] = True,
    fix: Annotated[
        list[str] | None, typer.Option(help="A dim and its value for 'specialize', e.g. S=1; repeatable.")
    ] = None,
    last_tokens: Annotated[bool, typer.Option(help="Keep only the last L positions' logits.")] = False,
    splits: Annotated[int, typer.Option(min=0, help="Chunks of the context in decode attention.")] = 0,
    multiprocessors: Annotated[
        int,
        typer.Option(min=0, help="Multiprocessors of the GPU that 'split_products' is to fill; 0 for none."),
    ] = 0,
    vendor_matmul: Annotated[
        bool, typer.Option(help="Give products with weights to the vendor's library.")
    ] = False,
    spell_out_experts: Annotated[
        bool, typer.Option("--spell-experts", help="Say experts in ordinary ops.")
    ] = False,
    group_experts: Annotated[
        int, typer.Option(min=0, help="Most rows of the blocks in which tokens share an expert; 0 for none.")
    ] = 0,
    weights: WeightsOption = None,
    kv_cache: CacheOption = None,
    show: Annotated[bool, typer.Option("--list", help="List the passes and stop.")] = False,
) -> None:
    """Read IR text, run the named passes, print the result: the compiler's middle, one step at a time."""
    if show:
        table = Table("pass", "why it stands where it stands", box=None)
        for entry in PIPELINE:
            table.add_row(entry.name, entry.reason)
        console.print(table)
        return
    steps = find_passes([name.strip() for name in passes.split(",") if name.strip()])
    options = PassOptions(
        fixed=_dims(fix or []),
        last_tokens=last_tokens,
        splits=splits,
        multiprocessors=multiprocessors,
        vendor_matmul=vendor_matmul,
        spell_out_experts=spell_out_experts,
        group_experts=group_experts,
        weights=weights_form(weights),
        kv_cache=cache_form(kv_cache),
    )
    module = parse_module(sys.stdin.read() if file == "-" else _read(Path(file)))
    if verify:
        verify_module(module)
    typer.echo(str(run_passes(module, options, steps, verify=verify)), nl=False)


def _dims(texts: list[str]) -> tuple[tuple[str, int], ...]:
    """Dims and their values from ``NAME=VALUE`` texts. Raises OptionError for text of another form."""
    dims = []
    for text in texts:
        name, _, value = text.partition("=")
        if not name.isidentifier() or not value.isdecimal():
            raise OptionError(f"'{text}' does not fix a dim; write NAME=VALUE, for example S=1")
        dims.append((name, int(value)))
    return tuple(dims)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}") from error


if __name__ == "__main__":
    app()
