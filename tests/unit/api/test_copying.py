"""Copies of slices with their checksums: by the C extension, and by NumPy and xxhash."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvservice_api import copying
from kvservice_api.copying import NO_RUNS, PIECE_BYTES, copy_slices

Memory = NDArray[np.uint8]
SIZES = [0, 1, 255, 1023, 1024, 1025, 64 << 10, PIECE_BYTES + 8, (1 << 20) + 13, 3 << 20]

pytestmark = pytest.mark.usefixtures("implementation")


def random_bytes(size: int) -> Memory:
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def whole(size: int, target_offset: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.array([(0, 0, size, 1)]), np.array([(0, target_offset, 0, 1, size, 0)])


def test_sums_are_those_of_the_xxhash_package_for_all_lengths_and_alignments() -> None:
    data = random_bytes(9000)
    slices = np.array([(0, size % 67, size, 0) for size in range(4200)])
    sums = copy_slices([data], [], slices, NO_RUNS)
    expected = [xxhash.xxh3_64_intdigest(data[at : at + size].data) for _, at, size, _ in slices.tolist()]
    assert sums.tolist() == expected


def test_sums_of_long_slices_are_those_of_the_xxhash_package() -> None:
    data = random_bytes(3 << 20)
    ends = [*np.random.default_rng(1).integers(1, len(data), 60).tolist(), 1 << 20, 3 << 20]
    sums = copy_slices([data], [], np.array([(0, end % 2, end - end % 2, 0) for end in ends]), NO_RUNS)
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(data[end % 2 : end].data) for end in ends]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_copy_has_its_bytes_and_nothing_beside_it_is_written(size: int, streamed: bool) -> None:
    source = random_bytes(size)
    for shift in (0, 1, 8, 16, 33, 63):
        target = np.full(size + 200, 7, np.uint8)
        sums = copy_slices([source], [target], *whole(size, shift), streamed=streamed)
        assert sums.tolist() == [xxhash.xxh3_64_intdigest(source.data)]
        assert np.array_equal(target[shift : shift + size], source)
        assert (target[:shift] == 7).all() and (target[shift + size :] == 7).all()


@pytest.mark.parametrize("streamed", [False, True])
def test_many_slices_of_several_arrays_are_copied_in_one_call(streamed: bool) -> None:
    sources = [random_bytes(size) for size in (5000, 70_000, 300_000)]
    targets = [np.zeros(200_000, np.uint8), np.zeros(300_000, np.uint8)]
    slices = np.array([(0, 100, 4000, 1), (1, 0, 70_000, 1), (2, 7, 200_000, 1)])
    runs = np.array([(1, 3, 0, 1, 4000, 0), (0, 0, 0, 1, 70_000, 0), (1, 50_000, 0, 1, 200_000, 0)])
    sums = copy_slices(sources, targets, slices, runs, streamed=streamed)
    parts = [sources[0][100:4100], sources[1], sources[2][7:200_007]]
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(part.data) for part in parts]
    assert np.array_equal(targets[1][3:4003], parts[0])
    assert np.array_equal(targets[0][:70_000], parts[1])
    assert np.array_equal(targets[1][50_000:250_000], parts[2])


def test_runs_are_copied_and_all_of_the_slice_is_summed() -> None:
    source = random_bytes(2 * PIECE_BYTES)
    cuts = [(3, 100), (200, PIECE_BYTES + 300)]
    target = np.zeros(sum(end - begin for begin, end in cuts), np.uint8)
    runs, at = [], 0
    for begin, end in cuts:
        runs.append((0, at, begin, 1, end - begin, 0))
        at += end - begin
    sums = copy_slices([source], [target], np.array([(0, 0, len(source), 2)]), np.array(runs))
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(source.data)]
    assert np.array_equal(target, np.concatenate([source[begin:end] for begin, end in cuts]))


@pytest.mark.parametrize("row_bytes", [16, 100, 256, 5000])
def test_the_rows_of_a_run_go_to_places_that_are_apart_forwards_or_backwards(row_bytes: int) -> None:
    rows, apart = 300, row_bytes + 24
    source = random_bytes(rows * row_bytes + 9)
    for stride, first in ((apart, 0), (-apart, (rows - 1) * apart)):
        target = np.full(rows * apart, 7, np.uint8)
        run = np.array([(0, first, 9, rows, row_bytes, stride)])
        sums = copy_slices([source], [target], np.array([(0, 0, len(source), 1)]), run)
        assert sums.tolist() == [xxhash.xxh3_64_intdigest(source.data)]
        found = target.reshape(rows, apart)[:: 1 if stride > 0 else -1]
        assert np.array_equal(found[:, :row_bytes], source[9:].reshape(rows, row_bytes))
        assert (found[:, row_bytes:] == 7).all()


def test_nothing_is_summed_if_no_sums_are_wanted() -> None:
    source, target = random_bytes(100_000), np.zeros(100_000, np.uint8)
    assert not len(copy_slices([source], [target], *whole(len(source)), summed=False))
    assert np.array_equal(target, source)


def test_runs_in_any_order_have_the_slices_sum() -> None:
    source, target = random_bytes(10_000), np.zeros(10_000, np.uint8)
    runs = np.array([(0, 5000, 5000, 1, 5000, 0), (0, 0, 0, 1, 5000, 0)])
    sums = copy_slices([source], [target], np.array([(0, 0, 10_000, 2)]), runs)
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(source.data)]
    assert np.array_equal(target, source)


def test_a_target_may_be_an_array_with_strides_whose_elements_are_larger() -> None:
    pages = np.zeros((4, 8, 64), np.uint16)[::-1, ::2]  # Begins at its last page.
    source = random_bytes(4 * 128)
    runs = np.array(
        [(0, pages.strides[1], 0, 2, 128, 2 * pages.strides[1]), (0, pages.strides[0], 256, 2, 128, pages.strides[0])]
    )
    copy_slices([source], [pages], np.array([(0, 0, 512, 2)]), runs)
    rows = source.view(np.uint16).reshape(4, 64)
    assert np.array_equal(pages[0, 1], rows[0]) and np.array_equal(pages[0, 3], rows[1])
    assert np.array_equal(pages[1, 0], rows[2]) and np.array_equal(pages[2, 0], rows[3])


MAX = 2**63 - 1


@pytest.mark.parametrize(
    ("slices", "runs"),
    [
        ([(0, 0, 101, 0)], []),
        ([(0, -1, 10, 0)], []),
        ([(0, 0, -1, 0)], []),
        ([(0, 50, MAX, 0)], []),
        ([(1, 0, 10, 0)], []),
        ([(-1, 0, 10, 0)], []),
        ([(0, 0, 100, 1)], []),
        ([(0, 0, 100, -1)], []),
        ([(0, 0, 100, 0)], [(0, 0, 0, 1, 10, 0)]),
        ([(0, 0, 100, 1)], [(1, 0, 0, 1, 10, 0)]),
        ([(0, 0, 100, 1)], [(0, 41, 0, 1, 10, 0)]),
        ([(0, 0, 100, 1)], [(0, -1, 0, 1, 10, 0)]),
        ([(0, 0, 20, 1)], [(0, 0, 11, 1, 10, 0)]),
        ([(0, 0, 20, 1)], [(0, 0, -1, 1, 10, 0)]),
        ([(0, 0, 20, 1)], [(0, 0, 0, 3, 10, 10)]),
        ([(0, 0, 20, 1)], [(0, 0, 0, 2, 10, 41)]),
        ([(0, 0, 20, 1)], [(0, 9, 0, 2, 10, -10)]),
        ([(0, 0, 20, 1)], [(0, 0, 0, 2, 10, MAX)]),
        ([(0, 0, 20, 1)], [(0, MAX, 0, 2, 10, MAX)]),
        ([(0, 0, 20, 1)], [(0, 0, 0, MAX, MAX, 1)]),
        ([(0, 0, 20, 1)], [(0, 0, 0, -1, 10, 1)]),
        ([(0, 0, 20, 1)], [(0, 0, 0, 1, -10, 1)]),
        ([(0, 0, 20, 1)], [(1, 0, 0, 0, 10, 0)]),
        ([(0, 0, 20, 1)], [(MAX, 0, 0, 1, 0, 0)]),
        ([(0, 0, 20, 1)], [(-1, 0, 0, 0, 0, 0)]),
    ],
)
def test_what_is_outside_its_array_is_refused_and_nothing_is_copied(
    slices: list[tuple[int, ...]], runs: list[tuple[int, ...]]
) -> None:
    source, target = random_bytes(100), np.full(50, 7, np.uint8)
    first = np.array([(0, 0, 5, 1), *slices], np.int64)
    with pytest.raises(ValueError, match="slice"):
        copy_slices([source], [target], first, np.array([(0, 0, 0, 1, 5, 0), *runs], np.int64))
    assert (target == 7).all()


def test_a_run_without_bytes_copies_nothing_wherever_it_is() -> None:
    source, target = random_bytes(100), np.full(50, 7, np.uint8)
    runs = [(0, MAX, 0, 0, 10, 0), (0, -MAX, 5, 1, 0, 0), (0, 60, 0, 3, 0, MAX), (0, 0, MAX, 0, 8, 0)]
    sums = copy_slices([source], [target], np.array([(0, 0, 100, len(runs))]), np.array(runs))
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(source.data)]
    assert (target == 7).all()


def test_an_extension_that_takes_other_arguments_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "import_module", lambda name: SimpleNamespace())
    assert copying._extension() is None


def test_an_empty_array_has_no_bytes() -> None:
    empty = np.zeros((3, 0), np.uint8)
    assert copy_slices([empty], [empty], *whole(0)).tolist() == [xxhash.xxh3_64_intdigest(b"")]
    with pytest.raises(ValueError, match="slice"):
        copy_slices([empty], [], np.array([(0, 0, 1, 0)]), NO_RUNS)


def test_a_read_only_source_is_read_and_a_read_only_target_is_refused() -> None:
    source, target = random_bytes(10), np.zeros(10, np.uint8)
    source.flags.writeable = target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_slices([source], [target], *whole(10))
    assert copy_slices([source], [], np.array([(0, 0, 10, 0)]), NO_RUNS).tolist() == [
        xxhash.xxh3_64_intdigest(source.data)
    ]


def test_other_threads_run_while_bytes_are_copied() -> None:
    source, target = random_bytes(64 << 20), np.zeros(64 << 20, np.uint8)
    turns, ended = 0, threading.Event()

    def copy() -> None:
        for _ in range(8):
            copy_slices([source], [target], *whole(len(source)), streamed=True)
        ended.set()

    thread = threading.Thread(target=copy)
    thread.start()
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 2
