"""Turns of a conversation that overflows its window: its oldest tokens are dropped, and the rest is reused.

Two engines give the same tokens. One keeps the remaining KV in the daemon, and may be killed between turns;
the other keeps it in its memory, and is never killed.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from examples.demo.generation import generate
from examples.demo.in_memory import HistoryInMemory
from examples.demo.model import LoadedModel
from examples.demo.protocol import ANSWER_TOKENS_MAX, InMemory, Turn, WindowedTurn
from examples.demo.script import Message
from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_adapter.cost import Rates
from kvservice_adapter.rope import Rope
from kvservice_adapter.session import Conversation
from kvservice_adapter.truncation import Ranges, keep_on_overflow, kept_tokens
from kvservice_client import Client


class OnlyLoads(Rates):
    """Ignores the measured prefill times, so that the connector loads all stored KV.

    Otherwise the connector may recompute the tokens after a cut. Their KV then differs, because it is
    computed without the tokens that were cut.
    """

    def observe_prefill(self, new_tokens: int, context_tokens: int, seconds: float) -> None:
        pass


class WindowedEngine:
    """Answers with KV from the daemon. The caller passes the state of the conversation with each turn."""

    def __init__(self, loaded: LoadedModel, connector: TransformersConnector, client: Client) -> None:
        """`client` is the client of the connector."""
        self._loaded, self._connector, self._client = loaded, connector, client

    def answer(self, messages: Sequence[Message], *, session_id: str, window: int, state: str) -> WindowedTurn:
        """Answer the last message. `state` is what the last turn returned; empty at the first one."""
        began_s = time.perf_counter()
        conversation, unread = _known(state) if state else (Conversation(session_id), [])
        new = unread + new_token_ids(self._loaded.tokenizer, messages)
        before = conversation.token_count
        problem = ""
        keep = kept_in(window, before, len(new))
        if len(kept_tokens(keep)) < before and not self._connector.truncate(conversation, keep):
            problem = "the daemon did not record the cut"
        history_tokens = conversation.token_count
        prompt = torch.tensor([[*conversation.token_ids.tolist(), *new]])
        before_run = self._client.stats().loaded_bytes
        history = self._connector.restore(prompt, conversation=conversation)
        answered = generate(self._loaded.model, prompt, history.cache)
        loaded = self._client.stats().loaded_bytes
        transports = [name for name, size_bytes in loaded.items() if size_bytes > before_run.get(name, 0)]
        known = history.cache.get_seq_length()
        saved = self._connector.save(answered.token_ids[:known], history.cache, conversation=conversation)
        answer_ids = answered.token_ids[prompt.shape[1] :]
        error = history.error or saved.error
        turn = Turn(
            answer=self._loaded.tokenizer.decode(answer_ids, skip_special_tokens=True).strip(),
            answer_tokens=len(answer_ids),
            history_tokens=history_tokens,
            new_tokens=len(new),
            reused_tokens=history.loaded_tokens,
            tier=history.tier,
            transport="+".join(sorted(transports)) or "none",
            bytes=history.size_bytes if history.loaded_tokens else 0,
            ttft_reuse_s=answered.first_token_at_s - began_s,
            ttft_recompute_s=None,
            identical=None,
            problem=problem or (f"{type(error).__name__}: {error}" if error else ""),
            dropped_tokens=before - history_tokens,
        )
        rest = without_end(self._loaded.tokenizer, answered.token_ids[known:])
        return WindowedTurn(turn, answer_ids, _state(conversation, rest))


class EngineInMemory:
    """Answers without the daemon: cuts and rotates the KV in this process."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._history = HistoryInMemory(Rope.from_model(loaded.model))
        self._token_ids: list[int] = []
        self._unread: list[int] = []

    def cache(self) -> DynamicCache:
        """The KV of the remaining conversation, as a cache for the model."""
        return self._history.cache()

    def answer(self, messages: Sequence[Message], *, window: int) -> InMemory:
        """Answer the last message, and measure the TTFT when all remaining tokens are recomputed."""
        began_s = time.perf_counter()
        new = self._unread + new_token_ids(self._loaded.tokenizer, messages)
        keep = kept_in(window, len(self._token_ids), len(new))
        kept = kept_tokens(keep).tolist()
        prompt = torch.tensor([[*(self._token_ids[at] for at in kept), *new]])
        recomputed = generate(self._loaded.model, prompt, None, answer_tokens_max=1)
        ttft_recompute_s = recomputed.first_token_at_s - began_s

        if len(kept) < len(self._token_ids):
            self._history.cut(keep)
        cache = self._history.cache()
        answered = generate(self._loaded.model, prompt, cache)
        self._history.extend(cache)
        known = self._history.token_count
        self._token_ids = answered.token_ids[:known]
        self._unread = without_end(self._loaded.tokenizer, answered.token_ids[known:])
        return InMemory(answered.token_ids[prompt.shape[1] :], ttft_recompute_s)


def kept_in(window: int, history_tokens: int, new_tokens: int) -> Ranges:
    """The ranges of a history that stay, so that new tokens and an answer fit in the window after them."""
    return keep_on_overflow(history_tokens, window=window, new_tokens=new_tokens + ANSWER_TOKENS_MAX)


def new_token_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of the last message, with the chat template's text before and after it.

    They exclude the previous answer: its tokens are known, and the tokenizer may split its text differently.
    """
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    text = _templated(tokenizer, messages)
    if answers:
        opening = _templated(tokenizer, messages[: answers[-1]]) + messages[answers[-1]]["content"]
        if not text.startswith(opening):
            raise ValueError("the model's chat template changes earlier messages when later ones follow")
        text = text[len(opening) :]
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def without_end(tokenizer: Any, token_ids: list[int]) -> list[int]:
    """Tokens of an answer that the model has not read, without the end token: the chat template adds it."""
    return token_ids[:-1] if token_ids and token_ids[-1] == tokenizer.eos_token_id else token_ids


def _templated(tokenizer: Any, messages: Sequence[Message]) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


def _state(conversation: Conversation, unread: list[int]) -> str:
    return base64.b64encode(pickle.dumps((conversation, unread))).decode()


def _known(state: str) -> tuple[Conversation, list[int]]:
    """Unpickles `state`: accept it only from the demo's parent process."""
    known: tuple[Conversation, list[int]] = pickle.loads(base64.b64decode(state))
    return known
