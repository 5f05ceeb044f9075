"""Small models of the architectures under test, compiled for the Triton backend, beside Hugging Face."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

import tilewright as tw
from tests.compiler.models import random
from tests.compiler.test_architectures import DECODERS

from .triton_models import left_padded


def architecture_errors(family: str, device: str = "cpu") -> list[str]:
    """Where logits of a left-padded prompt, and tokens generated from it, differ from Hugging Face's; of a model with
    experts also what is wrong with the form that they have in either program. family: one of ``test_architectures``.
    device: a GPU, or the CPU for Triton's interpreter."""
    model = random(DECODERS[family], hf.AutoModelForCausalLM).to(device)
    fast: Any = tw.compile(model, batch_sizes=(3,), max_length=64, backend="triton", autotune="off")
    ids, mask = (t.to(device) for t in left_padded())
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    found = fast(input_ids=ids, attention_mask=mask).logits
    wrong = []
    error = ((found - expected).abs() * mask[..., None]).max().item()
    if not error <= 2e-5 * expected.abs().max().item():
        wrong.append(f"{family}: {error:.3g} apart, of {expected.abs().max().item():.3g}")
    given = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    if not torch.equal(fast.generate(ids, **given), model.generate(ids, **given)):
        wrong.append(f"{family}: other tokens")
    return wrong + (_grouping_errors(family, fast) if "experts" in fast.ir("lowered") else [])


def _grouping_errors(family: str, fast: Any) -> list[str]:
    wrong = []
    grouped = {phase: "grouped_matmul" in fast.ir(phase) for phase in ("prefill", "decode_b3")}
    if grouped != {"prefill": True, "decode_b3": False}:
        wrong.append(f"{family}: grouped {grouped}")
    if "grouped_matmul" not in str(fast.report()):
        wrong.append(f"{family}: the report does not show the products")
    return wrong
