"""Conversations that overflow their window: the rest is reused at its new positions, and the next turn continues."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_adapter.connectors.transformers.cache import whole_cache
from kvservice_adapter.rope import ModelRopes
from kvservice_adapter.session import Conversation
from kvservice_adapter.truncation import keep_on_overflow, keep_without
from kvservice_api.errors import InvalidRequest
from kvservice_client import Client
from tests.daemon import DaemonProcess, until
from tests.unit.connector_models import BLOCK_TOKENS, connector, prompt, states, tiny_llama

_WINDOW, _NEW, _ANSWER = 64, 9, 5
_GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
_TURNS = [prompt(_NEW + 100 * turn)[:, :_NEW] for turn in range(14)]


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def minded() -> Any:
    """A model whose answers depend on where its keys are: its weights are larger than those of a new one."""
    return tiny_llama(initializer_range=0.3)


def overflow(token_count: int, **options: Any) -> list[tuple[int, int]]:
    return keep_on_overflow(token_count, window=_WINDOW, new_tokens=_NEW + _ANSWER + 1, **options)


def answered(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The prompt with its answer."""
    asked = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=_ANSWER, **_GREEDY
    )
    assert isinstance(asked, torch.Tensor)
    return asked


def local_and_global() -> Any:
    """Layers of two kinds with different rotary bases; some have a window that is shorter than the history."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=10,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    model: Any = Gemma3ForCausalLM(config)
    return model.eval()


def cut(cache: DynamicCache, keep: list[tuple[int, int]], ropes: ModelRopes) -> None:
    """The truncation in memory: keys are rotated to their new positions."""
    at = np.concatenate([np.arange(first, first + count) for first, count in keep])
    rotations = ropes.rotations(at, np.arange(len(at)))
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        layer.keys, layer.values = (part[:, :, torch.from_numpy(at)].clone() for part in (layer.keys, layer.values))
        if rotations is not None:
            rotations[index].apply(layer.keys)


def in_memory(model: Any, **options: Any) -> list[list[int]]:
    """Every answer of the conversation, computed with one cache that is never stored."""
    cache, ropes, said = whole_cache(model.config), ModelRopes.from_model(model), torch.empty(1, 0, dtype=torch.long)
    answers = []
    for new in _TURNS:
        keep = overflow(cache.get_seq_length(), **options)
        if keep != [(0, cache.get_seq_length())] and cache.get_seq_length():
            cut(cache, keep, ropes)
            left = torch.cat([said[:, first : first + count] for first, count in keep], 1)
            said = torch.cat([left, said[:, -1:]], 1)  # The answer's last token was never computed.
        output = answered(model, torch.cat([said, new], 1), cache)
        answers.append(output[0, -_ANSWER:].tolist())
        said = output
    return answers


def stored(
    subject: TransformersConnector,
    model: Any,
    conversation: Conversation,
    on_turn: Callable[[int], Any] = int,
    **options: Any,
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The same with a new cache each turn. Returns the answers, and per turn the history's and the reused tokens."""
    answers, reused = [], []
    last = torch.empty(1, 0, dtype=torch.long)
    for turn, new in enumerate(_TURNS):
        on_turn(turn)
        keep = overflow(conversation.token_count, **options)
        if conversation.token_count and keep != [(0, conversation.token_count)]:
            subject.truncate(conversation, keep)
        before = torch.from_numpy(conversation.token_ids.astype(np.int64))[None]
        ids = torch.cat([before, last, new], 1)
        history = subject.restore(ids, conversation=conversation)
        reused.append((before.shape[1], history.tokens))
        output = answered(model, ids, history.cache)
        saved = subject.save(output, history.cache, conversation=conversation, wait_s=30.0)
        assert (saved.refused, saved.error) == (0, None)
        answers.append(output[0, -_ANSWER:].tolist())
        last = output[:, -1:]
    return answers, reused


@pytest.mark.parametrize("options", [{}, {"sink_tokens": 0}, {"block_tokens": BLOCK_TOKENS}, {"ratio": 0.3}], ids=str)
def test_a_conversation_that_overflows_several_times_answers_as_if_it_had_been_cut_in_memory(
    client: Client, options: dict[str, Any]
) -> None:
    model = minded()
    conversation = Conversation(f"overflows-{'-'.join(options)}")
    subject = connector(client, model, model_revision=str(options))

    answers, reused = stored(subject, model, conversation, **options)

    assert answers == in_memory(model, **options)
    assert len(conversation.cuts) >= 3
    assert all(found == there for there, found in reused), reused


