"""An engine whose executors are the Hugging Face model itself, run in eager over the request state's KV buffers.

It tests the engine, the loop and the mixins apart from the compiler: what they do wrong shows as a difference to the
model's own ``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from tilewright.api_mixin import Compiled, EncoderMixin, attach
from tilewright.cache import with_cache
from tilewright.decoder_mixin import DecoderMixin
from tilewright.ir.types import tensor_type
from tilewright.report import Report
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import EngineSpec, StateSlot, TensorSpec
from tilewright.runtime.kv_state import RequestState


@dataclass(frozen=True, eq=False)
class EagerDecoder:
    """Runs the model over ``state.buffers`` and writes the new keys and values back."""

    model: PreTrainedModel
    phase: str
    batch: int

    def run(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        assert state is not None
        rows, total, past = dims["B"], dims["T"], dims["T"] - dims["S"]
        if self.batch:
            assert rows == self.batch
            assert dims["S"] == dims["L"] == 1
        assert inputs["input_ids"].shape == (rows, dims["S"])
        assert inputs["attention_mask"].shape == (state.rows, state.max_length)
        cache = DynamicCache(config=self.model.config)
        layers = len(state.buffers) // 2
        for n in range(layers):
            key, value = (state.buffers[f"{n}.{part}"][:rows, :, :past] for part in ("k", "v"))
            cache.update(key.clone(), value.clone(), n)
        with torch.no_grad():
            result = self.model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                attention_mask=inputs["attention_mask"][:rows, :total].long(),
                logits_to_keep=dims["L"],
                **with_cache(self.model.forward, cache),
            )
        for n in range(layers):
            for part, values in (("k", cache.layers[n].keys), ("v", cache.layers[n].values)):
                state.buffers[f"{n}.{part}"][:rows, :, past:total] = values[:, :, past:total]
        outputs["logits"].copy_(result.logits)


@dataclass(frozen=True, eq=False)
class EagerEncoder:
    """Runs an encoder as it is."""

    model: PreTrainedModel
    phase: str = "forward"
    batch: int = 0

    def run(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        with torch.no_grad():
            result = self.model(**{k: v.long() for k, v in inputs.items()})
        for name, value in outputs.items():
            value.copy_(result[name])


def eager_decoder(
    model: PreTrainedModel, batch_sizes: Sequence[int] = (1, 4), max_length: int = 64, chunk: int = 8
) -> Any:
    """``model`` as a compiled model would be, but run by itself."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    spec = EngineSpec(
        kind="decoder",
        device=model.device,
        inputs=(
            TensorSpec("input_ids", tensor_type("i64", ["B", "S"])),
            TensorSpec("position_ids", tensor_type("i64", ["B", "S"])),
            TensorSpec("attention_mask", tensor_type("bool", ["B", "T"])),
        ),
        outputs=(TensorSpec("logits", tensor_type("f32", ["B", "L", config.vocab_size])),),
        slots=tuple(
            StateSlot(f"{n}.{part}", heads, head_dim, model.dtype)
            for n in range(config.num_hidden_layers)
            for part in ("k", "v")
        ),
        vocab_size=config.vocab_size,
        max_length=max_length,
        chunk=chunk,
        positions="mask" if config.model_type == "opt" else "past",
    )
    decode = [EagerDecoder(model, "decode", size) for size in batch_sizes]
    engine = Engine(decode, EagerDecoder(model, "prefill", 0), spec)
    with torch.no_grad():
        output_class = type(model(torch.ones(1, 1, dtype=torch.long)))
    return attach(model, Compiled(engine, Report(), ("logits",), output_class), DecoderMixin)


def eager_encoder(model: PreTrainedModel) -> Any:
    """``model``, an encoder with a pooler, as a compiled model would be, but run by itself."""
    hidden = model.config.hidden_size
    spec = EngineSpec(
        kind="encoder",
        device=model.device,
        inputs=(
            TensorSpec("input_ids", tensor_type("i64", ["B", "S"])),
            TensorSpec("attention_mask", tensor_type("bool", ["B", "S"])),
            TensorSpec("token_type_ids", tensor_type("i64", ["B", "S"])),
        ),
        outputs=(
            TensorSpec("last_hidden_state", tensor_type("f32", ["B", "S", hidden])),
            TensorSpec("pooler_output", tensor_type("f32", ["B", hidden])),
        ),
        symbols=(("B", 1, 4096), ("S", 1, model.config.max_position_embeddings)),
        vocab_size=model.config.vocab_size,
    )
    engine = Engine([], EagerEncoder(model), spec)
    names = ("last_hidden_state", "pooler_output")
    output = BaseModelOutputWithPoolingAndCrossAttentions(**dict.fromkeys(names, 0))
    _, spec = pytree.tree_flatten(output)
    return attach(model, Compiled(engine, Report(), names, type(output), spec), EncoderMixin)
