"""The rest of a truncated history is as good as if it were computed again; naive reuse ruins it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.adapter import truncation
from benchmarks.adapter.truncation import Quality, quality, text_tokens
from examples.models import load_model
from tests.stories260k import BEGIN, stories_model

SCORED_TOKENS = 160


@pytest.fixture(scope="module")
def scores() -> Quality:
    """stories260K reads its own stories, in a window of 64 tokens."""
    model = stories_model("half")
    torch.manual_seed(0)
    begin = torch.full((4, 1), BEGIN)
    stories = model.generate(
        begin, attention_mask=torch.ones_like(begin), do_sample=True, max_new_tokens=64 + SCORED_TOKENS, pad_token_id=0
    )
    return quality(model, stories, window=64, step_tokens=16)


class TestATinyModel:
    def test_turned_keys_serve_as_well_as_keys_computed_again(self, scores: Quality) -> None:
        assert scores.with_sinks.overflows == scores.recomputed.overflows >= 4
        assert scores.with_sinks.perplexity < 6
        assert scores.difference < 0.1 * scores.recomputed.perplexity
        assert scores.without_sinks.perplexity < 1.1 * scores.recomputed.perplexity  # This model needs no sinks.

    def test_naive_reuse_ruins_it(self, scores: Quality) -> None:
        assert scores.naive.perplexity > 5 * scores.with_sinks.perplexity

    def test_every_token_after_the_first_overflow_is_scored_once(self, scores: Quality) -> None:
        for score in (scores.with_sinks, scores.without_sinks, scores.recomputed, scores.naive):
            assert score.losses.shape == (4, SCORED_TOKENS)


@pytest.mark.slow
def test_a_real_model_understands_what_is_left_and_needs_its_first_tokens() -> None:
    loaded = load_model()
    texts = text_tokens(loaded.tokenizer, 2, 512 + 1024 + 1)

    found = quality(loaded.model, texts, window=512)

    assert found.with_sinks.losses.numel() == 2048
    assert found.difference <= 0.1 + 2 * found.standard_error  # So few tokens show no more.
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
