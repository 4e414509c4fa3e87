"""The transformers connector restores the saved KV bit for bit, and refuses models whose KV it cannot restore."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from kvservice_adapter.connectors.transformers import TransformersConnector, UnsupportedModel, layout_of
from kvservice_api.errors import DaemonUnavailable, InvalidLayout, InvalidRequest
from kvservice_client import Layout, Rotary
from tests.unit.connector_models import BLOCK_TOKENS, KeptBlocks, computed, connector, prompt, states, tiny_llama


@pytest.fixture
def kept() -> KeptBlocks:
    return KeptBlocks()


def layout_for(model: Any) -> Layout:
    return layout_of(model, model_id="tiny", model_revision="1", block_tokens=BLOCK_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_a_restored_cache_is_the_saved_one_bit_for_bit(kept: KeptBlocks, dtype: torch.dtype, kv_heads: int) -> None:
    model = tiny_llama(dtype, num_key_value_heads=kv_heads)
    tokens = prompt(3 * BLOCK_TOKENS + 1)
    cache = computed(model, tokens)

    saved = connector(kept, model).save(tokens, cache)
    restored = connector(kept, model).restore(tokens)

    assert (saved.stored, saved.refused, restored.tokens) == (4, 0, 3 * BLOCK_TOKENS)
    for before, after in zip(states(cache), states(restored.cache), strict=True):
        assert torch.equal(before[0][:, :, : restored.tokens], after[0])
        assert torch.equal(before[1][:, :, : restored.tokens], after[1])


def test_a_slice_is_keys_then_values_and_in_each_head_token_dim(kept: KeptBlocks) -> None:
    model = tiny_llama()
    tokens = prompt(2 * BLOCK_TOKENS)
    cache = computed(model, tokens)

    connector(kept, model).save(tokens, cache)

    for block, layers in enumerate(kept.stored.values()):
        part = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
        for (keys, values), data in zip(states(cache), layers, strict=True):
            assert data == torch.stack([keys[0, :, part], values[0, :, part]]).numpy().tobytes()


@pytest.mark.parametrize("token_count", [1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 5 * BLOCK_TOKENS - 1])
def test_all_tokens_are_kept_and_one_is_always_left_to_compute(kept: KeptBlocks, token_count: int) -> None:
    model, tokens = tiny_llama(), prompt(token_count)

    saved = connector(kept, model).save(tokens, computed(model, tokens))
    restored = connector(kept, model).restore(tokens)

    assert saved.stored == -(-token_count // BLOCK_TOKENS)
    assert restored.tokens == token_count - 1 == restored.cache.get_seq_length()


def test_tokens_that_the_cache_does_not_hold_yet_are_not_saved(kept: KeptBlocks) -> None:
    model, tokens = tiny_llama(), prompt(2 * BLOCK_TOKENS)

    assert connector(kept, model).save(tokens, computed(model, tokens[:, :-1])).stored == 2
    assert connector(kept, model).restore(torch.cat([tokens, tokens], 1)).tokens == 2 * BLOCK_TOKENS - 1


def test_only_blocks_that_are_not_stored_yet_are_sent(kept: KeptBlocks) -> None:
    model, tokens = tiny_llama(), prompt(5 * BLOCK_TOKENS)
    subject = connector(kept, model)
    subject.save(tokens[:, : 2 * BLOCK_TOKENS], computed(model, tokens[:, : 2 * BLOCK_TOKENS]))

    cache = computed(model, tokens)
    later = subject.save(tokens, cache)
    again = subject.save(tokens, cache)

    assert (later.stored, later.already_stored) == (3, 2)
    assert (again.stored, again.already_stored) == (0, 5)
    assert kept.saves == [2, 3]


def test_generate_continues_from_a_restored_cache_with_the_same_answer(kept: KeptBlocks) -> None:
    model, tokens = tiny_llama(), prompt(30)
    ask = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    answer = model.generate(tokens, **ask)
    subject = connector(kept, model)
    subject.save(tokens, computed(model, tokens))

    restored = subject.restore(tokens)
    assert restored.tokens == 29
    assert torch.equal(model.generate(tokens, past_key_values=restored.cache, **ask), answer)
    stored = subject.save(answer, restored.cache).stored
    assert stored == -(-41 // BLOCK_TOKENS) - 7, "the last token was never an input"


def test_lists_arrays_and_tensors_of_token_ids_mean_the_same(kept: KeptBlocks) -> None:
    model, tokens = tiny_llama(), prompt(9)
    subject = connector(kept, model)
    subject.save(tokens[0].tolist(), computed(model, tokens))

    for same in (tokens, tokens[0], tokens.numpy(), tokens[0].tolist()):
        assert subject.restore(same).tokens == 8


def test_what_is_no_token_id_is_refused(kept: KeptBlocks) -> None:
    with pytest.raises(InvalidRequest):
        connector(kept, tiny_llama()).restore([1, 2, 3, 4, -5, 6])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("client", "127.0.0.1:7070"),
        ("model_id", 5),
        ("model_revision", None),
        ("lora_id", 5),
        ("salt", "x"),
        ("wait_s", -1.0),
        ("save_wait_s", None),
        ("staging_bytes", "1"),
        ("rates", 5),
        ("device", "cpu"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named_when_the_connector_is_made(
    kept: KeptBlocks, argument: str, value: Any
) -> None:
    arguments: dict[str, Any] = {"client": kept, "model_id": "m", "model_revision": "1", argument: value}
    with pytest.raises((InvalidRequest, InvalidLayout), match=argument):
        TransformersConnector(arguments.pop("client"), tiny_llama(), **arguments)


def test_another_salt_adapter_or_revision_finds_nothing(kept: KeptBlocks) -> None:
    model, tokens = tiny_llama(), prompt(9)
    connector(kept, model).save(tokens, computed(model, tokens))

    assert connector(kept, model).restore(tokens).tokens == 8
    for other in ({"salt": b"tenant"}, {"lora_id": "adapter"}, {"model_revision": "2"}):
        assert connector(kept, model, **other).restore(tokens).tokens == 0


def test_without_a_daemon_everything_is_computed_and_nothing_raises(kept: KeptBlocks) -> None:
    model, tokens = tiny_llama(), prompt(9)
    kept.failing = DaemonUnavailable("away")

    restored = connector(kept, model).restore(tokens)
    saved = connector(kept, model).save(tokens, computed(model, tokens))

    assert (restored.tokens, restored.tier, restored.error) == (0, "none", kept.failing)
    assert restored.cache.get_seq_length() == 0
    assert (saved.stored, saved.refused, saved.error) == (0, 3, kept.failing)


def test_a_batch_is_refused(kept: KeptBlocks) -> None:
    model, batch = tiny_llama(), prompt(9).repeat(2, 1)
    subject = connector(kept, model)

    with pytest.raises(UnsupportedModel, match="batch of 2"):
        subject.restore(batch)
    with pytest.raises(UnsupportedModel, match="one sequence"):
        subject.save(batch[0], computed(model, batch))


def test_caches_of_another_kind_or_type_are_refused(kept: KeptBlocks) -> None:
    model, tokens = tiny_llama(), prompt(9)
    subject = connector(kept, model)

    with pytest.raises(UnsupportedModel, match="StaticLayer"):
        subject.save(tokens, StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(UnsupportedModel, match="layer 0 of the cache is empty"):
        subject.save(tokens, DynamicCache(config=model.config))
    with pytest.raises(UnsupportedModel, match="layers"):
        subject.save(tokens, computed(tiny_llama(num_hidden_layers=2), tokens))
    with pytest.raises(UnsupportedModel, match="float16"):
        subject.save(tokens, computed(tiny_llama(torch.float16), tokens))


_TINY: dict[str, Any] = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: tiny_llama(rope_parameters=_LONGROPE), "longrope"),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2)), "tokens"),
    ],
    ids=["rotary encoding that depends on the length", "encoder"],
)
def test_models_whose_blocks_could_not_be_restored_exactly_are_refused(model: Any, why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        layout_for(model())


def test_a_model_with_adapters_is_refused_unless_they_are_named(kept: KeptBlocks) -> None:
    model = tiny_llama()
    model.peft_config = {"default": object()}

    with pytest.raises(UnsupportedModel, match="lora_id"):
        connector(kept, model)
    assert isinstance(connector(kept, model, lora_id="mine"), TransformersConnector)


def test_an_adapter_that_is_loaded_later_is_refused_and_nothing_is_saved_under_the_models_own_keys(
    kept: KeptBlocks,
) -> None:
    model, tokens = tiny_llama(), prompt(9)
    subject, cache = connector(kept, model), computed(model, tokens)
    model.peft_config = {"default": object()}

    for call in (lambda: subject.restore(tokens), lambda: subject.save(tokens, cache)):
        with pytest.raises(UnsupportedModel, match="lora_id"):
            call()
    del model.peft_config
    assert subject.restore(tokens).tokens == 0
    assert subject.save(tokens, cache).stored == 3


def test_the_layout_says_how_keys_were_rotated() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert layout_for(tiny_llama(rope_parameters=scaled)).rotary == Rotary("linear", "half", 8, 5e5, (("factor", 2.0),))
    half_of_it = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    partly = GPTNeoXForCausalLM(GPTNeoXConfig(**_TINY, intermediate_size=32, rope_parameters=half_of_it))
    assert layout_for(partly).rotary.dims == 4
    assert layout_for(CohereForCausalLM(CohereConfig(**_TINY, intermediate_size=32))).rotary.pairing == "interleaved"
    assert layout_for(GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))).rotary == Rotary()


def test_the_layout_says_what_the_cache_holds() -> None:
    layout = layout_for(tiny_llama(torch.bfloat16))

    assert (layout.layers, layout.kv_heads, layout.k_head_dim, layout.v_head_dim) == (3, 2, 8, 8)
    assert (layout.dtype, layout.block_tokens, layout.rotated) == ("bfloat16", BLOCK_TOKENS, True)
    assert layout.fingerprint != layout_for(tiny_llama(torch.float16)).fingerprint
