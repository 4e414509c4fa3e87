"""The work of one transfer, shared among the thread that waits for it and threads that help."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from kvservice_api.copying import native
from kvservice_client import forks
from kvservice_client.retry import Deadline

_PART_BYTES = 1 << 20
HELPED_BYTES_MIN = 2 * _PART_BYTES
# With the waiting thread, no more than processors. In pure Python a thread often waits for the interpreter's lock.
_HELPERS = 2 if native is None else max(1, min(2, len(os.sched_getaffinity(0)) - 1))


class Copiers:
    """Threads that help with copies, which release the interpreter's lock while they work."""

    def __init__(self) -> None:
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def begin(self, size_bytes: int) -> Batch:
        """For a transfer of so many bytes. The waiting thread copies a small one sooner than a helper begins."""
        return Batch(self.pool, _HELPERS if size_bytes >= HELPED_BYTES_MIN else 0)

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

    def __init__(self, pool: Callable[[], ThreadPoolExecutor], helpers: int = _HELPERS) -> None:
        self._pool = pool
        self._helpers_max = helpers
        # Re-entrant: the garbage collector may leave a batch on any thread, also on a helper's.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._parts: deque[tuple[Group, Callable[[range], None], range]] = deque()
        self._helping = 0
        self._running: set[int] = set()  # The threads that run a part now.
        self._generation = forks.generation

    def start(
        self, work: Callable[[range], None], sizes: Sequence[int] | NDArray[np.int64], part_bytes: int = _PART_BYTES
    ) -> Group:
        """`work` on all positions in `sizes`, in parts of `part_bytes` or a little more: it is called with consecutive
        positions.
        """
        parts = list(_parts(sizes, part_bytes))
        group = Group(len(parts))
        with self._lock:
            self._parts.extend((group, work, part) for part in parts)
            others = len(self._parts) - 1  # The waiting thread does one of the parts.
            wanted = max(0, min(self._helpers_max, others) - self._helping)
            self._helping += wanted
        with suppress(RuntimeError):  # No thread can be started: the waiting thread does all parts.
            for _ in range(wanted):
                self._pool().submit(self._help)
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

    def _next(self, *, helper: bool = False) -> tuple[Group, Callable[[range], None], range] | None:
        with self._lock:
            if self._parts:
                self._running.add(threading.get_ident())
                return self._parts.popleft()
            self._helping -= helper  # In one step with the check of the queue: later work requests another helper.
            return None

    def _run(self, group: Group, work: Callable[[range], None], part: range) -> None:
        try:
            if group.error is None:
                work(part)
        except BaseException as error:  # The waiting thread raises it. An interrupt is raised at once.
            group.error = group.error or error
            if not isinstance(error, Exception):
                raise
        finally:
            with self._lock:
                self._running.remove(threading.get_ident())
                if not self._parts:  # Only then may a thread wait for the end of all.
                    self._changed.notify_all()
                group.left -= 1
                if not group.left:
                    group.done.set()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._generation != forks.generation:
            return  # The helpers and their work exist only in the parent.
        # The garbage collector may call this within a part: that one cannot be waited for.
        own = threading.get_ident()
        interrupt: BaseException | None = None
        is_over = False
        while not is_over:
            try:
                with self._lock:
                    self._parts.clear()
                    is_over = self._changed.wait_for(lambda: self._running <= {own})
            except BaseException as error:  # Of a signal handler. No part may run after this returns.
                interrupt = error
        if interrupt is not None:
            raise interrupt


def _parts(sizes: Sequence[int] | NDArray[np.int64], part_bytes: int) -> Iterable[range]:
    """Consecutive positions of `part_bytes` or a little more in total."""
    ends = np.cumsum(sizes)
    start = done_bytes = 0
    while start < len(ends):
        end = min(int(np.searchsorted(ends, done_bytes + part_bytes)) + 1, len(ends))
        yield range(start, end)
        start, done_bytes = end, int(ends[end - 1])
