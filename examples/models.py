"""The models of the examples: a tiny one with random weights, or one of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


class Letters:
    """A tokenizer for the tiny model: one token per byte of the text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token % 128 for token in token_ids).decode("ascii", "replace")


def model_and_tokenizer(name: str) -> tuple[Any, Any, str]:
    """A model that computes in float32, its tokenizer, and its revision. An empty `name` means the tiny model.

    Ends the program with a message if the model cannot be loaded.
    """
    if name:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise SystemExit(f"the model {name!r} cannot be loaded: {error}") from error
        return model.eval(), AutoTokenizer.from_pretrained(name), getattr(model.config, "_commit_hash", None) or "local"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    tiny: Any = LlamaForCausalLM(config)
    return tiny.eval(), Letters(), "1"
