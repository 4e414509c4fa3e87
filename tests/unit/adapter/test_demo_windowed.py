"""The demo's conversations in a window: the history in memory, and the new tokens of each turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from examples.demo.generation import kept_in, new_token_ids, without_end
from examples.demo.in_memory import HistoryInMemory
from kvservice_adapter.rope import Rope
from kvservice_adapter.truncation import kept_tokens
from tests.unit.rotary_models import RecordedKeys, computed, logits_after, rotary_model, states, tokens_of


class Letters:
    """A tokenizer of letters, with a chat form in angle brackets."""

    eos_token_id = ord(">")

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        return "".join(f"<{each['role'][0]}:{each['content']}>" for each in messages) + "<a:" * add_generation_prompt

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return type("Ids", (), {"input_ids": [ord(letter) for letter in text]})


def spoken(*contents: str) -> list[dict[str, str]]:
    roles = ["system", *["user", "assistant"] * len(contents)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_what_is_new_is_the_last_message_in_the_chats_form() -> None:
    """Without the answer before it, whose tokens are known already."""
    assert text_of(new_token_ids(Letters(), spoken("Be kind", "Hi"))) == "<s:Be kind><u:Hi><a:"
    assert text_of(new_token_ids(Letters(), spoken("Be kind", "Hi", "Hello", "Why"))) == "><u:Why><a:"


def test_the_token_that_ends_an_answer_is_not_said_twice() -> None:
    assert without_end(Letters(), [ord("a"), ord(">")]) == [ord("a")]
    assert without_end(Letters(), [ord("a")]) == [ord("a")]
    assert without_end(Letters(), []) == []


def test_a_template_that_rewrites_earlier_messages_is_refused() -> None:
    class Trimming(Letters):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return super().apply_chat_template(messages[-2:], **options)

    with pytest.raises(ValueError, match="changes earlier messages when later ones follow"):
        new_token_ids(Trimming(), spoken("Be kind", "Hi", "Hello", "Why"))


@pytest.mark.parametrize("name", ["llama", "cohere, interleaved", "llama, yarn"])
def test_a_history_in_memory_is_the_freshly_rotated_one_after_several_cuts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rotary_model(name)
    history = HistoryInMemory(Rope.from_model(model))
    recorded = RecordedKeys(model, monkeypatch)
    unrotated = [torch.empty(1, 2, 0, 16) for _ in range(3)]
    for turn in range(4):
        keep = kept_in(100, history.token_count, 25)
        history.cut(keep)
        kept = kept_tokens(keep)
        unrotated = [each[:, :, torch.from_numpy(kept)] for each in unrotated]
        cache = history.cache()
        recorded.unrotated.clear()
        logits_after(model, cache, tokens_of(25, seed=turn))
        unrotated = [torch.cat([old, new], 2) for old, new in zip(unrotated, recorded.unrotated, strict=True)]
        history.extend(cache)

    assert history.token_count < 100
    recorded.unrotated[:] = unrotated
    places = np.arange(history.token_count)
    for layer, (keys, _) in enumerate(states(history.cache())):
        assert torch.allclose(keys, recorded.rotated_at(layer, places, range(len(places))), atol=1e-5)


def test_an_uncut_history_in_memory_has_every_bit() -> None:
    model = rotary_model("llama", torch.bfloat16)
    history = HistoryInMemory(Rope.from_model(model))
    cache = computed(model, tokens_of(30))

    history.extend(cache)

    for ours, theirs in zip(states(history.cache()), states(cache), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert states(DynamicCache()) == []
