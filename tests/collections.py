"""When the garbage collector runs, and on which thread."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """In this block cycles of objects are freed only by `gc.collect`, on the thread that calls it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
