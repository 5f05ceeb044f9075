"""Requests of several threads in one batch, on a real GPU: recorded steps of several buckets in the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import tilewright as tw
from tests.compiler.models import random
from tests.compiler.test_architectures import DECODERS
from tests.compiler.test_joined import BUCKETS, at_once, greedy, prompts
from tilewright.joined import JoinedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def pair(name: str) -> tuple[Any, Any]:
    model = random(DECODERS[name], hf.AutoModelForCausalLM).to("cuda")
    return model, tw.compile(model, max_length=64, batch_sizes=BUCKETS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_5"])
def test_each_request_has_the_tokens_of_hugging_face(name: str) -> None:
    """Twice over, so that the second time finds what the first has recorded."""
    model, fast = pair(name)
    calls = [greedy(ids.cuda(), 4 + 3 * n) for n, ids in enumerate(prompts() * 2)]
    for found, call in zip(at_once(fast, calls), calls, strict=True):
        assert found.tolist() == call(model).tolist()


def test_a_seed_gives_the_tokens_of_a_request_that_is_alone() -> None:
    _, fast = pair("llama")
    ids = prompts()[0].cuda()
    how = {"do_sample": True, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids), "top_k": 20}
    torch.manual_seed(5)
    wanted = fast.generate(ids, **how).tolist()
    joined = JoinedModel(fast)
    torch.manual_seed(5)
    found = joined.for_request().generate(ids, **how).tolist()
    joined.close()
    assert found == wanted
