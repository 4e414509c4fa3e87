"""What is left of a truncated history serves as well as if it were computed again; reused naively it is ruined."""

from __future__ import annotations

import pytest
import torch

from benchmarks.adapter import truncation
from benchmarks.adapter.truncation import Quality, quality, text_tokens
from examples.demo.model import load_model
from tests.stories import BEGIN, stories_model

SCORED_TOKENS = 160


@pytest.fixture(scope="module")
def quality() -> Quality:
    """stories260K reads its own stories, in a window of 64 tokens."""
    model = stories_model("half")
    torch.manual_seed(0)
    begin = torch.full((4, 1), BEGIN)
    stories = model.generate(
        begin, attention_mask=torch.ones_like(begin), do_sample=True, max_new_tokens=64 + SCORED_TOKENS, pad_token_id=0
    )
    return quality(model, stories, window=64, step_tokens=16)


class TestATinyModel:
    def test_turned_keys_serve_as_well_as_keys_computed_again(self, quality: Quality) -> None:
        assert quality.with_sinks.overflows == quality.recomputed.overflows >= 4
        assert quality.with_sinks.perplexity < 6
        assert quality.difference < 0.1 * quality.recomputed.perplexity
        assert quality.without_sinks.perplexity < 1.1 * quality.recomputed.perplexity  # This one needs no sinks.

    def test_naive_reuse_ruins_it(self, quality: Quality) -> None:
        assert quality.naive.perplexity > 5 * quality.with_sinks.perplexity

    def test_every_token_after_the_first_overflow_is_scored_once(self, quality: Quality) -> None:
        for score in (quality.with_sinks, quality.without_sinks, quality.recomputed, quality.naive):
            assert score.losses.shape == (4, SCORED_TOKENS)


@pytest.mark.slow
def test_a_real_model_understands_what_is_left_and_needs_its_first_tokens() -> None:
    loaded = load_model()
    texts = text_tokens(loaded.tokenizer, 2, 512 + 1024 + 1)

    found = quality(loaded.model, texts, window=512)

    assert found.with_sinks.losses.numel() == 2048
    assert found.difference <= 0.1 + 2 * found.standard_error  # So few tokens say no more.
    assert found.difference <= 0.03 * found.recomputed.perplexity
    assert found.without_sinks.perplexity > 1.2 * found.with_sinks.perplexity
    assert found.naive.perplexity > 5 * found.with_sinks.perplexity


def test_the_text_is_taken_from_places_evenly_apart() -> None:
    class Letters:
        def __call__(self, text: str, **options: object) -> object:
            return type("Ids", (), {"input_ids": [ord(letter) for letter in text]})

    texts = text_tokens(Letters(), truncation.PARTS, 100)

    assert texts.shape == (truncation.PARTS, 100)
    assert len({tuple(row.tolist()) for row in texts}) == truncation.PARTS
