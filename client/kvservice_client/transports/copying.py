"""Copies between the arena and private memory, with the checksum taken while a piece is in the cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import numpy as np
import xxhash

from kvservice_api.errors import DeadlineExceeded
from kvservice_api.layout import checksum
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline

PIECE_BYTES = 1 << 20  # Larger ones leave the caches before their checksum is taken; smaller ones cost calls.
_AT_ONCE_BYTES = 32 << 10
_TASK_BYTES = 8 << 20  # Less work than this is not worth handing to a thread.
_THREADS = 2  # One core seldom fills the memory bus while it also computes checksums.


def copy_and_sum(source: Bytes, target: Bytes) -> int:
    """Copy all of it; the answer is the checksum of the copy, read back from the cache."""
    size = len(source)
    if size <= _AT_ONCE_BYTES:
        np.copyto(target, source)
        return checksum(target.data)
    digest = xxhash.xxh3_64()
    for _, copied in _copy_in_pieces(source, target):
        digest.update(copied.data)
    return digest.intdigest()


def sum_and_copy(source: Bytes, target: Bytes) -> int:
    """Copy all of it; the answer is the checksum of the source: of what was meant, whatever becomes of the copy."""
    size = len(source)
    if size <= _AT_ONCE_BYTES:
        np.copyto(target, source)
        return checksum(source.data)
    digest = xxhash.xxh3_64()
    for piece, _ in _copy_in_pieces(source, target):
        digest.update(piece.data)
    return digest.intdigest()


def copy_runs_and_sum(source: Bytes, runs: Sequence[tuple[int, int]], target: Bytes) -> int:
    """Copy some runs of bytes (start, end), one behind the other; the answer is the checksum of all of `source`.

    Of the runs it is the copies that are read for it.
    """
    digest = xxhash.xxh3_64()
    filled = position = 0
    for start, end in runs:
        digest.update(source[position:start].data)
        for _, copied in _copy_in_pieces(source[start:end], target[filled : filled + end - start]):
            digest.update(copied.data)
        filled, position = filled + end - start, end
    digest.update(source[position:].data)
    return digest.intdigest()


def _copy_in_pieces(source: Bytes, target: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
    """Each piece and its copy, right after the copying: both are in the cache.

    Processors copy strings at a third of their speed where source and target lie badly to each other, as a
    buffer from malloc and a page of the arena do: 16 bytes apart, but for whole pages. NumPy's own loop over
    words does not care.
    """
    distance = target.__array_interface__["data"][0] - source.__array_interface__["data"][0]
    by_words = distance % 32 and not distance % 8 and not len(source) % 8
    for start in range(0, len(source), PIECE_BYTES):
        piece, copied = source[start : start + PIECE_BYTES], target[start : start + PIECE_BYTES]
        if by_words:
            np.positive(piece.view(np.uint64), out=copied.view(np.uint64))
        else:
            np.copyto(copied, piece)
        yield piece, copied


class Copiers:
    """Threads that copy. NumPy and xxhash let go of the interpreter's lock while they work."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def begin(self) -> Batch:
        return Batch(self.pool)

    def pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kvservice-copy")
            return self._threads


class Batch:
    """Work of one transfer. A context manager: leaving it waits for what runs, for it uses the caller's memory."""

    def __init__(self, pool: Callable[[], ThreadPoolExecutor]) -> None:
        self._pool = pool
        self._jobs: set[Future[None]] = set()
        self.stopping = threading.Event()

    def start(self, work: Callable[[int], None], sizes: Sequence[int]) -> list[Future[None]]:
        """`work` on all positions in `sizes`, in parts of some MiB; at once and here where there is little to do."""
        parts = list(_parts(sizes))
        if len(parts) == 1 and sum(sizes) < _TASK_BYTES:
            done: Future[None] = Future()
            self._run(work, parts[0])
            done.set_result(None)
            return [done]
        jobs = [self._pool().submit(self._run, work, part) for part in parts]
        self._jobs.update(jobs)
        return jobs

    def finish(self, jobs: Iterable[Future[None]], deadline: Deadline) -> None:
        """Wait for them. Raises what the first of them to fail raised, or DeadlineExceeded."""
        jobs = list(jobs)
        wait(jobs, timeout=deadline.remaining_s, return_when=FIRST_EXCEPTION)
        for job in jobs:
            if job.done():
                job.result()
        if not all(job.done() for job in jobs):
            raise DeadlineExceeded(f"the {deadline.allowed_s:.3g} s allowed for this call have passed")
        self._jobs.difference_update(jobs)

    def _run(self, work: Callable[[int], None], part: range) -> None:
        for position in part:
            if self.stopping.is_set():
                return
            work(position)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        interrupt: BaseException | None = None
        while not all(job.done() for job in self._jobs):
            try:
                wait(self._jobs)
            except BaseException as error:  # A signal's. No work may outlive this, and what runs ends soon.
                interrupt = error
        if interrupt is not None:
            raise interrupt


def _parts(sizes: Sequence[int]) -> Iterable[range]:
    """Consecutive positions that make up `_TASK_BYTES` or a little more."""
    start = total = 0
    for position, size in enumerate(sizes):
        total += size
        if total >= _TASK_BYTES:
            yield range(start, position + 1)
            start, total = position + 1, 0
    if start < len(sizes):
        yield range(start, len(sizes))
