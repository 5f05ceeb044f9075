"""The rival torch.compile is given every chance: one graph per shape, without breaks, and eager's tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.large_models import TINY, with_random_values
from benchmarks.torch_compile import TorchCompile


@pytest.mark.parametrize("name", TINY)
def test_steps_share_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled anew at each position, a model would run uncompiled after a few; nor may a new cache recompile."""
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="eager")
    )  # dynamo's part is what counts here
    model = with_random_values(name, torch.device("cpu"), 64)
    system = TorchCompile(model, batch=2)
    tokens: list[Tensor] = []
    step = system._step

    def spy(*given: Any) -> Tensor:
        tokens.append(step(*given))
        return tokens[-1]

    monkeypatch.setattr(system, "_step", spy)
    ids = torch.randint(3, 2000, (1, 9), generator=torch.Generator().manual_seed(0))
    counters.clear()
    system.decode(ids, 2)
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        system.release()
        system.decode(ids, 2)
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    tokens.clear()
    system.decode(ids, 12)
    both = ids.repeat(2, 1)
    expected = model.generate(
        both, attention_mask=torch.ones_like(both), max_new_tokens=13, min_new_tokens=13, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(torch.cat(tokens, 1), expected[:, 9:])
    system.close()
