"""Tokens of the demo's messages, and greedy answers with the time of their first token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from examples.demo.script import ANSWER_TOKENS_MAX, ANSWER_TOKENS_MIN, Message
from kvservice_adapter.truncation import Ranges, keep_on_overflow


class Generated(NamedTuple):
    token_ids: list[int]  # Prompt and answer.
    ttft_s: float


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
    model: Any,
    prompt: torch.Tensor,
    cache: DynamicCache | None,
    began_s: float,
    *,
    answer_tokens_max: int = ANSWER_TOKENS_MAX,
) -> Generated:
    """Answer a prompt ``[1, token]``. Tokens in `cache` are not computed again; the new ones are added to it.

    `began_s` is when the request began, by `time.perf_counter`.
    """
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
    return Generated(output[0].tolist(), first_token.at_s - began_s)


def message_ids(tokenizer: Any, messages: Sequence[Message], *, to_answer: bool) -> list[int]:
    """The tokens of all messages; with `to_answer` followed by the beginning of an answer."""
    return _token_ids(tokenizer, _templated(tokenizer, messages, to_answer=to_answer))


def new_token_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of the last message, with the chat template's text before and after it.

    They exclude the previous answer: its tokens are known, and the tokenizer may split its text differently.
    """
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    text = _templated(tokenizer, messages, to_answer=True)
    if answers:
        opening = _templated(tokenizer, messages[: answers[-1]], to_answer=True) + messages[answers[-1]]["content"]
        if not text.startswith(opening):
            raise ValueError("the model's chat template changes earlier messages when later ones follow")
        text = text[len(opening) :]
    return _token_ids(tokenizer, text)


def without_end(tokenizer: Any, token_ids: list[int]) -> list[int]:
    """Tokens of an answer that the model has not read, without the end token: the chat template adds it."""
    return token_ids[:-1] if token_ids and token_ids[-1] == tokenizer.eos_token_id else token_ids


def kept_in(window: int, history_tokens: int, new_tokens: int) -> Ranges:
    """The ranges of a history that stay, so that new tokens and an answer fit in the window after them."""
    return keep_on_overflow(history_tokens, window=window, new_tokens=new_tokens + ANSWER_TOKENS_MAX)


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _templated(tokenizer: Any, messages: Sequence[Message], *, to_answer: bool) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer)
    return text
