"""How glibc's malloc treats large buffers, for a whole process. Without effect where the C library is not glibc.

Every frame is a buffer of a MiB. By default glibc maps and unmaps such buffers one by one, and the
page faults take longer than the copy: loads and saves run at half their speed.
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BLOCK_BYTES = 32 * 2**20  # The most that every glibc accepts.


@functools.cache
def keep_large_buffers(free_bytes: int) -> None:
    """Freed buffers stay with the process, up to `free_bytes` of free memory at the end of the heap."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, free_bytes)


def return_free_memory() -> None:
    """Free memory goes back to the kernel, once."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
