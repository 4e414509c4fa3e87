"""Sliding-window layers keep all tokens in our cache; the mask hides tokens before the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kvservice_adapter.connectors.transformers import UnsupportedModel
from kvservice_adapter.connectors.transformers.recompute import computed as computed_whole
from tests.unit.connector_models import KeptBlocks, computed, connector, prompt, states

WINDOW = 6


def gemma(**options: Any) -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
        **options,
    )
    model: Any = Gemma3ForCausalLM(config)
    return model.eval()


def test_the_layout_has_a_group_for_each_run_of_layers_with_its_window_and_its_rotation() -> None:
    groups = connector(KeptBlocks(), gemma()).layout.groups

    assert [(each.layers, each.attention) for each in groups] == [
        (2, f"sliding({WINDOW})"),
        (1, "full"),
        (1, f"sliding({WINDOW})"),
    ]
    assert [each.rotary.base for each in groups] == [10_000.0, 1_000_000.0, 10_000.0]


def test_another_window_is_another_layout() -> None:
    layouts = []
    for window in (6, 7):
        model = gemma()
        model.config.sliding_window = window
        layouts.append(connector(KeptBlocks(), model).layout.fingerprint)
    assert layouts[0] != layouts[1]


@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 1])
def test_every_token_of_a_sliding_layer_comes_back_though_the_librarys_own_cache_drops_them(length: int) -> None:
    kept, model, ids = KeptBlocks(), gemma(), prompt(length + 4)
    subject = connector(kept, model)
    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids[:, :length], past_key_values=cache)
        for column in range(length, length + 4):
            model(ids[:, column : column + 1], past_key_values=cache)
    assert subject.save(ids, cache).error is None

    back = subject.restore(ids)
    assert back.tokens == length + 3
    expected = computed_whole(model, ids.numpy(), torch.ones_like(ids).bool().numpy())
    for (keys, values), (back_keys, back_values) in zip(expected, states(back.cache), strict=True):
        assert torch.allclose(keys[:, :, : back.tokens], back_keys, atol=1e-4)
        assert torch.allclose(values[:, :, : back.tokens], back_values, atol=1e-4)


def test_a_librarys_own_cache_of_such_a_model_is_refused_for_it_holds_only_the_window() -> None:
    model, ids = gemma(), prompt(20)

    with pytest.raises(UnsupportedModel, match="DynamicSlidingWindowLayer"):
        connector(KeptBlocks(), model).save(ids, computed(model, ids))


def test_a_cropped_cache_still_works_though_its_window_was_full() -> None:
    model, ids = gemma(), prompt(30)
    cache = connector(KeptBlocks(), model).restore(ids).cache
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        cache.crop(-10)
        logits = model(ids[:, 20:], past_key_values=cache).logits[:, -1]
        assert torch.allclose(logits, model(ids).logits[:, -1], atol=1e-4)
