"""Mapping of shared memory, for both sides."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest

from kvservice_api.mapping import HUGE_PAGE_BYTES, Mapping

SIZE = 3 * HUGE_PAGE_BYTES + 4096


@pytest.fixture
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
        yield file.fileno()


def mapped_bytes(fd: int) -> int:
    """How much of the file this process has mapped."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if f" {os.fstat(fd).st_ino} " in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def test_it_begins_on_a_huge_pages_border_and_goes_with_the_last_array(fd: int) -> None:
    mapping = Mapping(fd, SIZE, writable=True)
    part = mapping.bytes[4096:]
    assert mapping.bytes.ctypes.data % HUGE_PAGE_BYTES == 0
    assert len(mapping.bytes) == SIZE
    del mapping
    gc.collect()
    part[-1] = 7
    assert os.pread(fd, 1, SIZE - 1) == b"\x07"
    assert mapped_bytes(fd) == SIZE
    del part
    gc.collect()
    assert mapped_bytes(fd) == 0


def test_joining_pages_and_faulting_in_change_no_byte(fd: int) -> None:
    random = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    mapping = Mapping(fd, SIZE, writable=True)
    mapping.bytes[:] = random
    reader = Mapping(fd, SIZE, writable=False)
    for start in range(0, SIZE - HUGE_PAGE_BYTES, HUGE_PAGE_BYTES):
        mapping.collapse(start)  # Also if the kernel does not support it.
    assert mapping.fault_in(0, SIZE) and reader.fault_in(4096, SIZE)
    assert np.array_equal(reader.bytes, random)
    assert os.fstat(fd).st_blocks * 512 == SIZE


def test_a_mapping_for_reading_cannot_be_written(fd: int) -> None:
    with pytest.raises(ValueError, match="read-only"):
        Mapping(fd, SIZE, writable=False).bytes[0] = 1


def test_a_file_that_cannot_be_mapped_is_an_error_and_leaves_nothing_behind() -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="No such device"):
            Mapping(read_end, SIZE, writable=False)
    finally:
        os.close(read_end)
        os.close(write_end)
