"""Families of transformers, as tiny models with random weights, and whether the connector supports each.

`docs/transformers.md` has the same table for readers; `test_connector_families.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

VOCABULARY = 97
_NAMED = {  # Under the names that most families have.
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
_GROUPED = {**_NAMED, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "init_std": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table. `refused` is part of the reason of UnsupportedModel; empty if the model is supported."""

    name: str
    make: Callable[[], Any]
    refused: str = ""
    is_fast: bool = False  # Computed in the normal suite.
    keeps_padded_rows: bool = True  # Rows with padding on the left are kept too.

    def model(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval()


def _of(config: str, model: str, base: dict[str, Any], **options: Any) -> Callable[[], Any]:
    """Makes ``model(config(**base, **options))``."""
    return partial(_make, config, model, {**base, **options})


def _make(config: str, model: str, options: dict[str, Any]) -> Any:
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def _lm(name: str, base: dict[str, Any], **options: Any) -> Callable[[], Any]:
    return _of(f"{name}Config", f"{name}ForCausalLM", base, **options)


_WINDOW = {"sliding_window": 16}
_LINEAR = "LinearAttention"
_COUNTED_FROM_PADDING: dict[str, dict[str, Any]] = {
    "Camembert": {},
    "XLMRoberta": {},
    "Data2VecText": {},
    "RobertaPreLayerNorm": {},
    "XLMRobertaXL": {},
    "Xmod": {"default_language": "en_XX"},
}
_OTHER_CACHE = "takes no past_key_values"

FAMILIES = [
    Family("Llama", _lm("Llama", _GROUPED), is_fast=True),
    Family("Mistral, sliding window", _lm("Mistral", _GROUPED, **_WINDOW), is_fast=True),
    Family("Mixtral", _lm("Mixtral", _GROUPED, num_local_experts=4, sliding_window=None)),
    Family("Qwen2", _lm("Qwen2", _GROUPED)),
    Family(
        "Qwen2, sliding window in some layers",
        _lm("Qwen2", _GROUPED, use_sliding_window=True, max_window_layers=1, **_WINDOW),
    ),
    Family("Qwen2-MoE", _lm("Qwen2Moe", _GROUPED, **_EXPERTS, shared_expert_intermediate_size=32)),
    Family("Qwen3", _lm("Qwen3", _GROUPED, head_dim=16), is_fast=True),
    Family("Qwen3-MoE", _lm("Qwen3Moe", _GROUPED, head_dim=16, **_EXPERTS), is_fast=True),
    Family("Gemma", _lm("Gemma", _GROUPED, head_dim=16), is_fast=True),
    Family("Gemma 2", _lm("Gemma2", _GROUPED, head_dim=16, **_WINDOW), is_fast=True),
    Family(
        "Gemma 3, text",
        _of(
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            _GROUPED,
            head_dim=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            **_WINDOW,
        ),
        is_fast=True,
    ),
    Family("VaultGemma", _lm("VaultGemma", _GROUPED, head_dim=16, **_WINDOW)),
    Family("Phi", _lm("Phi", _GROUPED), is_fast=True),
    Family("Phi-3", _lm("Phi3", _GROUPED)),
    Family("PhiMoE", _lm("Phimoe", _GROUPED, num_local_experts=4)),
    Family("StableLM", _lm("StableLm", _GROUPED), is_fast=True),
    Family("Cohere", _lm("Cohere", _GROUPED, logit_scale=1.0), is_fast=True),
    Family(
        "Cohere 2",
        _lm(
            "Cohere2",
            _GROUPED,
            logit_scale=1.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            **_WINDOW,
        ),
    ),
    Family("OLMo", _lm("Olmo", _GROUPED)),
    Family("OLMo 2", _lm("Olmo2", _GROUPED), is_fast=True),
    Family("OLMo 3", _lm("Olmo3", _GROUPED, **_WINDOW)),
    Family("OLMoE", _lm("Olmoe", _GROUPED, num_experts=4, num_experts_per_tok=2)),
    Family("Granite", _lm("Granite", _GROUPED)),
    Family("Granite-MoE", _lm("GraniteMoe", _GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    Family("StarCoder2, sliding window", _lm("Starcoder2", _GROUPED, **_WINDOW), is_fast=True),
    Family("GPT-2", _of("GPT2Config", "GPT2LMHeadModel", _GPT2), is_fast=True),
    Family(
        "GPT-Neo",
        _lm(
            "GPTNeo",
            {"vocab_size": VOCABULARY, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "initializer_range": 0.2},
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
        ),
        is_fast=True,
    ),
    Family("GPT-NeoX", _lm("GPTNeoX", _NAMED), is_fast=True),
    Family("GPT-J", _lm("GPTJ", _GPT2, rotary_dim=8), is_fast=True),
    Family("CodeGen", _lm("CodeGen", _GPT2, rotary_dim=8)),
    Family("GPT-BigCode, one KV head", _lm("GPTBigCode", _GPT2), is_fast=True),
    Family("GPT-BigCode, multi-head", _lm("GPTBigCode", _GPT2, multi_query=False)),
    Family("Falcon, one KV head", _lm("Falcon", _NAMED, multi_query=True), is_fast=True),
    Family("Falcon, ALiBi", _lm("Falcon", _NAMED, alibi=True, multi_query=False)),
    Family("Falcon, new architecture", _lm("Falcon", _NAMED, new_decoder_architecture=True, num_kv_heads=2)),
    Family(
        "BLOOM",
        _lm(
            "Bloom",
            {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 3, "n_head": 4, "initializer_range": 0.2},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
        is_fast=True,
        keeps_padded_rows=False,
    ),
    Family(
        "MPT",
        _lm(
            "Mpt",
            {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 3, "n_heads": 4, "initializer_range": 0.2},
            use_cache=True,
        ),
        keeps_padded_rows=False,
    ),
    Family(
        "OPT",
        _lm(
            "OPT",
            {**_NAMED, "pad_token_id": 1, "init_std": 0.2},
            ffn_dim=64,
            word_embed_proj_dim=64,
        ),
        is_fast=True,
    ),
    Family(
        "XGLM",
        _lm(
            "XGLM",
            {"vocab_size": VOCABULARY, "d_model": 48, "ffn_dim": 64, "num_layers": 3, "attention_heads": 4},
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
            init_std=0.2,
        ),
        is_fast=True,
    ),
    Family("BioGPT", _lm("BioGpt", {**_NAMED, "pad_token_id": 1})),
    Family("BERT as a decoder", _of("BertConfig", "BertLMHeadModel", _NAMED, is_decoder=True), is_fast=True),
    Family("ELECTRA as a decoder", _lm("Electra", _NAMED, embedding_size=48, is_decoder=True)),
    Family("RemBERT as a decoder", _lm("RemBert", _NAMED, is_decoder=True)),
    Family("RoFormer as a decoder", _lm("RoFormer", _NAMED, is_decoder=True), keeps_padded_rows=False),
    Family("Megatron-BERT as a decoder", _lm("MegatronBert", _NAMED, is_decoder=True)),
    Family(
        "CTRL",
        _of(
            "CTRLConfig",
            "CTRLLMHeadModel",
            {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "dff": 32, "n_positions": 256},
        ),
    ),
    Family("Persimmon", _lm("Persimmon", _NAMED), is_fast=True),
    Family("Nemotron", _lm("Nemotron", _GROUPED, head_dim=16)),
    Family("Helium", _lm("Helium", _GROUPED, head_dim=16)),
    Family("GLM", _lm("Glm", _GROUPED, head_dim=16), is_fast=True),
    Family("GLM-4", _lm("Glm4", _GROUPED, head_dim=16)),
    Family("DeepSeek-V2, latent attention", _lm("DeepseekV2", _NAMED, **_MLA)),
    Family("DeepSeek-V3, latent attention", _lm("DeepseekV3", _NAMED, **_MLA), is_fast=True),
    Family("Youtu, latent attention", _lm("Youtu", _NAMED, **_MLA)),
    Family(
        "gpt-oss",
        _lm("GptOss", _GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, **_WINDOW),
        is_fast=True,
    ),
    Family("SmolLM3", _lm("SmolLM3", _GROUPED), is_fast=True),
    Family("EXAONE 4", _lm("Exaone4", _GROUPED, **_WINDOW)),
    Family("ERNIE 4.5", _lm("Ernie4_5", _GROUPED)),
    Family("Arcee", _lm("Arcee", _GROUPED)),
    Family("Apertus", _lm("Apertus", _GROUPED)),
    Family(
        "JetMoe",
        _lm(
            "JetMoe",
            {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2},
            kv_channels=16,
            intermediate_size=64,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    Family("DiffLlama", _lm("DiffLlama", _GROUPED)),
    Family("Seed-OSS", _lm("SeedOss", _GROUPED, head_dim=16)),
    Family("HunYuan", _lm("HunYuanDenseV1", _GROUPED, head_dim=16)),
    Family("Doge", _lm("Doge", _GROUPED)),
    Family("BitNet", _lm("BitNet", _GROUPED)),
    Family("nanochat", _lm("NanoChat", _GROUPED)),
    Family(
        "BART as a decoder",
        _of("BartConfig", "BartForCausalLM", {**_BART, "encoder_layers": 3, "decoder_layers": 3}, is_decoder=True),
        keeps_padded_rows=False,
    ),
    # Refused
    Family(
        "RoBERTa as a decoder",
        _lm("Roberta", {**_NAMED, "pad_token_id": 1, "max_position_embeddings": 260}, is_decoder=True),
        "position_ids",
    ),
    *(
        Family(
            f"{name} as a decoder",
            _lm(name, {**_NAMED, "pad_token_id": 1, "max_position_embeddings": 260}, is_decoder=True, **options),
            "position_ids",
        )
        for name, options in _COUNTED_FROM_PADDING.items()
    ),
    Family("Moshi, sliding window", _lm("Moshi", _GROUPED, ffn_dim=64, **_WINDOW), "makes no sliding-window mask"),
    Family(
        "MPT as configured, without a cache",
        _lm("Mpt", {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 3, "n_heads": 4}),
        "use_cache",
    ),
    Family("BERT, an encoder", _of("BertConfig", "BertLMHeadModel", _NAMED), "not causal"),
    Family(
        "Gemma 3 with bidirectional attention",
        _of("Gemma3TextConfig", "Gemma3ForCausalLM", _GROUPED, head_dim=16, use_bidirectional_attention=True),
        "not causal",
    ),
    Family(
        "T5",
        _of("T5Config", "T5ForConditionalGeneration", {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
        "reads more than tokens",
    ),
    Family(
        "BART",
        _of(
            "BartConfig",
            "BartForConditionalGeneration",
            {"vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1},
        ),
        "reads more than tokens",
    ),
    Family(
        "BART as a decoder, with other layers than its encoder",
        _of("BartConfig", "BartForCausalLM", {**_BART, "encoder_layers": 1, "decoder_layers": 3}, is_decoder=True),
        "its decoder has 3 layers",
    ),
    Family(
        "PaliGemma",
        _of(
            "PaliGemmaConfig",
            "PaliGemmaForConditionalGeneration",
            {},
            text_config={
                "model_type": "gemma",
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
            },
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "vision_use_head": False,
            },
            projection_dim=16,
        ),
        "reads more than tokens",
    ),
    Family(
        "Llama with longrope",
        _lm(
            "Llama",
            _GROUPED,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
            },
        ),
        "longrope",
    ),
    Family("DeepSeek-V3.2, sparse attention", _lm("DeepseekV32", _NAMED, **_MLA), "DynamicIndexedLayer"),
    Family(
        "Llama 4, chunked attention",
        _of(
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            _GROUPED,
            head_dim=16,
            num_local_experts=2,
            intermediate_size_mlp=64,
        ),
        "chunked",
    ),
    Family(
        "Llama 4 without a chunk's size",
        _of(
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            _GROUPED,
            head_dim=16,
            num_local_experts=2,
            intermediate_size_mlp=64,
            attention_chunk_size=None,
        ),
        "chunked",
    ),
    Family("Gemma 4, text", _of("Gemma4TextConfig", "Gemma4ForCausalLM", _GROUPED, head_dim=16), "proportional"),
    Family("Mamba", _lm("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}), _LINEAR),
    Family(
        "Mamba 2",
        _lm("Mamba2", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}, head_dim=8, num_heads=4),
        _LINEAR,
    ),
    Family(
        "Jamba",
        _lm(
            "Jamba",
            _GROUPED,
            num_experts=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
        ),
        _LINEAR,
    ),
    Family(
        "Bamba",
        _lm("Bamba", _GROUPED, mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, attn_layer_indices=[1]),
        _LINEAR,
    ),
    Family("RecurrentGemma", _lm("RecurrentGemma", _GROUPED), _LINEAR),
    Family("MiniMax", _lm("MiniMax", _GROUPED, head_dim=16, num_local_experts=4), _LINEAR),
    Family(
        "Qwen3-Next",
        _lm(
            "Qwen3Next",
            _GROUPED,
            head_dim=16,
            **_EXPERTS,
            shared_expert_intermediate_size=32,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        _LINEAR,
    ),
    Family("LFM2", _lm("Lfm2", _GROUPED, layer_types=["conv", "full_attention", "conv"]), _LINEAR),
    Family("Falcon-H1", _lm("FalconH1", _GROUPED), _LINEAR),
    Family("RWKV", _lm("Rwkv", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}), _OTHER_CACHE),
    Family(
        "XLNet",
        _of(
            "XLNetConfig",
            "XLNetLMHeadModel",
            {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16},
        ),
        _OTHER_CACHE,
    ),
    Family(
        "XLM",
        _of("XLMConfig", "XLMWithLMHeadModel", {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2}),
        _OTHER_CACHE,
    ),
    Family(
        "GPT (OpenAI)",
        _of(
            "OpenAIGPTConfig",
            "OpenAIGPTLMHeadModel",
            {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2},
        ),
        _OTHER_CACHE,
    ),
]
