"""The block table, beside a dict that holds the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import NO_ROW, BlockTable, Extent, TierName, pack_object_keys
from kvservice_api.layout import Shard

WHOLE = Shard(0, 4, 0, 4)
SHARDS = (WHOLE, Shard(0, 4, 0, 2), Shard(0, 4, 2, 4), Shard(0, 2, 0, 4))
KEYS = [hashlib.sha256(bytes([number])).digest() for number in range(6)]


def added(table: BlockTable, key: bytes, shard: Shard = WHOLE, *, parent: bytes = bytes(32), tokens: int = 16) -> int:
    """A linked row with a copy in DRAM."""
    row = table.add(
        key,
        shard,
        parent_key=parent,
        layout_id=1,
        tenant=0,
        token_count=tokens,
        size_bytes=4096,
        trailer_checksum=7,
        now_ms=99,
    )
    table.set_extent(row, TierName.DRAM, Extent(0, 4096 * row, 4096))
    table.link(row)
    return row


def removed(table: BlockTable, row: int) -> None:
    table.unlink(row)
    for tier in (TierName.DRAM, TierName.SSD):
        table.set_extent(row, tier, None)
    table.free(row)


def test_a_row_is_found_once_it_is_linked_and_until_it_is_unlinked() -> None:
    table = BlockTable()
    row = table.add(
        KEYS[0],
        WHOLE,
        parent_key=KEYS[1],
        layout_id=1,
        tenant=0,
        token_count=3,
        size_bytes=9,
        trailer_checksum=7,
        now_ms=5,
    )
    assert table.row_of(KEYS[0], WHOLE) == NO_ROW and table.live_count == 0

    table.link(row)
    assert table.row_of(KEYS[0], WHOLE) == row
    assert table.rows_of_keys([KEYS[1], KEYS[0]]).tolist() == [NO_ROW, row]
    assert table.live_rows().tolist() == [row] and table.live_count == 1

    table.unlink(row)
    assert table.row_of(KEYS[0], WHOLE) == NO_ROW and table.live_count == 0


def test_an_object_has_one_row() -> None:
    table = BlockTable()
    added(table, KEYS[0])
    with pytest.raises(AssertionError, match="one row"):
        added(table, KEYS[0])


def test_keys_that_end_in_zeros_stay_whole() -> None:
    table = BlockTable()
    key = bytes([1] * 20 + [0] * 12)
    row = added(table, key, parent=key)
    assert table.key_of(row) == key and table.parent_key[row].tobytes() == key
    assert table.object_key_of(row) == key + WHOLE.encode()


def test_a_row_is_freed_once() -> None:
    """Otherwise two blocks would get it, and a load of one would give the bytes of the other."""
    table = BlockTable()
    row = added(table, KEYS[0])
    removed(table, row)
    with pytest.raises(AssertionError, match="free twice"):
        table.free(row)


def test_a_freed_row_comes_back_clean_and_with_another_generation() -> None:
    table = BlockTable()
    row = added(table, KEYS[0])
    table.touch(np.array([row]), 100)
    table.hits[row] = 5
    table.unwanted_on_ssd[row] = True
    generation = int(table.generation[row])
    removed(table, row)

    assert added(table, KEYS[1]) == row
    assert table.generation[row] == generation + 1
    assert table.access_seq[row] == table.hits[row] == 0
    assert not table.used_since_flush[row] and not table.unwanted_on_ssd[row]
    assert table.extent(row, TierName.SSD) is None and table.next_shard[row] == NO_ROW


@pytest.mark.parametrize("column", ["leases", "holds"])
def test_a_row_that_is_held_or_resident_is_not_freed(column: str) -> None:
    table = BlockTable()
    row = added(table, KEYS[0])
    table.unlink(row)
    with pytest.raises(AssertionError):
        table.free(row)  # Resident.
    table.set_extent(row, TierName.DRAM, None)
    getattr(table, column)[row] = 1
    with pytest.raises(AssertionError):
        table.free(row)


def test_the_table_grows_and_keeps_what_it_has() -> None:
    table = BlockTable(row_capacity=2)
    rows = [added(table, key, parent=key, tokens=number + 1) for number, key in enumerate(KEYS)]
    assert table.rows_of_keys(KEYS).tolist() == rows
    assert table.token_count[rows].tolist() == [1, 2, 3, 4, 5, 6]
    assert [table.extent(row, TierName.DRAM) for row in rows] == [Extent(0, 4096 * row, 4096) for row in rows]
    assert not table.resident(TierName.SSD).any()


def test_within_one_use_a_prefix_counts_as_newer_than_its_suffix() -> None:
    table = BlockTable()
    rows = np.array([added(table, key) for key in KEYS[:3]])
    table.touch(rows, 100)
    first = table.access_seq[rows].copy()
    assert (np.diff(first) < 0).all()

    table.touch(rows[2:], 200)
    assert table.access_seq[rows[2]] > first.max()
    assert table.used_at_ms[rows].tolist() == [100, 100, 200]


def test_ancestors_lead_from_the_parent_to_the_root() -> None:
    table = BlockTable()
    rows = [added(table, key, parent=parent) for parent, key in zip([bytes(32), *KEYS], KEYS, strict=False)]
    assert table.ancestors(rows[4]) == [rows[3], rows[2], rows[1], rows[0]]
    assert table.ancestors(rows[4], limit=2) == [rows[3], rows[2]]


def test_ancestors_of_a_shard_are_of_the_same_shard_where_there_is_one() -> None:
    table = BlockTable()
    one, other = SHARDS[1], SHARDS[2]
    parents = [added(table, KEYS[0], shard) for shard in (one, other)]
    rows = [added(table, KEYS[1], shard, parent=KEYS[0]) for shard in (one, other, WHOLE)]
    assert [table.ancestors(row) for row in rows[:2]] == [[parent] for parent in parents]
    assert table.ancestors(rows[2])[0] in parents


def test_parents_that_form_a_circle_end() -> None:
    table = BlockTable()
    first = added(table, KEYS[0], parent=KEYS[1])
    second = added(table, KEYS[1], parent=KEYS[0])
    assert set(table.ancestors(first)) == {first, second}


def test_recovered_objects_are_found_with_all_their_shards() -> None:
    table = BlockTable(row_capacity=2)
    names = [(key, shard) for key in KEYS[:3] for shard in SHARDS]
    rows = table.add_many(
        pack_object_keys([key + shard.encode() for key, shard in names]),
        {"token_count": np.arange(12), "access_seq": np.arange(100, 112)},
    )
    for (key, shard), row, tokens in zip(names, rows.tolist(), range(12), strict=True):
        assert table.row_of(key, shard) == row
        assert table.token_count[row] == tokens
        assert table.shard_of(row) == shard
        assert (table.layer_begin[row], table.head_end[row]) == (shard.layer_begin, shard.head_end)
    assert table.live_count == 12
    assert table.next_access_seq == 112
    assert sorted(table.shards_of(int(table.rows_of_keys(KEYS[:1])[0]))) == sorted(rows[:4].tolist())


def test_cover_says_which_rows_hold_all_of_a_shard() -> None:
    table = BlockTable()
    rows = np.array([added(table, KEYS[number], shard) for number, shard in enumerate(SHARDS)])
    assert table.cover(rows, Shard(1, 2, 0, 1)).tolist() == [True, True, False, True]
    assert table.cover(rows, WHOLE).tolist() == [True, False, False, False]


@dataclass
class Model:
    """The expected content of the table: objects by key and shard, in plain Python."""

    live: dict[tuple[bytes, Shard], int] = field(default_factory=dict)
    extents: dict[tuple[int, TierName], Extent] = field(default_factory=dict)
    unlinked: set[int] = field(default_factory=set)


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "unlink", "free", "place", "drop", "touch"]),
        st.integers(0, len(KEYS) - 1),
        st.sampled_from(SHARDS),
        st.sampled_from([TierName.DRAM, TierName.SSD]),
    ),
    max_size=60,
)


@given(steps)
def test_after_every_operation_the_table_equals_a_dict(
    steps: list[tuple[str, int, Shard, TierName]],
) -> None:
    table, model = BlockTable(row_capacity=2), Model()
    for number, (act, at, shard, tier) in enumerate(steps):
        name = (KEYS[at], shard)
        row = model.live.get(name)
        if act == "add" and row is None:
            row = model.live[name] = added(table, *name)
            model.extents[row, TierName.DRAM] = Extent(0, 4096 * row, 4096)
        elif act == "unlink" and row is not None:
            table.unlink(row)
            model.unlinked.add(model.live.pop(name))
        elif act == "free" and model.unlinked:
            row = model.unlinked.pop()
            for each in (TierName.DRAM, TierName.SSD):
                table.set_extent(row, each, None)
                model.extents.pop((row, each), None)
            table.free(row)
        elif act == "place" and row is not None:
            extent = Extent(3 if tier == TierName.SSD else 0, number * 4096, 8192)
            table.set_extent(row, tier, extent)
            model.extents[row, tier] = extent
        elif act == "drop" and row is not None:
            table.set_extent(row, tier, None)
            model.extents.pop((row, tier), None)
        elif act == "touch" and row is not None:
            table.touch(np.array([row]), number)
            assert table.access_seq[row] == table.next_access_seq - 1
        check(table, model)


def check(table: BlockTable, model: Model) -> None:
    assert sorted(table.live_rows().tolist()) == sorted(model.live.values())
    assert table.live_count == len(model.live)
    for (key, shard), row in model.live.items():
        assert table.row_of(key, shard) == row
        assert (table.key_of(row), table.shard_of(row)) == (key, shard)
    for key in KEYS:
        first = int(table.rows_of_keys([key])[0])
        assert set(table.shards_of(first)) == {row for (found, _), row in model.live.items() if found == key}
    for tier in (TierName.DRAM, TierName.SSD):
        resident = {row for row, where in model.extents if where is tier}
        assert set(np.flatnonzero(table.resident(tier)).tolist()) == resident
        for row in resident:
            assert table.extent(row, tier) == model.extents[row, tier]


COLD = TierName("cold")
THREE_TIERS = (TierName.DRAM, TierName.SSD, COLD)


def test_a_block_may_lie_in_any_of_three_tiers_and_the_table_tells_which() -> None:
    table = BlockTable(row_capacity=2, tiers=THREE_TIERS)
    row = added(table, KEYS[0])
    table.set_extent(row, COLD, Extent(5, 8192, 4096))
    assert table.tiers_of(row) == [TierName.DRAM, COLD] and table.fastest(row) == TierName.DRAM
    assert table.tier_sets(np.array([row])).tolist() == [0b101]
    assert table.has_slower_copy(row, TierName.SSD) and not table.has_slower_copy(row, COLD)
    table.set_extent(row, TierName.DRAM, None)
    assert table.fastest(row) == COLD and table.extent(row, COLD) == Extent(5, 8192, 4096)
    assert table.lie_anywhere(np.array([row])).all() and not table.resident(TierName.DRAM).any()
    for key in KEYS[1:]:  # The arrays grow.
        added(table, key)
    assert table.extent(row, COLD) == Extent(5, 8192, 4096)
    assert table.resident_faster(COLD).tolist() == [False, True, True, True, True, True]
    assert table.resident_slower(TierName.DRAM).tolist() == [True, False, False, False, False, False]


def test_a_pin_keeps_the_copy_in_the_slowest_of_three_tiers_that_has_one() -> None:
    table = BlockTable(tiers=THREE_TIERS)
    row = added(table, KEYS[0])
    table.pinned_until_ms[row] = 100
    assert table.pin_keeps(row, TierName.DRAM, 99) and not table.pin_keeps(row, TierName.DRAM, 100)
    table.set_extent(row, COLD, Extent(0, 0, 4096))
    assert table.pin_keeps(row, COLD, 99)
    assert not table.pin_keeps(row, TierName.DRAM, 99)


def test_no_block_lies_in_a_tier_that_the_store_does_not_have() -> None:
    table = BlockTable(tiers=[TierName.DRAM])
    row = added(table, KEYS[0])
    assert not table.is_resident(row, TierName.SSD) and table.extent(row, TierName.SSD) is None
    assert not table.resident(TierName.SSD).any()
