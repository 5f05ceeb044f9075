"""Architectures that nothing in the compiler knows by name: small random models of each beside Hugging Face's own.

A left-padded prompt longer than any window, all logits, then greedy tokens. The reference backend shows that capture,
lowering and passes keep a model's meaning; a few go through generated C++ as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PretrainedConfig, PreTrainedModel

import tilewright as tw

from .models import random

_PLAIN = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {**_PLAIN, **_IDS, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 16}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 4,
}  # fmt: skip
_GEMMA4 = {
    "sliding_window": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
}  # fmt: skip
_RECURRENT = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, **_IDS}
_FALCON = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **_IDS}

DECODERS: dict[str, PretrainedConfig] = {
    "llama": hf.LlamaConfig(**_GROUPED),
    "opt": hf.OPTConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=96,
        word_embed_proj_dim=64,
        **_IDS,
    ),
    "gpt2": hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, **_IDS),
    "gpt_neo": hf.GPTNeoConfig(
        vocab_size=128,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=9,
        max_position_embeddings=64,
        **_IDS,
    ),
    "xglm": hf.XGLMConfig(
        vocab_size=128,
        d_model=64,
        ffn_dim=96,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=64,
        **_IDS,
    ),
    "gptj": hf.GPTJConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **_IDS),
    "codegen": hf.CodeGenConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, **_IDS),
    "gpt_neox": hf.GPTNeoXConfig(**_PLAIN, **_IDS),
    "mistral": hf.MistralConfig(**_GROUPED, sliding_window=16),
    "mixtral": hf.MixtralConfig(**_GROUPED, num_local_experts=4),
    "qwen2": hf.Qwen2Config(**_GROUPED),
    "qwen3": hf.Qwen3Config(**_HEADS),
    "qwen3_moe": hf.Qwen3MoeConfig(**_HEADS, **_EXPERTS, num_experts=4),
    "gemma2": hf.Gemma2Config(**_HEADS, sliding_window=16),
    "gemma3": hf.Gemma3TextConfig(**_HEADS, sliding_window=16),
    "phi3": hf.Phi3Config(**_GROUPED),
    "stablelm": hf.StableLmConfig(**_GROUPED),
    "olmo2": hf.Olmo2Config(**_GROUPED),
    "starcoder2": hf.Starcoder2Config(**_GROUPED),
    "granite": hf.GraniteConfig(**_GROUPED),
    "cohere": hf.CohereConfig(**_GROUPED),
    "gpt_oss": hf.GptOssConfig(**_HEADS, num_local_experts=4, sliding_window=16),
    "bloom": hf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, **_IDS),
    "bloom_12_heads": hf.BloomConfig(vocab_size=128, hidden_size=96, n_layer=2, n_head=12, **_IDS),
    "mpt": hf.MptConfig(vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=64, **_IDS),
    "mpt_12_heads": hf.MptConfig(
        vocab_size=128,
        d_model=96,
        n_layers=2,
        n_heads=12,
        max_seq_len=64,
        attn_config={"clip_qkv": 0.5, "softmax_scale": 0.4},
        **_IDS,
    ),
    "falcon": hf.FalconConfig(**_FALCON),
    "falcon_groups": hf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_one_norm": hf.FalconConfig(
        **_FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon_heads": hf.FalconConfig(**_FALCON, multi_query=False, parallel_attn=False, bias=True),
    "mamba": hf.MambaConfig(**_RECURRENT),
    "falcon_mamba": hf.FalconMambaConfig(**_RECURRENT),
    "deepseek_v2": hf.DeepseekV2Config(
        **_PLAIN, **_IDS, **_EXPERTS, **_LATENT | {"q_lora_rank": None}, num_key_value_heads=4
    ),
    "deepseek_v3": hf.DeepseekV3Config(**_PLAIN, **_IDS, **_EXPERTS, **_LATENT, num_key_value_heads=4),
    "smollm3": hf.SmolLM3Config(**_GROUPED),
    "exaone4": hf.Exaone4Config(**_HEADS, sliding_window=16),
    "cohere2": hf.Cohere2Config(**_HEADS, sliding_window=16),
    "gpt_bigcode": hf.GPTBigCodeConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, **_IDS),
    "olmoe": hf.OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": hf.Qwen2MoeConfig(**_GROUPED, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
    "glm4_moe": hf.Glm4MoeConfig(**_HEADS, **_EXPERTS, n_routed_experts=4, first_k_dense_replace=0),
    "phimoe": hf.PhimoeConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "granitemoe": hf.GraniteMoeConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gemma4": hf.Gemma4TextConfig(**_HEADS, **_GEMMA4, layer_types=["sliding_attention", "full_attention"]),
    "gemma4_shared": hf.Gemma4TextConfig(
        **_HEADS,
        **_GEMMA4,
        layer_types=["full_attention"] * 2,
        num_kv_shared_layers=1,
        use_double_wide_mlp=True,
    ),
}
_HYBRID = {**_HEADS, "num_hidden_layers": 3}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
HYBRIDS: dict[str, PretrainedConfig] = {
    "mamba2": hf.Mamba2Config(**_RECURRENT, num_heads=8, head_dim=16, n_groups=2),
    "bamba": hf.BambaConfig(**_GROUPED, **_MAMBA2, mamba_n_groups=2, attn_layer_indices=[1]),
    "falcon_h1": hf.FalconH1Config(**_HEADS, **_MAMBA2, mamba_d_ssm=128),
    "granitemoehybrid": hf.GraniteMoeHybridConfig(
        **_GROUPED, **_MAMBA2, layer_types=["linear_attention", "full_attention"], num_local_experts=4
    ),
    "zamba2": hf.Zamba2Config(
        **_PLAIN, **_IDS, mamba_d_state=8, n_mamba_heads=8, layers_block_type=["linear_attention", "hybrid"]
    ),
    "jamba": hf.JambaConfig(
        **_GROUPED, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, num_experts=4
    ),
    "lfm2": hf.Lfm2Config(**_GROUPED | {"num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"]),
    "qwen3_next": hf.Qwen3NextConfig(
        **_HYBRID, **_DELTA, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=32
    ),
    "qwen3_5": hf.Qwen3_5TextConfig(
        **_HYBRID | {"head_dim": 32}, **_DELTA,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
    ),
    "olmo_hybrid": hf.OlmoHybridConfig(**_GROUPED | {"num_hidden_layers": 3}, **_DELTA),
    "kimi_linear": hf.KimiLinearConfig(
        **_PLAIN, **_IDS, **_LATENT | {"q_lora_rank": None}, num_experts=4, num_experts_per_token=2,
        moe_intermediate_size=32, linear_num_heads=4, linear_head_dim=16,
        layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"],
    ),
}  # fmt: skip
DECODERS |= HYBRIDS
_T5 = {
    "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
ENCODERS: dict[str, PretrainedConfig] = {
    "bert": hf.BertConfig(**_PLAIN),
    "roberta": hf.RobertaConfig(**_PLAIN),
    "distilbert": hf.DistilBertConfig(vocab_size=128, dim=64, n_layers=2, n_heads=4, hidden_dim=96),
    "xlm_roberta": hf.XLMRobertaConfig(**_PLAIN),
    "modernbert": hf.ModernBertConfig(**_PLAIN, local_attention=8, pad_token_id=0),
    "nomic_bert": hf.NomicBertConfig(**_PLAIN),
    "layoutlm": hf.LayoutLMConfig(**_PLAIN),
    "mpnet": hf.MPNetConfig(**_PLAIN),
    "deberta_v2": hf.DebertaV2Config(
        **_PLAIN,
        relative_attention=True,
        position_buckets=8,
        max_relative_positions=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    ),
}
REFUSED: dict[str, PretrainedConfig] = {
    "falcon_alibi": hf.FalconConfig(**_FALCON, alibi=True),
}


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return ids, mask


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_says_what_hugging_face_says(name: str, record_architecture: Callable[..., None]) -> None:
    fast, found, expected = check_decoder(name, "reference")
    record_architecture(name, "decoder", fast.report(), [found], [expected])


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "qwen3_moe", "bloom_12_heads", "falcon_groups"])
def test_and_so_do_generated_kernels(name: str) -> None:
    """Two windows in turn with norms of heads; sinks, and transposed experts; experts as they mostly are; a bias by
    distance; one key for the queries beside it in the product."""
    check_decoder(name, "cpp")


def check_decoder(name: str, backend: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The compiled model, and the logits of the tokens that are not padding: its own and Hugging Face's.

    Methods that capture replaces for a while are the model's own again.
    """
    model = random(DECODERS[name], hf.AutoModelForCausalLM)
    own = [set(vars(m)) for m in model.modules()]
    ids, mask = prompt()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend=backend, autotune="off")
    with torch.no_grad():
        found = fast(input_ids=ids, attention_mask=mask).logits
        assert [set(vars(m)) for m in model.modules()] == own
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    kept = mask.bool()
    torch.testing.assert_close(
        found[kept], expected[kept], rtol=2e-4, atol=2e-5 * expected.abs().max().item()
    )
    given: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(fast.generate(ids, **given), model.generate(ids, **given))
    return fast, found[kept], expected[kept]


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_says_what_hugging_face_says(name: str, record_architecture: Callable[..., None]) -> None:
    fast, found, expected = check_encoder(random(ENCODERS[name], hf.AutoModel), "reference")
    record_architecture(name, "encoder of texts", fast.report(), [found], [expected])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", [hf.T5EncoderModel, hf.MT5EncoderModel, hf.UMT5EncoderModel])
