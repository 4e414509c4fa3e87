"""Copies between the arena and private memory, with the checksum taken while a piece is in the cache."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import xxhash

from kvservice_api.image import checksum
from kvservice_client import forks
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline

PIECE_BYTES = 512 << 10  # Larger ones leave the caches before their checksum is computed; smaller ones cost calls.
_BY_WORDS_BYTES_MIN = 32 << 10  # Below this size, choosing the copy routine costs more than it saves.
_PART_BYTES = 1 << 20
_HELPERS = 2  # One core rarely saturates the memory bus while it also computes checksums.


def copy_and_sum(source: Bytes, target: Bytes) -> int:
    """Copy all of `source`. Returns the checksum of the copy, read back from the processor's cache."""
    if len(source) <= PIECE_BYTES:
        _copy(source, target, by_words=_copies_by_words(source, target))
        return checksum(target.data)
    digest = xxhash.xxh3_64()
    _copy_in_pieces(source, target, digest, summed=target)
    return digest.intdigest()


def sum_and_copy(source: Bytes, target: Bytes) -> int:
    """Copy all of `source`. Returns the checksum of the source, so that an error in the copy is detected later."""
    if len(source) <= PIECE_BYTES:
        _copy(source, target, by_words=_copies_by_words(source, target))
        return checksum(source.data)
    digest = xxhash.xxh3_64()
    _copy_in_pieces(source, target, digest, summed=source)
    return digest.intdigest()


def copy_runs_and_sum(source: Bytes, runs: Sequence[tuple[int, int]], target: Bytes) -> int:
    """Copy some runs of bytes (start, end), one after the other. Returns the checksum of all of `source`.

    For the bytes of the runs, the checksum reads the copies.
    """
    digest = xxhash.xxh3_64()
    filled = position = 0
    for start, end in runs:
        digest.update(source[position:start].data)
        copied = target[filled : filled + end - start]
        _copy_in_pieces(source[start:end], copied, digest, summed=copied)
        filled, position = filled + end - start, end
    digest.update(source[position:].data)
    return digest.intdigest()


def _copy_in_pieces(source: Bytes, target: Bytes, digest: xxhash.xxh3_64, *, summed: Bytes) -> None:
    """Add each piece of `summed` (`source` or `target`) to the digest right after its copy, while it is in the
    cache.
    """
    by_words = _copies_by_words(source, target)
    for start in range(0, len(source), PIECE_BYTES):
        piece = slice(start, start + PIECE_BYTES)
        _copy(source[piece], target[piece], by_words=by_words)
        digest.update(summed[piece].data)


def _copy(source: Bytes, target: Bytes, *, by_words: bool) -> None:
    if by_words:
        np.positive(source.view(np.uint64), out=target.view(np.uint64))
    else:
        np.copyto(target, source)


def _copies_by_words(source: Bytes, target: Bytes) -> bool:
    """Whether NumPy's own loop over words is faster, whose speed does not depend on alignment.

    Processors' string copies run at a third of their speed for some relative alignments of source and target, such as
    a buffer from malloc and a page of the arena: their addresses differ by 16 bytes, modulo the page size.
    """
    if len(source) < _BY_WORDS_BYTES_MIN or len(source) % 8:
        return False
    distance: int = target.__array_interface__["data"][0] - source.__array_interface__["data"][0]
    return distance % 32 != 0 and distance % 8 == 0


class Copiers:
    """Threads that help with copies. NumPy and xxhash release the interpreter's lock while they work."""

    def __init__(self) -> None:
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def begin(self) -> Batch:
        return Batch(self.pool)

    def pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_HELPERS, thread_name_prefix="kvservice-copy")
            return self._threads


class Group:
    """The parts of one piece of work. A thread waits for all of them together."""

    def __init__(self, parts: int) -> None:
        self.left = parts
        self.error: BaseException | None = None
        self.done = threading.Event()
        if not parts:
            self.done.set()


class Batch:
    """The work of one transfer, done by the waiting thread and by helper threads, as soon as it is added.

    The hand-over of each part to a thread, with a wait for it, takes a third of the time of a large load.
    A context manager: leaving it waits for running parts, because they use the caller's memory.
    """

    def __init__(self, pool: Callable[[], ThreadPoolExecutor]) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._parts: deque[tuple[Group, Callable[[int], None], range]] = deque()
        self._helping = 0
        self._helpers: list[Future[None]] = []
        self._generation = forks.generation

    def start(self, work: Callable[[int], None], sizes: Sequence[int]) -> Group:
        """`work` on all positions in `sizes`, in parts of a MiB and more."""
        parts = list(_parts(sizes))
        group = Group(len(parts))
        with self._lock:
            self._parts.extend((group, work, part) for part in parts)
            wanted = min(_HELPERS, len(self._parts) - 1) - self._helping  # The waiting thread does one of the parts.
            self._helping += max(0, wanted)
        self._helpers += [self._pool().submit(self._help) for _ in range(wanted)]
        return group

    def finish(self, group: Group, deadline: Deadline) -> None:
        """Run parts until the group is done. Raises the first error of a part of it, or the deadline's."""
        while not group.done.is_set() and deadline.remaining_s and (part := self._next()):
            self._run(*part)
        if not deadline.clock.wait(group.done, deadline.remaining_s):
            raise deadline.error
        if group.error is not None:
            raise group.error

    def _help(self) -> None:
        while part := self._next(helper=True):
            self._run(*part)

    def _next(self, *, helper: bool = False) -> tuple[Group, Callable[[int], None], range] | None:
        with self._lock:
            if self._parts:
                return self._parts.popleft()
            self._helping -= helper  # In one step with the check of the queue: later work requests another helper.
            return None

    def _run(self, group: Group, work: Callable[[int], None], part: range) -> None:
        try:
            if group.error is None:
                for position in part:
                    work(position)
        except BaseException as error:  # The waiting thread raises it. An interrupt is raised at once.
            group.error = group.error or error
            if not isinstance(error, Exception):
                raise
        finally:
            with self._lock:
                group.left -= 1
                if not group.left:
                    group.done.set()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._generation != forks.generation:
            return  # The helpers and their work exist only in the parent.
        with self._lock:
            self._parts.clear()
        running = [helper for helper in self._helpers if not helper.cancel()]
        interrupt: BaseException | None = None
        while not all(helper.done() for helper in running):
            try:
                wait(running)
            except BaseException as error:  # Of a signal handler. No part may run after this returns.
                interrupt = error
        if interrupt is not None:
            raise interrupt


def _parts(sizes: Sequence[int]) -> Iterable[range]:
    """Consecutive positions of `_PART_BYTES` or a little more in total."""
    start = total = 0
    for position, size in enumerate(sizes):
        total += size
        if total >= _PART_BYTES:
            yield range(start, position + 1)
            start, total = position + 1, 0
    if start < len(sizes):
        yield range(start, len(sizes))
