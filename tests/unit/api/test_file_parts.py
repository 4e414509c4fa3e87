"""Parts of a file and their checksums: by the C extension, and by Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvservice_api.file_parts import NO_RANGES, FilePart, read_parts, sums_of_each

PAGE = 4096
DATA = np.random.default_rng(3).integers(0, 256, 700 * PAGE, np.uint8).tobytes()

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(DATA)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


def part(position: int, size: int, ranges: Sequence[tuple[int, int]] = ()) -> FilePart:
    return FilePart(position, memoryview(bytearray(size)), np.array(ranges, np.int64).reshape(-1, 2))


def sums(position: int, ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(DATA[position + begin : position + end]) for begin, end in ranges]


def test_parts_have_the_bytes_of_their_places_and_the_sums_of_their_ranges(file: int) -> None:
    """Neighbours, with a small gap and a large one between, with an overlap, and at an earlier place."""
    places = [
        (PAGE, PAGE),
        (2 * PAGE, 3 * PAGE),
        (9 * PAGE, 70 * PAGE),
        (300 * PAGE, PAGE),
        (300 * PAGE + 7, 9),
        (0, 5),
    ]
    ranges = [(0, 0), (1, 5), (0, 4)]
    parts = [part(position, size, ranges) for position, size in places]

    found = read_parts(file, parts)

    for (position, size), each, its_sums in zip(places, parts, found, strict=True):
        assert bytes(each.into) == DATA[position : position + size]
        assert its_sums is not None
        assert its_sums.tolist() == sums(position, ranges)


def test_more_parts_than_one_system_call_takes_are_read(file: int) -> None:
    parts = [part(2 * number * 500, 500, [(0, 500)]) for number in range(2000)]
    found = read_parts(file, parts)
    assert [each.tolist() for each in found if each is not None] == [sums(each.position, [(0, 500)]) for each in parts]


def test_more_parts_that_do_not_follow_one_another_than_the_kernel_takes_at_a_time_are_read(file: int) -> None:
    """One of them beyond the end of the file."""
    parts = [part((700 - number) * PAGE, PAGE, [(0, 500)]) for number in range(200)]
    assert read_parts(file, parts[:1]) == [None]
    found = read_parts(file, parts)
    assert found[0] is None
    for each, its_sums in zip(parts[1:], found[1:], strict=True):
        assert its_sums is not None
        assert its_sums.tolist() == sums(each.position, [(0, 500)])


def test_many_parts_of_a_file_that_cannot_be_read_are_not_read() -> None:
    assert read_parts(-1, [part(number * PAGE, PAGE) for number in reversed(range(100))]) == [None] * 100


def test_threads_read_parts_at_the_same_time(file: int) -> None:
    parts = [part((600 - number) * PAGE, PAGE, [(0, PAGE)]) for number in range(100)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: read_parts(file, parts), range(40)))
    for each in found:
        assert [some.tolist() for some in each if some is not None] == [
            sums(each.position, [(0, PAGE)]) for each in parts
        ]


def test_a_part_without_all_of_its_bytes_is_not_read_and_others_are(file: int) -> None:
    beyond = [part(len(DATA) - PAGE, PAGE, [(0, 9)]), part(len(DATA), PAGE, [(0, 9), (1, 2)])]
    parts = [part(0, PAGE, [(0, 9)]), *beyond, part(PAGE, PAGE, [(3, 9)])]
    found = read_parts(file, parts)
    assert found[1] is found[2] is None, "they share a call"
    assert found[0] is not None
    assert found[3] is not None
    assert (found[0].tolist(), found[3].tolist()) == (sums(0, [(0, 9)]), sums(PAGE, [(3, 9)]))


def test_a_call_that_fails_reads_nothing() -> None:
    assert read_parts(-1, [part(0, PAGE, [(0, 9)])]) == [None]
    assert read_parts(-1, []) == []


def test_a_part_may_have_nothing_to_sum(file: int) -> None:
    [found] = read_parts(file, [FilePart(PAGE, memoryview(into := bytearray(PAGE)), NO_RANGES)])
    assert found is not None
    assert not len(found)
    assert bytes(into) == DATA[PAGE : 2 * PAGE]


@pytest.mark.parametrize("outside", [(0, PAGE + 1), (-1, 4), (5, 4)])
def test_a_range_outside_its_part_is_refused_and_nothing_is_read(file: int, outside: tuple[int, int]) -> None:
    first = part(0, PAGE, [(0, 9)])
    with pytest.raises(ValueError, match="outside its part"):
        read_parts(file, [first, part(PAGE, PAGE, [outside])])
    assert not any(first.into)


@pytest.mark.parametrize("position", [-1, 2**63 - 1])
def test_a_part_where_no_file_can_have_one_is_refused(file: int, position: int) -> None:
    with pytest.raises(ValueError, match="outside any file"):
        read_parts(file, [part(0, PAGE), FilePart(position, memoryview(bytearray(PAGE)), NO_RANGES)])


def test_sums_of_several_memories_are_those_of_each() -> None:
    first, second = memoryview(DATA)[: 3 * PAGE], memoryview(DATA)[3 * PAGE :]
    ranges = [(0, PAGE), (1, 1), (5, 3 * PAGE)], [(7, 2 * PAGE)]
    tables = [np.array(each, np.int64) for each in ranges]

    one, none, other = sums_of_each([(first, tables[0]), (first, NO_RANGES), (second, tables[1])])

    assert one.tolist() == sums(0, ranges[0])
    assert not len(none)
    assert other.tolist() == sums(3 * PAGE, ranges[1])


def test_memory_that_cannot_be_written_is_refused(file: int) -> None:
    with pytest.raises((TypeError, BufferError)):
        read_parts(file, [FilePart(0, memoryview(bytes(PAGE)), NO_RANGES)])