def test_keys_of_each_kind_of_layer_are_turned_by_the_rotation_of_that_kind(client: Client) -> None:
    model, conversation = local_and_global(), Conversation("local-and-global")
    subject = connector(client, model, model_revision="local and global")

    answers, reused = stored(subject, model, conversation)

    assert answers == in_memory(model)
    assert len(conversation.cuts) >= 3
    assert all(found == there for there, found in reused), reused


def test_after_a_cut_the_keys_of_each_kind_of_layer_are_those_of_the_rotation_of_that_kind(client: Client) -> None:
    model, ids, keep = local_and_global(), prompt(40), [(0, 4), (17, 13)]
    subject, conversation = connector(client, model, model_revision="keys of both kinds"), Conversation("both-kinds")
    first, plain = subject.restore(ids[:, :30], conversation=conversation).cache, whole_cache(model.config)
    with torch.inference_mode():
        for cache in (first, plain):
            model(ids[:, :30], past_key_values=cache)
    cut(plain, keep, ModelRopes.from_model(model))
    subject.save(ids[:, :30], first, conversation=conversation, wait_s=30.0)
    assert subject.truncate(conversation, keep)

    again = subject.restore(np.append(conversation.token_ids, ids[0, 30:]), conversation=conversation)

    assert again.tokens == again.loaded_tokens == 17
    for (keys, values), (keys_again, values_again) in zip(states(plain), states(again.cache), strict=True):
        assert torch.equal(keys, keys_again)
        assert torch.equal(values, values_again)
    assert again.error is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_not_moved_by_a_cut_comes_back_bit_for_bit(client: Client, dtype: torch.dtype) -> None:
    model, ids = tiny_llama(dtype), prompt(40)
    subject, conversation = connector(client, model, model_revision=f"bits {dtype}"), Conversation(f"bits-{dtype}")
    first = subject.restore(ids[:, :30], conversation=conversation).cache
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=first)
    subject.save(ids[:, :30], first, conversation=conversation, wait_s=30.0)
    assert subject.truncate(conversation, [(0, 17), (20, 10)])

    again = subject.restore(torch.cat([ids[:, :17], ids[:, 20:]], 1), conversation=conversation)

    assert again.tokens == 27
    for (keys, values), (keys_again, values_again) in zip(states(first), states(again.cache), strict=True):
        assert torch.equal(keys[:, :, :17], keys_again[:, :, :17])
        assert torch.equal(torch.cat([values[:, :, :17], values[:, :, 20:30]], 2), values_again)
        assert not torch.equal(keys[:, :, 20:30], keys_again[:, :, 17:])