def test_relative_positions_are_a_table_by_distance(
    kind: Any, backend: str, record_architecture: Callable[..., None]
) -> None:
    """Prompts longer than the table, whose numbers are all unlike, on both sides of a query."""
    model = random(kind.config_class(**_T5), kind)
    with torch.no_grad():
        for block in model.encoder.block:
            if (attention := block.layer[0].SelfAttention).has_relative_attention_bias:
                attention.relative_attention_bias.weight.normal_(0, 2)
    fast, found, expected = check_encoder(model, backend)
    if backend == "reference":
        name = f"{model.config.model_type}_encoder"
        record_architecture(name, "encoder of texts", fast.report(), [found], [expected])
    assert not fast.report().fallbacks
    assert "distances" in fast.ir("lowered")


def check_encoder(model: PreTrainedModel, backend: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend=backend, autotune="off")
    ids, mask = prompt()
    given = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    with torch.no_grad():
        expected, found = (m(**given).last_hidden_state for m in (model, fast))
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)
    return fast, found[kept], expected[kept]


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_the_op_cannot_express_is_refused(name: str) -> None:
    model = random(REFUSED[name], hf.AutoModelForCausalLM)
    with pytest.raises(tw.CaptureError, match=r"unsupported attention.*run this model with Hugging Face"):
        tw.compile(model, max_length=64, backend="reference")
