"""Turns of a conversation that overflows its window: its oldest tokens leave, and the rest goes on being used.

Twice the same, token for token: with what is left of the KV in the daemon, where two processes find it
that know of nothing but the conversation's tokens; and in the memory of one process that is never killed.
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
    """Never learns what computing takes, so that whatever is stored is loaded.

    Else a connector may find that computing what a cut has left is faster: as good, but not the same, for it
    is then computed without what was cut.
    """

    def observe_prefill(self, new_tokens: int, context_tokens: int, seconds: float) -> None:
        pass


class WindowedEngine:
    """Answers with the daemon's help. What it must know of the conversation comes with each turn."""

    def __init__(self, loaded: LoadedModel, connector: TransformersConnector, client: Client) -> None:
        """`client` is the connector's."""
        self._loaded, self._connector, self._client = loaded, connector, client

    def answer(self, messages: Sequence[Message], *, session_id: str, window: int, state: str) -> WindowedTurn:
        """Answer the last message. `state` is what the last turn returned; empty at the first one."""
        began_s = time.perf_counter()
        conversation, unread = _known(state) if state else (Conversation(session_id), [])
        new = unread + new_token_ids(self._loaded.tokenizer, messages)
        before = conversation.token_count
        trouble = ""
        keep = kept_in(window, before, len(new))
        if len(kept_tokens(keep)) < before and not self._connector.truncate(conversation, keep):
            trouble = "the daemon could not be told what was cut"
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
            trouble=trouble or (f"{type(error).__name__}: {error}" if error else ""),
            dropped_tokens=before - history_tokens,
        )
        rest = without_end(self._loaded.tokenizer, answered.token_ids[known:])
        return WindowedTurn(turn, answer_ids, _state(conversation, rest))


class EngineInMemory:
    """Answers without the daemon: cuts and turns the KV that it has kept in this process."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._history = HistoryInMemory(Rope.from_model(loaded.model))
        self._token_ids: list[int] = []
        self._unread: list[int] = []

    def cache(self) -> DynamicCache:
        """All that is left of the conversation, as the model goes on with it."""
        return self._history.cache()

    def answer(self, messages: Sequence[Message], *, window: int) -> InMemory:
        """Answer the last message, and measure how long the first token takes with all that is left computed again."""
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
    """What stays of a history, so that the new tokens and an answer fit in the window behind it."""
    return keep_on_overflow(history_tokens, window=window, new_tokens=new_tokens + ANSWER_TOKENS_MAX)


def new_token_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of the last message, with what the chat's form puts before and behind it.

    The answer before it is left out: its tokens are known, and as text it may be cut into others.
    """
    said = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    text = _in_form(tokenizer, messages)
    if said:
        opening = _in_form(tokenizer, messages[: said[-1]]) + messages[said[-1]]["content"]
        if not text.startswith(opening):
            raise ValueError("the model's chat template writes earlier messages in another way once others follow")
        text = text[len(opening) :]
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def without_end(tokenizer: Any, token_ids: list[int]) -> list[int]:
    """Tokens of an answer that the model has not read yet, without the one that ends it: the chat's form has that."""
    return token_ids[:-1] if token_ids and token_ids[-1] == tokenizer.eos_token_id else token_ids


def _in_form(tokenizer: Any, messages: Sequence[Message]) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


def _state(conversation: Conversation, unread: list[int]) -> str:
    return base64.b64encode(pickle.dumps((conversation, unread))).decode()


def _known(state: str) -> tuple[Conversation, list[int]]:
    """From the demo's own other process only: it is unpickled."""
    known: tuple[Conversation, list[int]] = pickle.loads(base64.b64decode(state))
    return known
