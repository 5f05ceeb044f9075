"""``compile``: a model in, a compiled model out. Runs the stages in order and keeps what each of them gave."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .adapters import MergedAdapters, without_wrapper
from .backends import get_ready
from .capture_seq2seq import is_encoder_decoder
from .compilation import Compilation
from .options import Options, check_options
from .progress import SILENT, Progress
from .unserved import require_plain_outputs


def compile(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    max_length: int | None = None,
    weights: str | None = None,
    kv_cache: str | None = None,
    autotune: str = "cached",
    backend: str | None = None,
    speculative_tokens: int = 0,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress = SILENT,
) -> Any:
    """Compile ``model`` for inference; gives an object of the model's own class that runs generated kernels.

    model: a Hugging Face model of text or images, or any module when ``example_inputs`` (a tuple of arguments or a dict
    of keyword arguments) is given; in eval mode. It is left as it was and still runs; the weights are shared with it.
    batch_sizes: a program is built for each; a batch in between runs in the next one up. A batch counts beams and
    returned sequences. An encoder takes any batch, in goes of as many rows as memory is planned for (2,048 tokens, or
    the largest of ``batch_sizes``), unless it compares texts with images.
    max_length: longest sequence, prompt and new tokens together; by default 2048 or what the model can. For an
    encoder-decoder the longest text on either side.
    weights: "int8" or "fp8" (e4m3; both have one scale per output channel) or "int4" (scale and minimum per 32 columns)
    stores the weights of matrix products in that form; an embedding that is tied to the last product is int8 in "int4".
    None keeps their dtype. What cannot be quantised stays as it is, and the report says so.
    kv_cache: "bf16" or "fp8" (e4m3, without a scale) keeps keys and values in that form, where it is narrower than the
    model's own dtype, which None keeps.
    autotune: what is chosen by measurement: how prefill computes matrix products, by generated kernels or by the
    vendor's library (timed on a piece of prompt, best of three runs; not with ``weights``, which it
    cannot read), and on a CPU, for each decode program, how many threads run it and how far ahead weights are
    prefetched. "cached" measures that unless the cache folder has the choice for this model on this machine. "full"
    measures anew, and also tries other tiles for each kernel of each program and, on a GPU, persistent kernels for
    decode steps, which takes a few compilations; what wins is on record for "cached". "off" takes generated kernels and
    defaults. Backends whose times mean nothing (reference, Triton's interpreter) measure nothing.
    backend: "cpp", "triton" or "reference"; by default the one for the model's device.
    speculative_tokens: for assisted decoding of one sequence, how many guessed tokens, up to 7, a step can check beside
    its own; a program is built for that. Not for recurrent models, which cannot take a token back.
    dump: folder for the IR after every pass, kernel sources, memory plans and the report.
    progress: ``Progress()`` shows a bar on stderr.

    Raises OptionError, DeviceError (a GPU too old, or with too little memory), CaptureError, LoweringError,
    CompilerNotFoundError, KernelBuildError. A call raises DeviceError while ``model`` is moved or cast.
    """
    model = without_wrapper(model)
    options = check_options(
        model, batch_sizes, max_length, weights, kv_cache, autotune, backend, dump, speculative_tokens
    )
    if example_inputs is None:
        require_plain_outputs(model)
    get_ready(options)
    adapters = MergedAdapters()
    encoder = None
    if example_inputs is None and isinstance(model, PreTrainedModel) and is_encoder_decoder(model):
        part, its_options = model.get_encoder(), options.of_part("encoder")
        with progress.step(f"Compiling {type(part).__name__}", total=_steps(its_options)) as advance:
            encoder = Compilation(part, its_options, advance, adapters).run(None)
    with progress.step(f"Compiling {type(model).__name__}", total=_steps(options)) as advance:
        return Compilation(model, options, advance, adapters, encoder).run(example_inputs)


def _steps(options: Options) -> int:
    """Steps that a compilation announces, at most."""
    return {"off": 6, "cached": 8, "full": 11 + len(options.batch_sizes)}[options.autotune]
