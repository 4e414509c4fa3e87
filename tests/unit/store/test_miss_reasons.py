"""The history beside a plain list of all events: it tells the same, as far back as it reaches."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import BlockTable, TierName
from kvservice.store.miss_reasons import MissEvent, MissReasons, Reason
from kvservice_api.layout import Shard
from tests.clock import FakeClock

SHARD = Shard(0, 2, 0, 2)
KEYS = [hashlib.sha256(b"%d" % number).digest() for number in range(6)]
KEYS.append(KEYS[0][:8] + bytes(24))  # Begins as another one does.
KEYS.append(bytes(32))  # As a place that was never written.

reasons = st.sampled_from(list(Reason))
tiers = st.sampled_from([None, TierName.DRAM, TierName.SSD])
notes = st.tuples(
    st.lists(st.sampled_from(KEYS), min_size=1, max_size=5, unique=True),
    reasons,
    st.sampled_from(["", "lru", "TIER_FULL"]),
    st.integers(0, 3),  # Seconds that pass before it.
)


@given(st.integers(0, 7), st.lists(notes, max_size=12), st.integers(0, 20))
def test_it_tells_the_last_events_of_each_key_newest_first(
    events_max: int, noted: list[tuple[list[bytes], Reason, str, int]], until_s: int
) -> None:
    clock = FakeClock()
    began_ms = clock.wall_ms()
    history = MissReasons(clock, events_max)
    expected: list[tuple[bytes, MissEvent]] = []
    for keys, reason, word, seconds in noted:
        clock.advance(seconds=seconds)
        history.note_keys(keys, reason, word)
        expected += [(key, MissEvent(clock.wall_ms(), reason, None, word, True, 0)) for key in keys]

    kept = expected[-events_max:] if events_max else []
    until_ms = began_ms + until_s * 1000
    for key in KEYS:
        newest_first = [event for name, event in reversed(kept) if name == key]
        assert history.of(key) == newest_first
        assert history.of(key, until_ms) == [event for event in newest_first if event.at_ms <= until_ms]
    if len(expected) > events_max > 0:
        assert history.remembers_since_ms == kept[0][1].at_ms
    elif events_max:
        assert history.remembers_since_ms == began_ms


@given(st.lists(st.tuples(st.sampled_from(KEYS[:6]), st.integers(0, 3)), min_size=1, max_size=6), reasons, tiers)
def test_it_notes_rows_with_their_tier_and_the_end_of_their_pin(
    pinned: list[tuple[bytes, int]], reason: Reason, tier: TierName | None
) -> None:
    clock, blocks = FakeClock(), BlockTable()
    history = MissReasons(clock, 100)
    now_ms = clock.wall_ms()
    ends = dict(pinned)
    rows = [
        blocks.add(
            key,
            SHARD,
            parent_key=bytes(32),
            layout_id=1,
            tenant=0,
            token_count=1,
            size_bytes=1,
            trailer_checksum=0,
            now_ms=1,
        )
        for key in ends
    ]
    blocks.pinned_until_ms[rows] = [[0, now_ms - 5, now_ms, now_ms + 5][how] for how in ends.values()]
    history.note_rows(blocks, rows, reason, tier=tier, word="lru", last_copy=False)
    for key, how in ends.items():
        ended_ms = [0, now_ms - 5, now_ms, 0][how]  # A pin that still runs has not ended.
        assert history.of(key) == [MissEvent(now_ms, reason, tier, "lru", False, ended_ms)]


def test_records_with_damaged_keys_harm_nothing() -> None:
    history = MissReasons(FakeClock(), 10)
    history.note_lost(TierName.SSD, [b"short", KEYS[0] + bytes(8), KEYS[1] + b"too long" * 20])
    assert [event.reason for event in history.of(KEYS[0])] == [Reason.LOST]
    assert [event.tier for event in history.of(KEYS[1])] == [TierName.SSD]


def test_a_batch_larger_than_the_ring_leaves_its_last_ones() -> None:
    history = MissReasons(FakeClock(), 3)
    many = [np.uint64(number).tobytes() + bytes(24) for number in range(1, 8)]
    history.note_keys(many, Reason.DISCARDED)
    assert [bool(history.of(key)) for key in many] == [False] * 4 + [True] * 3
