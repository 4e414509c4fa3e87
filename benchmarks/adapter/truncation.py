"""Perplexity of a model on a long text after its oldest tokens were dropped (PAPER T15).

Some parts of a text are read side by side, in steps. When the next step would overflow the window, the
oldest half leaves, and the rest is used in one of four ways. Every token after the first overflow is scored.

    with sinks      the first 4 tokens and the latest half, their keys rotated to their new positions
    without sinks   only the latest half, rotated (the rule of CachedAttention, arXiv 2403.19708, 3.4)
    recomputed      the tokens of the first way, recomputed: the cost of truncation without a store
    naive           the latest half, its keys not rotated, and new tokens numbered from its end
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.adapter.report import Section
from examples.demo.in_memory import HistoryInMemory
from examples.models import load_model
from kvservice_adapter.rope import Rope
from kvservice_adapter.truncation import Ranges, keep_on_overflow, kept_tokens

WINDOWS = (512, 1024)
PARTS, PART_TOKENS = 4, 2048  # Of the text, and of each of them scored.
STEP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Score:
    """The model's loss of each token of a text in nats, ``[part, token]``."""

    losses: torch.Tensor
    overflows: int

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.losses.mean()))


@dataclass(frozen=True, slots=True)
class Quality:
    """The four ways in one window."""

    with_sinks: Score
    without_sinks: Score
    recomputed: Score
    naive: Score

    @property
    def difference(self) -> float:
        """How far the perplexity of reuse is from that of computing the same tokens again."""
        return abs(self.with_sinks.perplexity - self.recomputed.perplexity)

    @property
    def standard_error(self) -> float:
        """Of that difference: of its mean over tokens, taken pair by pair."""
        pairs = (self.with_sinks.losses - self.recomputed.losses).flatten()
        return self.recomputed.perplexity * float(pairs.std()) / math.sqrt(len(pairs))


def measure(*, quick: bool) -> Section:
    loaded = load_model()
    parts, part_tokens = (2, 512) if quick else (PARTS, PART_TOKENS)
    section = Section(
        "truncation",
        "Quality after truncation",
        f"Perplexity of {loaded.model_id} (fp32) on the text of Python's `pydoc_data.topics`: {parts} parts of it, "
        f"read {STEP_TOKENS} tokens at a time; the {part_tokens} tokens after a part's first overflow of the window "
        "are scored. At each overflow the oldest half is dropped. The rest is used in one of these ways: with its "
        "keys rotated to their new positions (with and without the first 4 tokens); computed again (the tokens of "
        "the way with sinks); or reused naively, with unchanged keys and new tokens numbered from half the window.",
    )
    for window in WINDOWS[:1] if quick else WINDOWS:
        texts = text_tokens(loaded.tokenizer, parts, window + part_tokens + 1)
        found = quality(loaded.model, texts, window)
        sinks = found.with_sinks
        scored = f"{sinks.losses.numel()} tokens, {sinks.overflows} overflows of each part"
        section.add(f"perplexity_{window}_sinks", sinks.perplexity, note=scored)
        section.add(f"perplexity_{window}_recomputed", found.recomputed.perplexity)
        error = f"sinks against recomputed; standard error {found.standard_error:.2f}"
        section.add(f"perplexity_{window}_difference", found.difference, "at most 0.1", error)
        section.add(f"perplexity_{window}_no_sinks", found.without_sinks.perplexity)
        section.add(f"perplexity_{window}_naive", found.naive.perplexity)
        ratio = found.naive.perplexity / sinks.perplexity
        section.add(f"perplexity_{window}_naive_ratio", ratio, "at least 5", "against sinks")
    return section


def text_tokens(tokenizer: Any, parts: int, count: int) -> torch.Tensor:
    """So many tokens each from so many places of Python's language reference, evenly apart, ``[part, token]``."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    starts = (len(text) * part // parts for part in range(parts))
    # No token of this text is longer than 16 letters on average.
    ids = [tokenizer(text[start : start + 16 * count], add_special_tokens=False).input_ids for start in starts]
    return torch.tensor([each[:count] for each in ids])


def quality(model: Any, texts: torch.Tensor, window: int, step_tokens: int = STEP_TOKENS) -> Quality:
    """Score `texts`, ``[part, token]``, from the first overflow of the window on, in each of the four ways."""
    rope = Rope.from_model(model)
    full = _Full(model, texts, window, step_tokens)
    return Quality(
        with_sinks=full.score(_Turned(rope), sink_tokens=4),
        without_sinks=full.score(_Turned(rope), sink_tokens=0),
        recomputed=full.score(_Recomputed(model), sink_tokens=4),
        naive=full.score(_Turned(None), sink_tokens=0),
    )


# Given the cache that overflows, the tokens in it and the ranges that stay: returns the cache to continue with.
_Reuse = Callable[[DynamicCache, torch.Tensor, Ranges], DynamicCache]


class _Turned:
    def __init__(self, rope: Rope | None) -> None:
        self._history = HistoryInMemory(rope)

    def __call__(self, cache: DynamicCache, held: torch.Tensor, keep: Ranges) -> DynamicCache:
        self._history.extend(cache)
        self._history.cut(keep)
        return self._history.cache()


class _Recomputed:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, cache: DynamicCache, held: torch.Tensor, keep: Ranges) -> DynamicCache:
        anew = DynamicCache()
        kept = held[:, torch.from_numpy(kept_tokens(keep))]
        self._model(kept, past_key_values=anew, logits_to_keep=1)
        return anew


class _Full:
    """The cache of the texts up to the full window: the same for all four ways."""

    @torch.inference_mode()
    def __init__(self, model: Any, texts: torch.Tensor, window: int, step_tokens: int) -> None:
        self._model, self._window, self._step_tokens = model, window, step_tokens
        first = window // step_tokens * step_tokens
        self._held, self._rest = texts[:, :first], texts[:, first:]
        self._cache = DynamicCache()
        for step in torch.split(self._held, step_tokens, dim=1):
            model(step, past_key_values=self._cache, logits_to_keep=1)

    @torch.inference_mode()
    def score(self, reuse: _Reuse, *, sink_tokens: int) -> Score:
        """The loss of each token that follows one that was read after the first overflow."""
        cache, held, losses, overflows = self._cache, self._held, [], 0
        for first in range(0, self._rest.shape[1] - 1, self._step_tokens):
            following = self._rest[:, first + 1 : first + 1 + self._step_tokens]
            step = self._rest[:, first : first + following.shape[1]]
            count = held.shape[1]
            keep = keep_on_overflow(count, window=self._window, new_tokens=step.shape[1], sink_tokens=sink_tokens)
            if sum(kept for _, kept in keep) < count:
                cache = reuse(cache, held, keep)
                held = held[:, torch.from_numpy(kept_tokens(keep))]
                overflows += 1
            logits = self._model(step, past_key_values=cache).logits  # Numbered from the cache's length on.
            held = torch.cat([held, step], dim=1)
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), following, reduction="none"))
        return Score(torch.cat(losses, dim=1), overflows)
