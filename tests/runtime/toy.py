"""A toy language model that keeps its whole past in the KV state: enough to test the runtime without a transformer.

Its score for token t after a history h is a fixed random function of t and of the sum, over attended positions, of
``table[token] * (position + 1)``; so a wrong mask, position, row order or length changes what it says.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tilewright.ir.types import tensor_type
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import EngineSpec, StateSlot, TensorSpec
from tilewright.runtime.kv_state import RequestState

VOCAB = 50
_TABLE = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
_SCORES = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3


def scores(ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """f32[V] scores for the token after a history; all arguments are [T]."""
    level = (_TABLE[ids] * (positions + 1) * mask).sum()
    return torch.sin(_SCORES * (1 + level)).float()


class ToyExecutor:
    """Stores token and position of every context position in the slot ``history``, heads 0 and 1."""

    def __init__(self, phase: str, batch: int) -> None:
        self.phase, self.batch = phase, batch
        self.chunks: list[int] = []

    def run(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        assert state is not None
        rows, new, total, last = dims["B"], dims["S"], dims["T"], dims["L"]
        assert state.length == total - new
        assert inputs["input_ids"].is_contiguous()
        self.chunks.append(new)
        history = state.buffers["history"]
        history[:rows, 0, total - new : total, 0] = inputs["input_ids"].double()
        history[:rows, 1, total - new : total, 0] = inputs["position_ids"].double()
        mask = inputs["attention_mask"]
        for row in range(rows):
            for n in range(last):
                end = total - last + 1 + n
                seen = history[row, :, :end, 0]
                outputs["logits"][row, n] = scores(seen[0].long(), seen[1], mask[row, :end])


def toy_engine(
    batch_sizes: tuple[int, ...] = (1, 4), max_length: int = 32, chunk: int = 5, guesses: int = 0
) -> Engine:
    """An engine of toy executors; greedy ties are impossible but for chance. guesses: that its steps can check."""
    spec = EngineSpec(
        kind="decoder",
        device=torch.device("cpu"),
        inputs=(
            TensorSpec("input_ids", tensor_type("i64", ["B", "S"])),
            TensorSpec("position_ids", tensor_type("i64", ["B", "S"])),
            TensorSpec("attention_mask", tensor_type("bool", ["B", "T"])),
        ),
        outputs=(TensorSpec("logits", tensor_type("f32", ["B", "L", VOCAB])),),
        slots=(StateSlot("history", 2, 1, torch.float64),),
        vocab_size=VOCAB,
        max_length=max_length,
        chunk=chunk,
        speculative_tokens=guesses,
    )
    verify = ToyExecutor("verify", 1) if guesses else None
    decode = [ToyExecutor("decode", b) for b in batch_sizes]
    return Engine(decode, ToyExecutor("prefill", 0), spec, verify=verify)
