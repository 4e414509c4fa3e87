"""The shadow of `lru`: the bytes it would have had, and whether a policy is behind it."""

from __future__ import annotations

import numpy as np
import pytest

from kvservice.policy.shadow_lru import ShadowLru


def followed(shadow: ShadowLru, keys: list[int], *, had: int = 0, size: int = 10) -> ShadowLru:
    """Requests use these items, one after the other, of which the real DRAM had so many bytes."""
    seen: set[int] = set()
    for key in keys:
        shadow.used(key, size if key in seen else 0, had)
        shadow.stored(key, size)
        seen.add(key)
    return shadow


def test_it_has_what_was_used_last() -> None:
    assert followed(ShadowLru(20), [1, 2] * 50).hit_share == 1.0
    assert followed(ShadowLru(20), [1, 2, 3] * 50).hit_share == 0.0, "each leaves before its next use"


def test_of_the_oldest_item_the_end_leaves_first() -> None:
    assert followed(ShadowLru(25), [1, 2, 3] * 50).hit_share == pytest.approx(0.5, abs=0.05)


def test_it_counts_how_often_it_replaced_all_of_dram() -> None:
    assert followed(ShadowLru(100), list(range(40))).turnovers == 3.0
    assert ShadowLru(0).turnovers == 0.0


def test_it_is_ahead_of_a_store_that_has_less_and_not_of_one_that_has_as_much() -> None:
    assert followed(ShadowLru(20), [1, 2] * 100, had=5).is_ahead
    assert not followed(ShadowLru(20), [1, 2] * 100, had=10).is_ahead
    assert not followed(ShadowLru(20), [1, 2] * 100, had=11).is_ahead


def test_some_uses_by_chance_do_not_put_it_ahead() -> None:
    shadow = ShadowLru(20)
    random = np.random.default_rng(0)
    for key in random.integers(0, 2, 1000).tolist():
        shadow.used(key, 10, 10 + int(random.integers(-3, 4)))
        shadow.stored(key, 10)
        assert not shadow.is_ahead


def test_after_a_restart_it_compares_again() -> None:
    shadow = followed(ShadowLru(20), [1, 2] * 100)
    shadow.restart()
    assert not followed(shadow, [1, 2] * 20).is_ahead, "too few uses"
    assert followed(shadow, [1, 2] * 100).is_ahead


def test_its_memory_is_bounded_and_a_sample_shows_what_all_would() -> None:
    random = np.random.default_rng(1)
    keys = (random.zipf(1.3, 60_000) % 40_000).tolist()
    shadow = followed(ShadowLru(10 * 8000), keys)
    assert len(shadow._sizes) <= 2048
    recent: dict[int, None] = {}
    hits = uses = 0
    seen: set[int] = set()
    for number, key in enumerate(keys):
        if key in seen and number > 30_000:
            uses += 1
            hits += key in recent
        seen.add(key)
        recent.pop(key, None)
        recent[key] = None
        if len(recent) > 8000:
            del recent[next(iter(recent))]
    assert shadow.hit_share == pytest.approx(hits / uses, abs=0.1)
