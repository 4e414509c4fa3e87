"""What a model still understands after its oldest tokens were dropped: perplexity on a long text.

A text is read in steps. When the next one would overflow the window, the oldest half leaves, and the
rest is used in one of four ways. Every token after the first overflow is scored.

    with sinks      the first 4 tokens and the latest half, their keys turned to their new positions
    without sinks   only the latest half, turned (the rule of CachedAttention, arXiv 2403.19708, 3.4)
    recomputed      the tokens of the first, computed anew: what truncation costs without a store
    naive           the latest half, its keys as they were, and what is new numbered from where it ends
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvservice_adapter.bench.report import Section
from kvservice_adapter.demo.in_memory import HistoryInMemory
from kvservice_adapter.demo.model import load_model
from kvservice_adapter.rope import Rope
from kvservice_adapter.truncation import Ranges, keep_on_overflow, kept_tokens

WINDOWS = (512, 1024)
SCORED_TOKENS = 2048
STEP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexities in one window; lower is better."""

    window: int
    scored_tokens: int
    overflows: int
    with_sinks: float
    without_sinks: float
    recomputed: float
    naive: float

    @property
    def difference(self) -> float:
        """How far reuse is from computing the same tokens again."""
        return abs(self.with_sinks - self.recomputed)


def text_tokens(tokenizer: Any, count: int) -> torch.Tensor:
    """The first tokens of Python's own language reference, ``[token]``."""
    from pydoc_data.topics import topics

    ids: list[int] = []
    for name in sorted(topics):
        ids += tokenizer(topics[name] + "\n\n")["input_ids"]
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count])


def measure(*, quick: bool) -> Section:
    loaded = load_model()
    scored_tokens = 512 if quick else SCORED_TOKENS
    section = Section(
        "truncation",
        "Quality after truncation",
        f"Perplexity of {loaded.model_id} (fp32) on the text of Python's `pydoc_data.topics`, read {STEP_TOKENS} "
        f"tokens at a time; the {scored_tokens} tokens after the first overflow of the window are scored. At each "
        "overflow the oldest half leaves. What is left is reused with its keys turned to their new positions (with the "
        "first 4 tokens kept, and without), or computed anew (the same tokens as with sinks), or reused naively: keys "
        "as they were, new tokens numbered from half the window.",
    )
    for window in WINDOWS[:1] if quick else WINDOWS:
        found = quality(loaded.model, text_tokens(loaded.tokenizer, window + scored_tokens + 1), window)
        where = f"{found.overflows} overflows"
        section.add(f"perplexity_{window}_sinks", found.with_sinks, note=where)
        section.add(f"perplexity_{window}_no_sinks", found.without_sinks)
        section.add(f"perplexity_{window}_recomputed", found.recomputed)
        section.add(f"perplexity_{window}_naive", found.naive)
        section.add(f"perplexity_{window}_difference", found.difference, "at most 0.1", "sinks against recomputed")
        section.add(f"perplexity_{window}_naive_ratio", found.naive / found.with_sinks, "at least 5", "against sinks")
    return section


def quality(model: Any, token_ids: torch.Tensor, window: int, step_tokens: int = STEP_TOKENS) -> Quality:
    """Score all of `token_ids` after the first `window`, in each of the four ways."""
    rope = Rope.from_model(model)
    with_sinks = _score(model, token_ids, window, step_tokens, sink_tokens=4, reuse=_Turned(rope))
    without = _score(model, token_ids, window, step_tokens, sink_tokens=0, reuse=_Turned(rope))
    recomputed = _score(model, token_ids, window, step_tokens, sink_tokens=4, reuse=_Recomputed(model))
    naive = _score(model, token_ids, window, step_tokens, sink_tokens=0, reuse=_Turned(None))
    return Quality(
        window,
        with_sinks.scored_tokens,
        with_sinks.overflows,
        with_sinks.perplexity,
        without.perplexity,
        recomputed.perplexity,
        naive.perplexity,
    )


@dataclass(slots=True)
class _Score:
    loss: float = 0.0
    scored_tokens: int = 0
    overflows: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.scored_tokens)


# Given the cache that overflows, the tokens in it and the ranges that stay: the cache to go on with.
_Reuse = Callable[[DynamicCache, torch.Tensor, Ranges], DynamicCache]


class _Turned:
    def __init__(self, rope: Rope | None) -> None:
        self._history = HistoryInMemory(rope)

    def __call__(self, cache: DynamicCache, tokens: torch.Tensor, keep: Ranges) -> DynamicCache:
        self._history.extend(cache)
        self._history.cut(keep)
        return self._history.cache()


class _Recomputed:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, cache: DynamicCache, tokens: torch.Tensor, keep: Ranges) -> DynamicCache:
        anew = DynamicCache()
        self._model(tokens[torch.from_numpy(kept_tokens(keep))][None], past_key_values=anew)
        return anew


@torch.inference_mode()
def _score(
    model: Any, token_ids: torch.Tensor, window: int, step_tokens: int, *, sink_tokens: int, reuse: _Reuse
) -> _Score:
    cache, held, score = DynamicCache(), token_ids[:0], _Score()
    for begin in range(0, len(token_ids) - 1, step_tokens):
        step, following = (token_ids[first : first + step_tokens] for first in (begin, begin + 1))
        step = step[: len(following)]
        keep = keep_on_overflow(len(held), window=window, new_tokens=len(step), sink_tokens=sink_tokens)
        kept = held[torch.from_numpy(kept_tokens(keep))]
        if len(kept) < len(held):
            cache = reuse(cache, held, keep)
            score.overflows += 1
        positions = torch.arange(len(kept), len(kept) + len(step))[None]
        logits = model(step[None], past_key_values=cache, position_ids=positions).logits[0]
        held = torch.cat([kept, step])
        if score.overflows:
            score.loss += float(torch.nn.functional.cross_entropy(logits.float(), following, reduction="sum"))
            score.scored_tokens += len(step)
    return score
