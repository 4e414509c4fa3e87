"""Files of tiers: the system calls that tiers make on them, and the threads that make these calls."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice_api.errors import StorageFailed
from kvservice_api.file_parts import FilePart, read_parts

T = TypeVar("T")

WRITE = float("inf")  # Later than any read.
_READS_IN_A_ROW_MAX = 32  # The most reads before a waiting write. Otherwise endless reads would block all saves.


def file_system_of(path: Path) -> str:
    """The type of the path's file system, such as ``ext4``; empty if it is not known."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # 36 35 98:0 /root /mount/point options [tags ...] - kind source options
    kinds = (fields[fields.index("-") + 1] for line in mounts.splitlines() if (fields := line.split())[2] == number)
    return next(kinds, "")


class FileCalls:
    """As in ``os``, with the same errors. Tests pass a subclass that fails a call, shortens it, or records it."""

    def open(self, path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def read_parts(self, fd: int, parts: Sequence[FilePart]) -> list[NDArray[np.uint64] | None]:
        """As `file_parts.read_parts`; by `preadv` of a subclass, if that has its own."""
        own = type(self).preadv is not FileCalls.preadv
        return read_parts(fd, parts, self.preadv if own else None)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        os.posix_fallocate(fd, offset, length)


async def ended(future: asyncio.Future[Any]) -> None:
    """Wait for the end of `future`, also if the awaiting task is cancelled. Its outcome is ignored."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({future})


async def on_thread(work: Callable[[], T], executor: Executor | None = None) -> T:
    """What `work` returns, on a thread of `executor`, by default of asyncio's own.

    If the awaiting task is cancelled, CancelledError is raised only once `work` has ended: until then a thread may
    use the memory that it was given.
    """
    job = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(job)
    finally:
        await ended(job)
        if not job.cancelled():
            job.exception()  # Asyncio logs one that was not asked for, as after a cancellation.


def executor_of(threads: int, name: str) -> ThreadPoolExecutor:
    """An executor whose threads run from now on: later the process may get none, and calls would fail.

    Raises RuntimeError if a thread cannot be started.
    """
    executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
    all_run = threading.Event()
    try:
        for _ in range(threads):
            executor.submit(all_run.wait)  # As no thread is idle, each call starts one.
    finally:
        all_run.set()  # Otherwise the process could not end.
    return executor


class _Job(Generic[T]):
    __slots__ = ("_claim", "_loop", "_work", "future", "is_prepared", "prepare")

    def __init__(self, work: Callable[[], T], prepare: Callable[[], object] | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._work = work
        self.prepare = prepare  # Called before `work`, once; then None.
        self.is_prepared = False
        self._claim = threading.Lock()
        self.future: asyncio.Future[T] = self._loop.create_future()

    def claim(self) -> bool:
        """True for the first caller: the thread that runs the job, or the task that cancels it."""
        return self._claim.acquire(blocking=False)

    def run_prepare(self) -> bool:
        """Whether the work may follow: otherwise the job has failed."""
        prepare, self.prepare = self.prepare, None
        assert prepare is not None
        self.is_prepared = self._run(prepare, is_last=False)
        return self.is_prepared

    def run(self) -> None:
        self._run(self._work, is_last=True)

    def _run(self, work: Callable[[], object], *, is_last: bool) -> bool:
        try:
            result = work()
        except OSError as error:  # A tier may rely on its pool for this.
            self._end(
                self.future.set_exception,
                StorageFailed(str(error), errno=errno.errorcode.get(error.errno or 0, "unknown")),
            )
        except BaseException as error:
            self._end(self.future.set_exception, error)
        else:
            if is_last:
                self._end(self.future.set_result, result)
            return True
        return False

    def _end(self, settle: Callable[[Any], None], outcome: object) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed, so no task waits any more.
            self._loop.call_soon_threadsafe(settle, outcome)


class IoPool:
    """Threads for disk I/O that take reads before writes, and urgent reads before others.

    Writes never have all of several threads: a read that comes finds one that does not write. It may have to wait for
    other reads, and for the preparations of writes, such as checksums, which are short. Threads run from construction
    until `close`. As with `on_thread`, cancellation waits for a job that has started.
    """

    def __init__(self, threads: int) -> None:
        self._reads: list[tuple[float, int, _Job[Any]]] = []  # A heap.
        self._writes: deque[_Job[Any]] = deque()
        self._unprepared: deque[_Job[Any]] = deque()  # Writes.
        self._writing = 0
        self._writes_max = max(1, threads - max(1, threads // 4))
        self._reads_in_a_row = 0
        self._order = itertools.count()  # Equal priorities: first come, first served.
        self._closing = False
        self._more = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"ssd-io-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, priority: float, work: Callable[[], T], prepare: Callable[[], object] | None = None) -> T:
        """Run `work` on a thread. Once begun, it runs to its end, even if the caller is cancelled.

        `prepare` is for writes only, and is called before, perhaps on another thread: while it runs, the disk writes
        for others. If it raises, `work` is not called.
        """
        assert prepare is None or priority == WRITE
        job = _Job(work, prepare)
        with self._more:
            assert not self._closing
            if priority != WRITE:
                heappush(self._reads, (priority, next(self._order), job))
            else:
                (self._writes if prepare is None else self._unprepared).append(job)
            self._more.notify()
        try:
            return await asyncio.shield(job.future)
        except asyncio.CancelledError:
            if not job.claim():
                await ended(job.future)
                job.future.exception()  # Asyncio logs one that was not asked for.
            raise

    def close(self) -> None:
        """Finish the queued jobs, then stop."""
        with self._more:
            self._closing = True
            self._more.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        wrote = False
        while (taken := self._next(wrote)) is not None:
            job, wrote = taken
            if job.prepare is None:
                job.run()
            elif job.run_prepare():
                with self._more:
                    self._writes.append(job)
                    self._more.notify()
            del job, taken  # Drop the job's reference to its caller's memory.

    def _next(self, wrote: bool) -> tuple[_Job[Any], bool] | None:
        """The next job, which is claimed, and whether it takes the place of a write. `wrote` says whether the thread's
        last one did.
        """
        with self._more:
            self._writing -= wrote
            while True:
                may_write = bool(self._writes) and self._writing < self._writes_max
                is_turn_of_writes = self._reads_in_a_row >= _READS_IN_A_ROW_MAX and (may_write or self._unprepared)
                if self._reads and not is_turn_of_writes:
                    self._reads_in_a_row = self._reads_in_a_row + 1 if self._writes or self._unprepared else 0
                    if (job := heappop(self._reads)[2]).claim():
                        return job, False
                elif may_write:
                    self._reads_in_a_row = 0
                    job = self._writes.popleft()
                    if job.is_prepared or job.claim():
                        self._writing += 1
                        return job, True
                elif self._unprepared:
                    self._reads_in_a_row = min(self._reads_in_a_row, _READS_IN_A_ROW_MAX - 1)
                    if (job := self._unprepared.popleft()).claim():
                        return job, False
                elif self._closing:  # The threads that write now carry out the writes that are left.
                    return None
                else:
                    self._more.wait()
