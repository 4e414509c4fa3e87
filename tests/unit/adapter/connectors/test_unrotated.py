"""Layouts with `rotated=False`: keys are stored before rotation, and the model's results do not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvservice_adapter.connectors.transformers import UnsupportedModel
from kvservice_adapter.device.base import NotTurned
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.device.rotation import Rotation
from kvservice_api.errors import ChecksumMismatch
from tests.unit.adapter.connectors.test_cache import FailingBlocks, left_padded
from tests.unit.connector_models import BLOCK_TOKENS, KeptBlocks, computed, connector, prompt, states, tiny_llama

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def qwen3() -> Any:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=8))


def cohere() -> Any:
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**_SHAPE, pad_token_id=0))


def yarn() -> Any:
    parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    return tiny_llama(rope_parameters=parameters)


def answer(model: Any, ids: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, **more}
    output = model.generate(ids, past_key_values=cache, **given)
    assert isinstance(output, torch.Tensor)
    return output


@pytest.fixture
def kept() -> FailingBlocks:
    return FailingBlocks()


def test_what_is_stored_are_the_keys_before_rotation(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(2 * BLOCK_TOKENS)
    subject = connector(kept, model, rotated=False)
    assert not subject.layout.rotated
    with torch.inference_mode():
        model(ids, past_key_values=subject.restore(ids).cache)
        first = model.model.layers[0]
        keys = first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(ids)))
    assert subject.flush()

    for block, layers in enumerate(kept.stored.values()):
        part = keys[0, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
        expected = part.view(BLOCK_TOKENS, 2, 8).transpose(0, 1).contiguous().numpy().tobytes()
        assert layers[0][: len(expected)] == expected


@pytest.mark.parametrize(
    "make", [tiny_llama, qwen3, cohere, yarn], ids=["llama", "norms of keys", "side by side", "yarn"]
)
def test_a_history_comes_back_rotated_as_the_model_does_it(kept: FailingBlocks, make: Any) -> None:
    model = make().eval()
    ids = prompt(18)
    subject = connector(kept, model, rotated=False)
    cache = subject.restore(ids).cache
    output = answer(model, ids, cache)
    assert torch.equal(output, answer(model, ids))
    assert subject.save(output, cache).stored == -(-25 // BLOCK_TOKENS)

    longer = torch.cat([output, prompt(6)], 1)
    for kept.fails_after in (None, 1):
        kept.error = ChecksumMismatch("damaged")
        again = subject.restore(longer)
        assert again.tokens >= 25
        assert torch.equal(answer(model, longer, again.cache), answer(model, longer))
        for (keys, _), (keys_there, _) in zip(states(computed(model, longer)), states(again.cache), strict=True):
            assert torch.allclose(keys, keys_there[:, :, : longer.shape[1]], atol=1e-5)


class FailingDevice(CpuDevice):
    """Turns no keys that are computed."""

    def __init__(self) -> None:
        self.rotations: list[Rotation] = []

    def rotate(self, keys: torch.Tensor, rotation: Rotation) -> None:
        self.rotations.append(rotation)
        raise NotTurned("out of memory")


def test_keys_of_a_history_that_is_computed_again_are_turned_where_the_device_fails_by_one_rotation_for_all_layers(
    kept: FailingBlocks,
) -> None:
    model, ids, device = tiny_llama(), prompt(18), FailingDevice()
    subject = connector(kept, model, rotated=False, device=device)
    cache = subject.restore(ids).cache
    output = answer(model, ids, cache)
    subject.save(output, cache)
    kept.fails_after, kept.error = 0, ChecksumMismatch("damaged")
    longer = torch.cat([output, prompt(6)], 1)

    again = subject.restore(longer)

    assert torch.equal(answer(model, longer, again.cache), answer(model, longer))
    assert len(device.rotations) > 1
    assert len(set(device.rotations)) == 1


def test_keys_come_back_in_fp32_as_the_model_has_rotated_them(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(30)
    subject = connector(kept, model, rotated=False)
    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    subject.save(ids, cache)

    for (keys, values), (keys_there, values_there) in zip(
        states(cache), states(subject.restore(ids).cache), strict=True
    ):
        assert torch.allclose(keys[:, :, :29], keys_there, atol=1e-6, rtol=0)
        assert torch.equal(values[:, :, :29], values_there)


def test_several_conversations_in_a_batch(kept: FailingBlocks) -> None:
    model = tiny_llama()
    subject = connector(kept, model, rotated=False)
    prompts = prompt(26), prompt(17)
    for each in prompts:
        cache = subject.restore(each).cache
        with torch.inference_mode():
            model(each, past_key_values=cache)
        assert subject.save(each, cache).error is None
    ids, mask = left_padded(*prompts)

    for kept.fails_after in (None, 1):
        history = subject.restore(ids, attention_mask=mask)
        assert history.cache.get_seq_length() == 25
        expected = answer(model, ids, attention_mask=mask)
        assert torch.equal(answer(model, ids, history.cache, attention_mask=mask), expected)


def test_after_a_crop_the_keys_are_still_those_of_their_tokens(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model, rotated=False)
    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        cache.crop(-7)
        other = torch.cat([ids[:, :11], prompt(9)], 1)
        model(other[:, 11:], past_key_values=cache)
    assert subject.save(other, cache).error is None

    again = subject.restore(other)
    assert again.tokens == 19
    for (keys, _), (keys_there, _) in zip(states(computed(model, other)), states(again.cache), strict=True):
        assert torch.allclose(keys[:, :, :19], keys_there, atol=1e-5)


def test_caches_of_others_and_rows_that_were_moved_are_refused(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model, rotated=False)
    with pytest.raises(UnsupportedModel, match="before they were rotated"):
        subject.save(ids, computed(model, ids))

    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(UnsupportedModel, match="before they were rotated"):
        subject.save(ids, cache)


def test_no_keys_are_left_behind_for_a_forward_that_was_broken_off(kept: FailingBlocks) -> None:
    def break_off(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model, rotated=False)
    broken: Any = subject.restore(ids).cache
    breaks = model.model.layers[2].register_forward_pre_hook(break_off)
    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=broken)
    breaks.remove()
    broken.captured.clear()

    answer(model, ids, subject.restore(ids).cache)
    answer(model, ids)

    assert not broken.captured


def test_a_model_that_shows_no_keys_before_rotation_is_refused(kept: FailingBlocks) -> None:
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(**{name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"})
    )
    with pytest.raises(UnsupportedModel, match="keep them rotated"):
        connector(kept, model, rotated=False)


def test_a_model_that_does_more_to_its_keys_than_to_rotate_them_is_refused(kept: FailingBlocks) -> None:
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    attention.k_norm = torch.nn.Identity()  # Not the module whose output is rotated.
    with pytest.raises(UnsupportedModel):
        connector(kept, model, rotated=False)


def test_both_layouts_of_one_model_keep_their_blocks_apart(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    rotated, raw = connector(kept, model), connector(FailingBlocks(), model, rotated=False)
    assert rotated.layout.fingerprint != raw.layout.fingerprint

    for subject in (rotated, raw):
        cache = subject.restore(ids).cache
        output = answer(model, ids, cache)
        subject.save(output, cache)
        assert torch.equal(answer(model, output, subject.restore(output).cache), answer(model, output))


def test_a_plain_cache_is_computed_as_ever(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(18)
    expected = answer(model, ids)
    connector(kept, model, rotated=False)

    assert torch.equal(answer(model, ids, DynamicCache(config=model.config)), expected)
    assert np.array_equal(answer(model, ids).numpy(), expected.numpy())


def test_hidden_tokens_are_not_saved_where_keys_are_stored_before_rotation(kept: FailingBlocks) -> None:
    """Tokens after a hidden token have positions that differ from their index in the sequence."""
    model, ids = tiny_llama(), prompt(18)
    subject = connector(kept, model, rotated=False)
    cache = subject.restore(ids).cache
    mask = torch.ones_like(ids)
    mask[0, 7] = 0

    with torch.inference_mode():
        model(
            ids, past_key_values=cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        )
    saved = subject.save(ids, cache)

    assert subject.flush()
    assert not kept.stored
    assert (saved.stored, saved.refused) == (0, 5)
