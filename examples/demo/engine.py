"""The engine of the demo: it answers one turn at a time, and keeps no KV between turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from examples.demo.generation import Generated, generate, kept_in, message_ids, new_token_ids, without_end
from examples.demo.in_memory import EngineInMemory
from examples.demo.report import Turn
from examples.demo.script import BLOCK_TOKENS, Message, assistant
from examples.models import LoadedModel
from kvservice_adapter.connectors.transformers import Restored, TransformersConnector
from kvservice_adapter.engine.request_report import transport_of
from kvservice_adapter.rates import Rates
from kvservice_adapter.session import Conversation
from kvservice_adapter.truncation import kept_tokens
from kvservice_api.image import block_geometry
from kvservice_api.layout import Shard
from kvservice_client import Client

State = tuple[Conversation, list[int]]  # A conversation, and the tokens of the last answer that the model has not read.


class OnlyLoads(Rates):
    """Ignores the measured prefill times, so that the connector loads all stored KV.

    Otherwise the connector may recompute the tokens after a cut. Their KV then differs, because it is
    computed without the tokens that were cut.
    """

    def observe_prefill(self, new_tokens: int, context_tokens: int, seconds: float) -> None:
        pass


class _Answered(NamedTuple):
    history: Restored
    output: Generated
    transport: str


class Engine:
    def __init__(
        self, client: Client, loaded: LoadedModel, *, block_tokens: int = BLOCK_TOKENS, wait_s: float | None = None
    ) -> None:
        """With `wait_s` it loads all stored KV, even if computing is faster, and waits this long per call."""
        patient: dict[str, Any] = {"wait_s": wait_s, "save_wait_s": wait_s, "rates": OnlyLoads()}
        self.connector = TransformersConnector(
            client,
            loaded.model,
            model_id=loaded.model_id,
            model_revision=loaded.model_revision,
            block_tokens=block_tokens,
            **({} if wait_s is None else patient),
        )
        self._client, self._loaded = client, loaded
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._in_memory: EngineInMemory | None = None

    def warm_up(self) -> tuple[str, int, int]:
        """Run the one-time initialisation of the libraries, so that no turn includes it.

        Returns the model's name, the bytes of one block in a tier, and the tokens that the model takes (0: unknown).
        """
        self._model.generate(torch.arange(1, 65)[None], max_new_tokens=2)
        layout = self.connector.layout
        block_bytes = block_geometry(layout, Shard.whole(layout), layout.block_tokens).image_bytes
        return self._loaded.model_id, block_bytes, getattr(self._model.config, "max_position_embeddings", 0)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return len(self._ids(messages, to_answer=False))

    def recompute(self, messages: Sequence[Message]) -> tuple[list[int], float]:
        """The tokens of an answer for which no KV is reused, and the seconds to the first of them."""
        began_s = time.perf_counter()
        prompt = self._ids(messages, to_answer=True)
        output = generate(self._model, torch.tensor([prompt]), None, began_s)
        return output.token_ids[len(prompt) :], output.ttft_s

    def answer(self, messages: Sequence[Message], session_id: str) -> Turn:
        """Answer the last message."""
        began_s = time.perf_counter()
        prompt = self._ids(messages, to_answer=True)
        answered = self._answer(prompt, began_s, session_id=session_id)
        answer = self._text(answered.output.token_ids[len(prompt) :])
        # Save the tokens with which the next turn's prompt begins. The cache differs from them: the model never read
        # the answer's last tokens, and the tokenizer may split the answer into other tokens than the model chose.
        cache = answered.history.cache
        history = self._ids([*messages, assistant(answer)], to_answer=False)
        known = min(_common(history, answered.output.token_ids), cache.get_seq_length())
        cache.crop(known - cache.get_seq_length())
        if known < len(history):
            with torch.inference_mode():
                self._model(torch.tensor([history[known:]]), past_key_values=cache, logits_to_keep=1)
        saved = self.connector.save(history, cache, session_id=session_id)
        has_history = any(message["role"] == "assistant" for message in messages)
        history_tokens = _common(self._ids(messages[:-1], to_answer=False), prompt) if has_history else 0
        return self._turn(answered, len(prompt), history_tokens, saved.error)

    def answer_in_window(self, messages: Sequence[Message], window: int, state: State) -> tuple[Turn, State]:
        """Answer the last message in a window that the conversation may overflow.

        `state` is what the last turn returned; at the first turn a new conversation and no tokens.
        """
        began_s = time.perf_counter()
        conversation, unread = state
        new = unread + new_token_ids(self._tokenizer, messages)
        before = conversation.token_count
        keep = kept_in(window, before, len(new))
        is_cut = len(kept_tokens(keep)) == before or self.connector.truncate(conversation, keep)
        history_tokens = conversation.token_count
        prompt = [*conversation.token_ids.tolist(), *new]
        answered = self._answer(prompt, began_s, conversation=conversation)
        token_ids, cache = answered.output.token_ids, answered.history.cache
        known = cache.get_seq_length()
        saved = self.connector.save(token_ids[:known], cache, conversation=conversation)
        error = saved.error if is_cut else RuntimeError("the daemon did not record the cut")
        turn = self._turn(answered, len(prompt), history_tokens, error, before - history_tokens)
        return turn, (conversation, without_end(self._tokenizer, token_ids[known:]))

    def answer_in_memory(self, messages: Sequence[Message], window: int) -> tuple[list[int], float]:
        """The same without the daemon: `EngineInMemory.answer`. Call it from the first turn on."""
        self._in_memory = self._in_memory or EngineInMemory(self._loaded)
        return self._in_memory.answer(messages, window)

    def _answer(self, prompt: list[int], began_s: float, **restored_by: Any) -> _Answered:
        loaded_before = dict(self._client.stats().loaded_bytes)
        history = self.connector.restore(prompt, **restored_by)
        output = generate(self._model, torch.tensor([prompt]), history.cache, began_s)
        return _Answered(history, output, transport_of(loaded_before, self._client.stats().loaded_bytes))

    def _turn(
        self,
        answered: _Answered,
        prompt_tokens: int,
        history_tokens: int,
        save_error: BaseException | None,
        dropped_tokens: int = 0,
    ) -> Turn:
        history, answer_ids = answered.history, answered.output.token_ids[prompt_tokens:]
        error = history.error or save_error
        return Turn(
            answer=self._text(answer_ids),
            answer_ids=answer_ids,
            history_tokens=history_tokens,
            new_tokens=prompt_tokens - history_tokens,
            answer_tokens=len(answer_ids),
            reused_tokens=history.loaded_tokens,
            tier=history.tier,
            transport=answered.transport or "none",
            bytes=history.size_bytes if history.loaded_tokens else 0,
            ttft_reuse_s=answered.output.ttft_s,
            problem=f"{type(error).__name__}: {error}" if error else "",
            dropped_tokens=dropped_tokens,
        )

    def _ids(self, messages: Sequence[Message], *, to_answer: bool) -> list[int]:
        return message_ids(self._tokenizer, messages, to_answer=to_answer)

    def _text(self, answer_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(answer_ids, skip_special_tokens=True)
        return text.strip()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of leading tokens that two sequences share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
