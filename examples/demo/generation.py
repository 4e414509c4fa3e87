"""Greedy answers of the demo's model, and the time of their first token."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from examples.demo.protocol import ANSWER_TOKENS_MAX, ANSWER_TOKENS_MIN


class Generated(NamedTuple):
    token_ids: list[int]  # Prompt and answer.
    first_token_at_s: float  # By `time.perf_counter`.


class _FirstToken(BaseStreamer):
    """Records the time of the first new token. `generate` first calls `put` with the prompt."""

    def __init__(self) -> None:
        self._calls = 0
        self.at_s = 0.0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:
            self.at_s = time.perf_counter()

    def end(self) -> None:
        pass


def generate(
    model: Any, prompt: torch.Tensor, cache: DynamicCache | None, *, answer_tokens_max: int = ANSWER_TOKENS_MAX
) -> Generated:
    """Answer a prompt ``[1, token]``. Tokens in `cache` are not computed again; the new ones are added to it."""
    first_token = _FirstToken()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        streamer=first_token,
        do_sample=False,
        min_new_tokens=min(ANSWER_TOKENS_MIN, answer_tokens_max),
        max_new_tokens=answer_tokens_max,
    )
    return Generated(output[0].tolist(), first_token.at_s)
