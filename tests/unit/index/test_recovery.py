"""Reading the records at start: sound ones, damaged ones, and the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.index.environment import BLOCKS, Environment
from kvservice.index.records import Records, encode_records
from kvservice.index.recovery import load, overlaps
from tests.unit.index_samples import some_keys, some_records


@contextmanager
def opened(path: Path, map_bytes: int = 2**24) -> Iterator[Environment]:
    environment = Environment(path / "index", map_bytes=map_bytes, durable=False)
    try:
        yield environment
    finally:
        environment.close()


def extents(*places: tuple[int, int, int]) -> Records:
    records = some_records(len(places))
    for row, (segment, offset, size) in enumerate(places):
        records[row]["segment"], records[row]["offset_bytes"], records[row]["size_bytes"] = segment, offset, size
    return records


def test_an_empty_index_gives_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as environment:
        found = load(environment, [1])

    assert found.keys == []
    assert len(found.records) == 0
    assert found.damaged == {}


async def test_damaged_records_are_skipped_and_reported(tmp_path: Path) -> None:
    count = 20_000  # More than one chunk.
    keys, values = some_keys(count), encode_records(some_keys(count), some_records(count))
    values[3] = bytes([values[3][0], values[3][1] ^ 4]) + values[3][2:]
    values[9999] = values[9999][:-1]
    values[count - 1] = b""
    with opened(tmp_path) as environment:
        await environment.put(BLOCKS, keys, lambda: values)
        found = load(environment, [1])

    assert set(found.damaged) == {keys[3], keys[9999], keys[-1]}
    assert set(found.damaged.values()) == {"its record does not match its crc"}
    assert set(found.keys) == set(keys) - set(found.damaged)
    numbers = {key: number for number, key in enumerate(keys)}
    assert found.records["offset_bytes"].tolist() == [numbers[key] * 4096 for key in found.keys]


async def test_records_of_an_unknown_layout_are_damaged(tmp_path: Path) -> None:
    keys, records = some_keys(3), some_records(3)
    records["layout_id"] = [1, 2, 3]
    with opened(tmp_path) as environment:
        await environment.put(BLOCKS, keys, lambda: encode_records(keys, records))
        found = load(environment, [1, 3, 7])

    assert found.damaged == {keys[1]: "its layout is unknown"}


async def test_of_two_records_for_the_same_bytes_neither_is_trusted(tmp_path: Path) -> None:
    keys = some_keys(3)
    records = extents((0, 0, 8192), (0, 4096, 4096), (1, 4096, 4096))
    with opened(tmp_path) as environment:
        await environment.put(BLOCKS, keys, lambda: encode_records(keys, records))
        found = load(environment, [1])

    assert set(found.damaged) == set(keys[:2])
    assert found.keys == [keys[2]]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 12)), max_size=12))
def test_overlaps_are_those_that_comparing_each_with_each_finds(places: list[tuple[int, int, int]]) -> None:
    expected = [
        any(
            at != other and segment == places[other][0] and offset < sum(places[other][1:]) and places[other][1] < end
            for other in range(len(places))
        )
        for at, (segment, offset, size) in enumerate(places)
        for end in [offset + size]
    ]

    assert overlaps(extents(*places)).tolist() == expected


@pytest.mark.parametrize("place", [(0, 2**64 - 1, 4096), (0, 2**48, 1), (0, 2**48 - 1, 2), (65535, 0, 1)])
def test_a_place_that_no_tier_has_is_no_sound_one(place: tuple[int, int, int]) -> None:
    assert overlaps(extents((0, 0, 4096), place)).tolist() == [False, True]


@pytest.mark.slow
async def test_a_million_records_are_loaded_and_verified_in_a_few_times_what_reading_them_takes(tmp_path: Path) -> None:
    """One or two seconds on an otherwise idle machine."""
    count, part = 1_000_000, 4096
    with opened(tmp_path, 2**30) as environment:
        for first in range(0, count, part):
            size = min(part, count - first)
            random = np.random.default_rng(first).bytes(40 * size)
            keys = [random[at : at + 40] for at in range(0, len(random), 40)]
            records = some_records(size, first)
            await environment.put(BLOCKS, keys, lambda keys=keys, records=records: encode_records(keys, records))  # type: ignore[misc]

    with opened(tmp_path, 2**30) as environment:
        started_s = time.thread_time()
        found = load(environment, [1])
        took_s = time.thread_time() - started_s
    with lmdb.open(str(tmp_path / "index"), max_dbs=8, readonly=True, lock=False) as plain, plain.begin() as reading:
        started_s = time.thread_time()
        read = [(key, value) for key, value in reading.cursor(plain.open_db(BLOCKS, reading, create=False))]
        read_s = time.thread_time() - started_s

    print(f"{took_s:.2f} s, and {read_s:.2f} s to read them")
    assert len(found.keys) == len(found.records) == len(read) == count
    assert took_s < 8 * read_s
