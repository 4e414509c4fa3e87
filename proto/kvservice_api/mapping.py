"""Maps shared memory so that Linux can use huge pages for it. With small pages a copy has half the speed.

A new arena file has small pages, except on a tmpfs mounted with ``huge=``. Linux 6.1 and later can collapse
them to huge pages in place, without changing their bytes. Without huge pages everything works, but slower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE_BYTES = 2 << 20

# Calls through ctypes do not hold the interpreter's lock; `mmap.madvise` does.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_HUGEPAGE, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 14, 22, 23, 25


class Mapping:
    """A mapped file that begins at the start of a huge page. Unmapped when no array refers to its bytes."""

    def __init__(self, fd: int, size_bytes: int, *, writable: bool) -> None:
        """`fd` may be closed afterwards. Raises OSError."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.size_bytes = size_bytes
        self._address = _aligned_map(fd, size_bytes, protection)
        self._populate = _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ
        _libc.madvise(self._address, size_bytes, _MADV_HUGEPAGE)
        unmap = weakref.finalize(self, _libc.munmap, self._address, size_bytes)
        unmap.atexit = False  # Threads may still read it at exit, and the kernel unmaps it anyway.
        self.__array_interface__ = {
            "data": (self._address, not writable),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The whole file, shape [size_bytes]. The array, and every view of it, keeps the mapping alive."""
        return np.asarray(self)

    def fault_in(self, start: int, end: int) -> bool:
        """Map these pages ahead of their use, without changing them. False if the kernel refuses, which is harmless."""
        return not _libc.madvise(self._address + start, end - start, self._populate)

    def collapse(self, start: int) -> bool:
        """Collapse the small pages at byte `start` to one huge page. False if the kernel refuses."""
        assert start % HUGE_PAGE_BYTES == 0
        return not _libc.madvise(self._address + start, HUGE_PAGE_BYTES, _MADV_COLLAPSE)


def _aligned_map(fd: int, size_bytes: int, protection: int) -> int:
    """Map the file into a reservation with space for alignment, and unmap the rest of the reservation."""
    reserved_bytes = size_bytes + HUGE_PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    reserved = _libc.mmap(None, reserved_bytes, 0, flags, -1, 0)
    if reserved == _MAP_FAILED:
        raise _error()
    start = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    if _libc.mmap(start, size_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == _MAP_FAILED:
        error = _error()
        _libc.munmap(reserved, reserved_bytes)
        raise error
    end = -(-(start + size_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    if start > reserved:
        _libc.munmap(reserved, start - reserved)
    if (rest := reserved + reserved_bytes - end) > 0:
        _libc.munmap(end, rest)
    return int(start)


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
