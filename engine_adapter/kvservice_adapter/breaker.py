"""A circuit breaker: once the daemon does not answer, requests stop asking it, and a thread finds out when it does.

*Closed*: requests ask the daemon. After `failures` failed ones in a row it *opens*: requests are computed as
if there were no cache, and the daemon is not asked. A thread that exists only while it is open probes the daemon every
`probe_s`; while a probe runs the breaker is *half-open*, which for requests is the same as open: none of
them pays for the probe. The first probe that succeeds closes it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from enum import StrEnum
from typing import Self

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError
from kvservice_client import BlockCache
from kvservice_client.retry import SYSTEM_CLOCK, Clock

_PROBE_TIMEOUT_S = 0.25


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Thread-safe. `close` it, or use it as a context manager: its thread does not outlive it."""

    def __init__(
        self,
        probe: Callable[[], bool],
        *,
        failures: int = 2,
        probe_s: float = 0.5,
        clock: Clock = SYSTEM_CLOCK,
        on_change: Callable[[bool], None] = lambda is_open: None,
    ) -> None:
        """`probe` asks the daemon, within a time of its own, and returns whether it answered. An exception counts as
        no answer. The pauses between probes go by `clock`. `on_change` is called when it has opened (True) or closed
        (False), with its lock held.
        """
        if failures < 1 or probe_s <= 0:
            raise ValueError("a breaker needs at least one failure, and time between its probes")
        self._probe = probe
        self._failures_max = failures
        self._probe_s = probe_s
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._failures = 0
        self._state = State.CLOSED
        self._opened = 0
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()
        weakref.finalize(self, self._ends.set)  # One that is dropped without `close` leaves no thread either.

    @property
    def state(self) -> State:
        return self._state

    @property
    def times_opened(self) -> int:
        return self._opened

    def allow(self) -> bool:
        """Whether to ask the daemon. Does not wait, and takes no lock."""
        return self._state is State.CLOSED

    def record(self, ok: bool) -> None:
        """Report how an allowed request ended. Answers of any kind are `ok`; no answer in time is not.

        While the breaker is open only a probe can close it. Late reports of earlier requests are ignored.
        """
        if ok and not self._failures:
            return
        with self._lock:
            if self._state is not State.CLOSED or self._ends.is_set():
                return
            self._failures = 0 if ok else self._failures + 1
            if self._failures >= self._failures_max:
                self._open()

    def _open(self) -> None:
        arguments = (weakref.ref(self), self._ends, self._probe_s, self._clock)
        thread = threading.Thread(target=_run, args=arguments, name="kvservice-breaker", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # The process has too many threads. Without one to probe it would stay open for ever.
            return
        self._thread = thread
        self._state = State.OPEN
        self._opened += 1
        self._on_change(True)

    def _probed(self) -> bool:
        """Probe once. Whether the breaker is closed."""
        self._state = State.HALF_OPEN
        try:
            answered = self._probe()
        except Exception:  # Any error of the probe means that the daemon cannot be used yet.
            answered = False
        with self._lock:
            self._state = State.CLOSED if answered else State.OPEN
            if answered:
                self._failures, self._thread = 0, None
                self._on_change(False)
        return answered

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread, once a probe that runs has ended. The breaker stays as it is."""
        self._ends.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _run(
    breaker: weakref.ref[Breaker],
    ends: threading.Event,
    probe_s: float,
    clock: Clock,
) -> None:
    """Probe until the breaker is closed or garbage collected: the waiting thread has no reference to it."""
    while not clock.wait(ends, probe_s):
        open_breaker = breaker()
        if open_breaker is None or open_breaker._probed():
            return
        del open_breaker


def probe_of(blocks: BlockCache, timeout_s: float = _PROBE_TIMEOUT_S) -> Callable[[], bool]:
    """A probe that makes a request's calls: attach, open the layout, and wait for the daemon's answer."""

    def probe() -> bool:
        blocks.ping(timeout_s)
        return True

    return probe


def answered(error: KVError | None) -> bool:
    """Whether a request that ended with this error got an answer from the daemon. A refusal is an answer too."""
    return type(error) not in (DaemonUnavailable, DeadlineExceeded)
