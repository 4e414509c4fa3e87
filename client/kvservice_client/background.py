"""Threads of a client for work that waits for the daemon while the caller does not."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable

from kvservice_client import forks

log = logging.getLogger(__name__)

THREADS_MAX = 4

Work = Callable[[], object]


class Background:
    """Runs work in the order in which it was submitted, on at most four threads, which start when they are needed.

    Thread-safe, and re-entrant: a destructor that the garbage collector runs may submit work at any place.
    """

    def __init__(self) -> None:
        self._is_closed = False
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        """Begin with an empty queue: the parent does its own work."""
        self._changed = threading.Condition()  # Of a re-entrant lock.
        self._queue: deque[Work] = deque()
        self._once: set[Hashable] = set()
        self._threads: set[threading.Thread] = set()
        self._idle = 0

    def submit(self, work: Work) -> None:
        """Run `work` on a thread. Does not wait. While the interpreter exits, work may not run any more."""
        with self._changed:
            self._queue.append(work)
            self._changed.notify()
            if len(self._queue) > self._idle and len(self._threads) < THREADS_MAX:
                self._start_thread()

    def submit_once(self, name: Hashable, work: Work) -> None:
        """Run `work`, unless work of this name is queued or running."""
        with self._changed:
            if name in self._once:
                return
            self._once.add(name)

        def run() -> None:
            try:
                work()
            finally:
                self._once.discard(name)

        self.submit(run)

    def close(self) -> None:
        """End the threads once their work is done. Work that is submitted later still runs."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait until the threads of a closed object have ended, at most that long."""
        with self._changed:  # Each of them has started then.
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s / THREADS_MAX)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="kvservice-background", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # The interpreter exits, or the process has too many threads.
            self._threads.discard(thread)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:  # The thread's next work must run too.
                log.exception("a background task of the client failed")
            del work  # What it refers to must not live until the next work.

    def _next(self) -> Work | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            self._idle -= 1
            if self._queue:
                return self._queue.popleft()
            self._threads.discard(threading.current_thread())
            return None
