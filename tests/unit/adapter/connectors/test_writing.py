"""Blocks are saved while the model computes them, and never under a key of other tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from kvservice_adapter.connectors.transformers import UnsupportedModel
from kvservice_adapter.connectors.transformers.forward_saver import Forward
from kvservice_adapter.session import Conversation
from kvservice_api.errors import DaemonUnavailable, InvalidRequest
from tests.unit.connector_models import BLOCK_TOKENS, KeptBlocks, computed, connector, prompt, states, tiny_llama

_ASK: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


@pytest.fixture
def kept() -> KeptBlocks:
    return KeptBlocks()


def tiny_qwen2() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2}
    model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=6, num_key_value_heads=2))
    return model.eval()


def answer(model: Any, ids: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
    output = model.generate(ids, **{"attention_mask": torch.ones_like(ids), "past_key_values": cache, **_ASK, **more})
    assert isinstance(output, torch.Tensor)
    return output


def assert_right(kept: KeptBlocks, model: Any, *prompts: torch.Tensor) -> None:
    """Every stored block equals a new computation of its tokens, up to rounding."""
    checked = 0
    for ids in prompts:
        subject = connector(kept, model)
        restored = subject.restore(ids)
        if restored.tokens:
            expected = states(computed(model, ids[:, : restored.tokens]))
            for (keys, values), (keys_there, values_there) in zip(expected, states(restored.cache), strict=True):
                assert torch.allclose(keys, keys_there, atol=1e-5)
                assert torch.allclose(values, values_there, atol=1e-5)
        checked += -(-restored.tokens // BLOCK_TOKENS)
    assert checked == len(kept.stored), "blocks are stored that none of the prompts has"


def test_whole_blocks_are_stored_before_save_is_called(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)

    output = answer(model, ids, subject.restore(ids).cache)
    assert subject.flush()

    assert len(kept.stored) == 29 // BLOCK_TOKENS
    assert kept.saves == [4, 1, 1, 1], "the prompt's at once, and each block of the answer as it fills"
    assert_right(kept, model, output)


def test_they_count_as_stored_once(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    output = answer(model, ids, cache)

    first, second = subject.save(output, cache), subject.save(output, cache)

    assert (first.stored, first.already_stored, first.refused) == (8, 0, 0)
    assert (second.stored, second.already_stored, second.refused) == (0, 8, 0)


def test_what_was_restored_is_not_saved_again(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    subject.save(ids, computed(model, ids))

    cache = subject.restore(ids).cache
    saved = subject.save(answer(model, ids, cache), cache)

    assert kept.saves == [5, 1, 1, 1, 1]
    assert (saved.stored, saved.already_stored) == (4, 4)


def test_full_staging_drops_saves_and_the_end_of_the_turn_makes_up_for_it(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model, staging_bytes=0)
    cache = subject.restore(ids).cache
    output = answer(model, ids, cache)
    assert subject.flush()
    assert not kept.stored

    assert subject.save(output, cache).stored == 8
    assert_right(kept, model, output)


def test_a_long_prefill_is_sent_in_parts_that_fit_the_staging(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(82)
    subject = connector(kept, model, staging_bytes=16 * 4096)

    with torch.inference_mode():
        model(ids, past_key_values=subject.restore(ids).cache)
    assert subject.flush()

    assert sum(kept.saves) == 20
    assert max(kept.saves) <= 10
    assert_right(kept, model, ids)


def test_a_prefill_in_chunks_is_saved_as_a_whole_one(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)

    output = answer(model, ids, subject.restore(ids).cache, prefill_chunk_size=3)
    assert subject.flush()

    assert torch.equal(output, answer(model, ids))
    assert sum(kept.saves) == len(kept.stored) == 29 // BLOCK_TOKENS
    assert_right(kept, model, output)


def test_tokens_are_those_that_were_computed_though_their_tensors_are_used_again(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(10)
    subject = connector(kept, model)
    given, token, said = ids.clone(), torch.zeros(1, 1, dtype=torch.long), [ids]
    cache = subject.restore(given).cache
    with torch.inference_mode():
        model(given, past_key_values=cache)
        given.zero_()
        for each in range(20, 29):
            token.fill_(each)
            said.append(token.clone())
            model(token, past_key_values=cache)
    assert subject.flush()

    assert len(kept.stored) == 19 // BLOCK_TOKENS
    assert_right(kept, model, torch.cat([*said, token], 1))


def test_tokens_that_were_cropped_are_forgotten(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    first = answer(model, ids, cache)
    cache.crop(21 - cache.get_seq_length())
    other = torch.cat([first[:, :21], (first[:, 21:24] + 1) % 97], 1)

    second = answer(model, other, cache)
    assert subject.flush()

    assert not torch.equal(first[:, :28], second[:, :28])
    longest = torch.cat([second, second[:, :1]], 1)
    assert subject.restore(longest).tokens == second.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS - BLOCK_TOKENS
    stored = len(kept.stored)
    kept_of_first = subject.restore(first).tokens // BLOCK_TOKENS
    assert stored == kept_of_first + subject.restore(longest).tokens // BLOCK_TOKENS - 5, "five are common"
    for each in (first, second):
        expected = states(computed(model, each))
        restored = subject.restore(each)
        for (keys, _), (keys_there, _) in zip(expected, states(restored.cache), strict=True):
            assert torch.allclose(keys[:, :, : restored.tokens], keys_there, atol=1e-5)


def test_a_block_that_is_being_saved_is_not_written_over_by_what_follows_a_crop(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        before = [(keys, values) for keys, values in states(cache)]
        was = [(keys.clone(), values.clone()) for keys, values in before]
        cache.crop(-8)
        model((ids[:, 10:] + 1) % 97, past_key_values=cache)

    for (keys, values), (keys_were, values_were) in zip(before, was, strict=True):
        assert torch.equal(keys, keys_were)
        assert torch.equal(values, values_were)


@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "assign", "reset"])
def test_a_cache_whose_rows_were_moved_is_saved_no_more(kept: KeptBlocks, change: str) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache: Any = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    assert subject.flush()
    {
        "reorder": lambda: cache.reorder_cache(torch.tensor([0])),
        "repeat": lambda: cache.batch_repeat_interleave(2),
        "select": lambda: cache.batch_select_indices(torch.tensor([0])),
        "assign": lambda: setattr(cache.layers[1], "keys", cache.layers[1].keys * 2),
        "reset": cache.reset,
    }[change]()

    with torch.inference_mode():
        model(ids[:, :12].repeat(2 if change == "repeat" else 1, 1), past_key_values=cache)
    assert subject.flush()

    assert cache.saver.stopped
    assert_right(kept, model, ids)


def masked(length: int, *holes: int) -> torch.Tensor:
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, list(holes)] = 0
    return mask


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": masked(18, 7)},
        {"attention_mask": masked(18, 0, 1)},
        {"position_ids": torch.arange(18)[None] + 3},
        {"attention_mask": torch.zeros(1, 1, 18, 18)},
        {"attention_mask": {"full_attention": None}},
    ],
    ids=["a hole", "padding that restore was not told", "other positions", "a mask of its own", "a mask for each kind"],
)
def test_tokens_that_are_masked_or_placed_otherwise_are_not_saved(kept: KeptBlocks, given: dict[str, Any]) -> None:
    model, ids = tiny_qwen2(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache

    with torch.inference_mode():
        model(ids, past_key_values=cache, **given)
    saved = subject.save(ids, cache)

    assert not kept.stored
    assert (saved.stored, saved.refused) == (0, 5)
    assert isinstance(saved.error, InvalidRequest)


def test_states_of_unknown_tokens_are_not_saved_until_they_are_named(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    assert subject.flush()
    assert not kept.stored

    assert subject.save(ids, cache).stored == 5
    assert_right(kept, model, ids)


@pytest.mark.parametrize("embedded", [8, 18], ids=["and named ones follow at other positions", "at other positions"])
def test_states_of_unknown_tokens_that_are_placed_otherwise_are_not_saved(kept: KeptBlocks, embedded: int) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    embeds, positions = model.get_input_embeddings()(ids), torch.arange(18)[None]
    positions[:, 10:] += 3
    with torch.inference_mode():
        model(
            inputs_embeds=embeds[:, :embedded], past_key_values=cache, position_ids=positions[:, :embedded].contiguous()
        )
        if embedded < 18:
            model(ids[:, embedded:], past_key_values=cache, position_ids=positions[:, embedded:])

    assert isinstance(subject.save(ids, cache).error, InvalidRequest)
    assert not kept.stored


def test_tokens_that_were_hidden_while_they_were_unknown_are_stored_as_hidden(kept: KeptBlocks) -> None:
    model, ids, mask = tiny_qwen2(), prompt(18), masked(18, 7)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, past_key_values=cache, attention_mask=mask, position_ids=positions)

    assert subject.save(ids, cache).stored == 5
    assert subject.restore(ids).tokens == 4, "up to the block with the hidden token"
    assert subject.restore(ids, attention_mask=mask).tokens == 17


def test_what_a_model_in_training_mode_computes_is_not_saved(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(attention_dropout=0.5).train(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache

    with torch.inference_mode():
        model(ids, past_key_values=cache)
    saved = subject.save(ids, cache)

    assert not kept.stored
    assert saved.refused == 5 and "training" in str(saved.error)


def test_tokens_that_are_not_those_of_the_cache_are_refused(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    other = ids.clone()
    other[0, 13] += 1

    with pytest.raises(InvalidRequest, match="token 13"):
        subject.save(other, cache)


def test_a_conversation_that_was_cut_takes_no_cache_that_knows_nothing_of_the_cut(kept: KeptBlocks) -> None:
    model, conversation = tiny_llama(), Conversation("chat")
    subject = connector(kept, model)
    conversation.extend(prompt(20)[0])
    conversation.truncate([(0, 2), (12, 8)])
    ids = torch.cat([torch.from_numpy(conversation.token_ids.astype("int64"))[None], prompt(9)], 1)

    with pytest.raises(InvalidRequest, match="cut"):
        subject.save(ids, computed(model, ids), conversation=conversation)

    assert conversation.token_count == 10
    assert not kept.stored


def test_a_forward_that_fails_leaves_nothing_behind(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    fails = model.model.layers[2].register_forward_pre_hook(lambda module, args: 1 / 0)

    with torch.inference_mode(), pytest.raises(ZeroDivisionError):
        model(ids, past_key_values=cache)
    fails.remove()
    assert subject.flush()

    assert not kept.stored


def test_a_forward_that_is_broken_off_is_followed_by_others(kept: KeptBlocks) -> None:
    def break_off(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    breaks = model.model.layers[2].register_forward_pre_hook(break_off)
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    breaks.remove()

    with torch.inference_mode():
        model(ids[:, :1], past_key_values=cache)
    assert subject.flush()

    assert not kept.stored


def test_an_adapter_that_is_loaded_meanwhile_stops_the_saves(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    model.peft_config = {"default": object()}

    answer(model, ids, cache)
    assert subject.flush()

    assert not kept.stored


def test_a_model_that_was_moved_to_another_dtype_is_refused_and_its_caches_are_not_saved(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(torch.bfloat16), prompt(18)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    model.half()

    answer(model, ids, cache)
    with pytest.raises(UnsupportedModel, match="float16"):
        subject.save(ids, cache)
    with pytest.raises(UnsupportedModel, match="float16"):
        subject.restore(ids)

    assert subject.flush()
    assert not kept.stored


def test_states_of_another_dtype_of_the_same_size_are_not_saved(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(torch.bfloat16), prompt(18)
    subject = connector(kept, model)
    cache: Any = subject.restore(ids).cache
    cache.begin(Forward(ids, None, None, None, is_training=False))
    for index in range(model.config.num_hidden_layers):
        states_there = torch.ones(1, 2, 18, 8, dtype=torch.float16)  # As autocast gives them.
        cache.update(states_there, states_there, index)
    cache.end(is_whole=True)

    assert subject.flush()
    assert not kept.stored


def test_a_model_keeps_nothing_of_a_cache_that_is_not_the_connectors(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    plain = DynamicCache(config=model.config)

    answer(model, ids, plain)
    assert subject.flush()

    assert not kept.stored


def test_a_daemon_that_is_away_stops_no_forward(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model)
    kept.failing = DaemonUnavailable("away")
    cache = subject.restore(ids).cache

    assert torch.equal(answer(model, ids, cache), answer(model, ids))

    kept.failing = None
    while subject.restore(ids).error is not None:
        pass  # Until the breaker is open.
    assert subject.save(answer(model, ids), cache).stored == 8


def test_two_connectors_of_one_model_save_their_own_caches_only(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    other = KeptBlocks()
    first, second = connector(kept, model), connector(other, model)

    answer(model, ids, first.restore(ids).cache)
    assert first.flush() and second.flush()

    assert (len(kept.stored), len(other.stored)) == (7, 0)