def test_a_list_of_tokens_to_discard_is_a_cut_like_another(client: Client) -> None:
    model, ids = tiny_llama(), prompt(40)
    subject, conversation = connector(client, model, model_revision="discard"), Conversation("discard")
    cache = subject.restore(ids[:, :30], conversation=conversation).cache
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache)
    subject.save(ids[:, :30], cache, conversation=conversation, wait_s=30.0)
    keep = keep_without(30, [3, 9, 10, 11, 25])
    plain = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=plain)
        cut(plain, keep, ModelRopes.from_model(model))

    assert subject.truncate(conversation, keep)
    again = subject.restore(np.append(conversation.token_ids, ids[0, 30:]), conversation=conversation)

    assert again.tokens == 25 == plain.get_seq_length()
    with torch.inference_mode():
        logits = [model(ids[:, 30:], past_key_values=each).logits for each in (plain, again.cache)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


def test_after_a_restart_of_daemon_and_engine_a_cut_conversation_continues(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon, model = new_daemon(), minded()
    conversation = Conversation("restarted")
    with daemon.client() as client:
        subject = connector(client, model)

        def on_turn(turn: int) -> None:
            if turn == 9:
                subject.flush()
                daemon.kill()
                daemon.start()
                until(lambda: subject.restore(prompt(5)).error is None)

        answers, reused = stored(subject, model, conversation, on_turn)
    assert answers == in_memory(model)
    assert all(found == there for there, found in reused), reused

    same = pickle.loads(pickle.dumps(conversation))
    with daemon.client() as client:
        ids = np.append(same.token_ids, [1, 2, 3])
        assert connector(client, model).restore(ids, conversation=same).tokens == conversation.token_count


def test_a_history_that_is_not_its_sessions_is_a_miss_and_the_session_starts_again(client: Client) -> None:
    model, ids = tiny_llama(), prompt(40)
    subject, conversation = connector(client, model, model_revision="restarted"), Conversation("restarted")

    def save(until_token: int) -> None:
        given = np.append(conversation.token_ids, ids[0, conversation.token_count : until_token])
        cache = subject.restore(given, conversation=conversation).cache
        with torch.inference_mode():
            model(torch.from_numpy(given.astype(np.int64))[None, cache.get_seq_length() :], past_key_values=cache)
        assert subject.save(given, cache, conversation=conversation, wait_s=30.0).error is None

    save(30)
    assert subject.truncate(conversation, [(0, 4), (16, 14)])
    other = conversation.copy()  # As after a second cut by another engine.
    assert subject.truncate(other, [(0, 10)])

    left = conversation.token_ids
    missed = subject.restore(np.append(left, [5, 6]), conversation=conversation)

    assert (missed.tokens, missed.error) == (0, None)
    assert (conversation.token_count, conversation.cuts) == (0, ())
    with torch.inference_mode():
        model(torch.from_numpy(np.append(left, [5, 6]).astype(np.int64))[None], past_key_values=missed.cache)
    assert subject.save(np.append(left, [5, 6]), missed.cache, conversation=conversation, wait_s=30.0).error is None
    state = client.session(subject.layout, "restarted").get()
    assert (state.cuts, state.token_count) == (0, len(left) + 2)
    assert subject.restore(np.append(left, [5, 6, 7]), conversation=conversation).tokens == len(left) + 2


def test_keys_that_are_stored_unrotated_answer_alike(client: Client) -> None:
    model, conversation = minded(), Conversation("unrotated")
    subject = connector(client, model, model_revision="unrotated", rotated=False)

    answers, reused = stored(subject, model, conversation)

    assert answers == in_memory(model)
    assert len(conversation.cuts) >= 3
    assert all(found == there for there, found in reused), reused


def test_a_cut_history_that_does_not_come_is_computed_as_it_was(daemon: DaemonProcess) -> None:
    model = tiny_llama()
    conversation = Conversation("late")
    with daemon.client() as client, daemon.client(throttle_bytes_per_s=200.0) as slow_client:
        subject = connector(client, model, model_revision="late")
        late = connector(slow_client, model, model_revision="late")
        stored(subject, model, conversation)
        assert len(conversation.cuts) >= 3
        ids = torch.from_numpy(np.append(conversation.token_ids, [1, 2, 3]).astype(np.int64))[None]

        there = subject.restore(ids, conversation=conversation)
        absent = late.restore(ids, conversation=conversation)
        new = ids[:, there.tokens :]
        with torch.inference_mode():
            logits = [model(new, past_key_values=each.cache).logits for each in (there, absent)]

        assert there.tokens == absent.tokens == conversation.token_count
        assert there.error is None and absent.error is not None
        assert (logits[0] - logits[1]).abs().max() <= 1e-4


def test_a_history_is_another_one_if_other_tokens_were_dropped_from_it(client: Client) -> None:
    model, ids = tiny_llama(), prompt(40)
    subject, conversation = connector(client, model, model_revision="dropped"), Conversation("dropped")
    cache = subject.restore(ids[:, :30], conversation=conversation).cache
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache)
    assert subject.save(ids[:, :30], cache, conversation=conversation, wait_s=30.0).error is None
    keep = [(0, 4), (16, 14)]
    assert subject.truncate(conversation, keep)
    dropped = ids[0, :30].clone()
    dropped[7] += 1
    other = Conversation("dropped")
    other.extend(dropped.numpy())
    other.truncate(keep)
    assert np.array_equal(other.token_ids, conversation.token_ids)

    prompt_ids = np.append(conversation.token_ids, [1, 2])
    assert subject.restore(prompt_ids, conversation=other).tokens == 0
    assert subject.restore(prompt_ids, conversation=conversation).tokens == 18


def test_a_history_that_was_cut_is_never_saved_as_a_prompts(client: Client) -> None:
    model, ids = tiny_llama(), prompt(40)
    subject, conversation = connector(client, model, model_revision="never"), Conversation("never")
    cache = subject.restore(ids[:, :30], conversation=conversation).cache
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache)
    subject.save(ids[:, :30], cache, conversation=conversation, wait_s=30.0)
    subject.truncate(conversation, [(0, 4), (16, 14)])
    given = np.append(conversation.token_ids, ids[0, 30:])
    cache = subject.restore(given, conversation=conversation).cache
    with torch.inference_mode():
        model(ids[:, 30:], past_key_values=cache)
    assert subject.flush()
    stored_before = sum(1 for _ in client.admin.list_blocks(layout_fingerprint=subject.layout.fingerprint))

    for way in ({}, {"session_id": "another"}, {"conversation": Conversation("another")}):
        with pytest.raises(InvalidRequest, match="cut"):
            subject.save(given, cache, wait_s=30.0, **way)
    assert stored_before == sum(1 for _ in client.admin.list_blocks(layout_fingerprint=subject.layout.fingerprint))
    assert subject.restore(given).tokens == 4, "the sinks are the beginning of the first block"
