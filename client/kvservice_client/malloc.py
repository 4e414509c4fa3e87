"""Makes glibc's malloc keep large buffers instead of returning them to the kernel.

Every frame is a buffer of a MiB. By default glibc maps and unmaps such buffers one by one, and the
page faults take longer than the copy: loads and saves run at half their speed.
"""

from __future__ import annotations

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BLOCK_BYTES = 32 * 2**20  # The most that glibc accepts.
_KEPT_FREE_BYTES = 256 * 2**20


@functools.cache
def keep_large_buffers() -> None:
    """Call it once per process. No effect if the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
