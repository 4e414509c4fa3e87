"""stories260K, a trained model of a megabyte, from the checkpoint and the vocabulary of llama2.c.

    header  dim, ffn dim, layers, heads, KV heads, vocabulary, context: i32 each
    fp32    embedding | attention norms | wq | wk | wv | wo | ffn norms | w1 | w2 | w3 | final norm | tables of angles

Its rotary pairs are interleaved. It is read into an architecture that pairs so, and, with the rows of
wq and wk in another order, into one whose pairs are half a head apart.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM, LlamaConfig, LlamaForCausalLM

_FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "models" / "stories260K"
_CHECKPOINT, _VOCABULARY = _FOLDER / "stories260K.bin", _FOLDER / "tok512.bin"
_HEADER = struct.Struct("<7i")
BEGIN = 1  # The token before a story.


def stories_model(pairing: str) -> Any:
    """The model with pairs that are "half" or "interleaved". Skips the test if the checkpoint is missing."""
    if not _CHECKPOINT.exists():
        pytest.skip(f"the model stories260K is not in {_FOLDER}")
    data = _CHECKPOINT.read_bytes()
    dim, ffn_dim, layers, heads, kv_heads, vocabulary, context = _HEADER.unpack_from(data)
    options: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": ffn_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model: Any = (
        LlamaForCausalLM(LlamaConfig(**options))
        if pairing == "half"
        else Ernie4_5ForCausalLM(Ernie4_5Config(**options))
    )
    model.load_state_dict(_weights(data, dim, ffn_dim, layers, heads, kv_heads, vocabulary, pairing), strict=True)
    return model.eval()


def _weights(
    data: bytes, dim: int, ffn_dim: int, layers: int, heads: int, kv_heads: int, vocabulary: int, pairing: str
) -> dict[str, torch.Tensor]:
    values = torch.from_numpy(np.frombuffer(data, "<f4", offset=_HEADER.size).copy())
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return values[at - count : at].view(*shape)

    head_dim = dim // heads
    embedding = take(vocabulary, dim)
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    names = {
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, heads * head_dim, dim),
        "self_attn.k_proj": (layers, kv_heads * head_dim, dim),
        "self_attn.v_proj": (layers, kv_heads * head_dim, dim),
        "self_attn.o_proj": (layers, dim, heads * head_dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, ffn_dim, dim),
        "mlp.down_proj": (layers, dim, ffn_dim),
        "mlp.up_proj": (layers, ffn_dim, dim),
    }
    for name, shape in names.items():
        for layer, matrix in enumerate(take(*shape)):
            in_halves = pairing == "half" and name in ("self_attn.q_proj", "self_attn.k_proj")
            weights[f"model.layers.{layer}.{name}.weight"] = _in_halves(matrix, head_dim) if in_halves else matrix
    weights["model.norm.weight"] = take(dim)
    return weights


def _in_halves(matrix: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows 2 i and 2 i + 1 of each head go to i and i + half."""
    rows = matrix.view(-1, head_dim // 2, 2, matrix.shape[1])
    return rows.transpose(1, 2).reshape(matrix.shape)


def stories_text(token_ids: list[int]) -> str:
    """The text of tokens, by the vocabulary of llama2.c: a count, then per piece a score, a length and its bytes."""
    data = _VOCABULARY.read_bytes()
    pieces, at = [], 4
    while at < len(data):
        (length,) = struct.unpack_from("<i", data, at + 4)
        pieces.append(data[at + 8 : at + 8 + length].decode(errors="replace"))
        at += 8 + length
    return "".join(pieces[token] for token in token_ids)
