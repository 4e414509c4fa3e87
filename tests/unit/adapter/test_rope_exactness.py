"""Keys that moved to new positions equal those that the model rotates there, for every kind of rotary encoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from kvservice_adapter.rope import Rope
from kvservice_adapter.truncation import keep_on_overflow, keep_without, kept_tokens
from tests.stories260k import BEGIN, stories_model, stories_text
from tests.unit.rotary_models import (
    MODELS,
    RecordedKeys,
    computed,
    logits_after,
    picked,
    rotary_model,
    states,
    tokens_of,
)

HISTORY_TOKENS, NEW_TOKENS = 128, 16
KEPT = {
    "the oldest half leaves": keep_on_overflow(HISTORY_TOKENS, window=130, new_tokens=NEW_TOKENS, sink_tokens=0),
    "four sinks stay": keep_on_overflow(HISTORY_TOKENS, window=130, new_tokens=NEW_TOKENS),
    "a discard list": keep_without(HISTORY_TOKENS, [3, 4, 5, 17, 60, 61, 100, 127]),
}
LOGITS_DIFFER_MAX = 1e-4
Tokens = NDArray[np.int64]


def turned(rope: Rope, cache: DynamicCache, kept: Tokens) -> DynamicCache:
    """Some tokens of a history, with their keys rotated to the positions 0, 1, 2..."""
    chosen = picked(cache, kept)
    rotation = rope.rotation(kept, np.arange(len(kept)))
    assert rotation is not None
    for keys, _ in states(chosen):
        rotation.apply(keys)
    return chosen


def freshly_rotated(recorded: RecordedKeys, cache: DynamicCache, kept: Tokens) -> DynamicCache:
    """The same tokens, their unrotated keys rotated by the model's own code."""
    chosen = picked(cache, kept)
    for layer, (keys, _) in enumerate(states(chosen)):
        fresh = recorded.rotated_at(layer, kept, range(len(kept)))
        keys[..., : fresh.shape[-1]] = fresh
    return chosen


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("name", MODELS)
def test_logits_on_turned_keys_are_those_on_freshly_rotated_ones(
    name: str, keep: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rotary_model(name)
    rope = Rope.from_model(model)
    recorded = RecordedKeys(model, monkeypatch)
    cache, new = computed(model, tokens_of(HISTORY_TOKENS)), tokens_of(NEW_TOKENS, seed=1)
    kept = kept_tokens(keep)

    fresh = logits_after(model, freshly_rotated(recorded, cache, kept), new)
    ours = logits_after(model, turned(rope, cache, kept), new)
    left = logits_after(model, picked(cache, kept), new)

    assert (ours - fresh).abs().max() <= LOGITS_DIFFER_MAX
    assert (left - fresh).abs().max() > 1000 * LOGITS_DIFFER_MAX  # The positions of keys do matter.


@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_turned_keys_are_as_good_as_bf16_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are rounded to 8 bits; moved keys are rounded twice."""
    model = rotary_model(name, torch.bfloat16)
    rope = Rope.from_model(model)
    recorded = RecordedKeys(model, monkeypatch)
    cache = computed(model, tokens_of(HISTORY_TOKENS))
    kept = kept_tokens(KEPT["four sinks stay"])

    ours, fresh = turned(rope, cache, kept), freshly_rotated(recorded, cache, kept)

    for (keys, values), (fresh_keys, fresh_values) in zip(states(ours), states(fresh), strict=True):
        assert torch.equal(values, fresh_values)
        assert (keys - fresh_keys).float().norm() <= 0.01 * fresh_keys.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_keys_that_are_read_where_they_were_stored_keep_every_bit(name: str, dtype: torch.dtype) -> None:
    model = rotary_model(name, dtype)
    rope = Rope.from_model(model)
    cache = computed(model, tokens_of(HISTORY_TOKENS))
    kept = kept_tokens(KEPT["four sinks stay"])

    assert rope.rotation(np.arange(HISTORY_TOKENS), np.arange(HISTORY_TOKENS)) is None
    for (keys, values), (before, values_before) in zip(
        states(turned(rope, cache, kept)), states(picked(cache, kept)), strict=True
    ):
        assert torch.equal(keys[..., :4, :], before[..., :4, :])
        assert torch.equal(keys[..., rope.dims :], before[..., rope.dims :])
        assert not torch.equal(keys[..., 4:, : rope.dims], before[..., 4:, : rope.dims])
        assert torch.equal(values, values_before)


@pytest.mark.parametrize("name", MODELS)
def test_dropping_the_oldest_half_and_counting_from_0_is_dropping_it_and_counting_on(name: str) -> None:
    """Attention depends only on distances, so the same tokens at their old positions give the same logits."""
    model = rotary_model(name)
    cache, new = computed(model, tokens_of(HISTORY_TOKENS)), tokens_of(NEW_TOKENS, seed=1)
    kept = kept_tokens(KEPT["the oldest half leaves"])

    from_0 = logits_after(model, turned(Rope.from_model(model), cache, kept), new)
    where_they_were = logits_after(model, picked(cache, kept), new, first_position=HISTORY_TOKENS)

    assert (from_0 - where_they_were).abs().max() <= 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_two_rotations_equal_one_by_their_sum(name: str) -> None:
    rope = Rope.from_model(rotary_model(name))
    keys = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
    places = np.arange(50)
    twice, once = keys.clone(), keys.clone()

    for shift in (+1000, -700):
        rotation = rope.rotation(places, places + shift)
        assert rotation is not None
        rotation.apply(twice)
    rotation = rope.rotation(places, places + 300)
    assert rotation is not None
    rotation.apply(once)

    assert torch.allclose(twice, once, atol=5e-6)
    assert torch.allclose(once.norm(dim=-1), keys.norm(dim=-1), rtol=1e-6)  # The keys contain YaRN's factor already.


@pytest.fixture(scope="module")
def story() -> torch.Tensor:
    begin = torch.tensor([[BEGIN]])
    told: torch.Tensor = stories_model("half").generate(
        begin, attention_mask=torch.ones_like(begin), do_sample=False, max_new_tokens=119, pad_token_id=0
    )
    assert "Once upon a time" in stories_text(told[0].tolist())
    return told


@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_a_trained_model_continues_its_story_after_its_oldest_half_was_dropped(
    pairing: str, sink_tokens: int, story: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stories_model(pairing)
    rope = Rope.from_model(model)
    recorded = RecordedKeys(model, monkeypatch)
    cache, new = computed(model, story[:, :100]), story[:, 100:]
    kept = kept_tokens(keep_on_overflow(100, window=110, new_tokens=20, sink_tokens=sink_tokens))

    fresh = logits_after(model, freshly_rotated(recorded, cache, kept), new)
    ours = logits_after(model, turned(rope, cache, kept), new)

    assert (ours - fresh).abs().max() <= LOGITS_DIFFER_MAX
    assert torch.equal(ours.argmax(-1), fresh.argmax(-1))
    if not sink_tokens:
        counted_on = logits_after(model, picked(cache, kept), new, first_position=100)
        assert (ours - counted_on).abs().max() <= 1e-3


def test_a_trained_model_pairs_dims_as_it_was_trained_to() -> None:
    """The same weights in both orders of rows compute the same: each model's keys are paired as its rope says."""
    half, interleaved = stories_model("half"), stories_model("interleaved")
    tokens = torch.arange(3, 60)[None]

    assert (Rope.from_model(half).pairing, Rope.from_model(interleaved).pairing) == ("half", "interleaved")
    with torch.inference_mode():
        assert torch.allclose(half(tokens).logits, interleaved(tokens).logits, atol=1e-4)
