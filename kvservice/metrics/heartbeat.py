"""How punctual the event loop is."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import time
from typing import Self

from kvservice.clock import Clock
from kvservice.counters import Durations

log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None)

BEAT_S = 0.005
IDLE_BEAT_S = 0.04  # A beat takes 0.12 ms of a processor when the loop is idle, so these 0.3 %.
_BUSY_SHARE = 0.05  # Of a beat, the event loop's processor time from which on the loop is not idle. A beat takes 1 %.
_WINDOW_S = 3.0
_LOGGED_S = 0.01
_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)


class Heartbeat:
    """Measures the event loop's delay: how much later than due each of its beats runs.

    A beat is due every 5 ms while the loop works, and every 40 ms while it is idle. So a callback that blocks an idle
    loop for longer than 40 ms delays a beat, by its time less 40 ms at least; of a shorter one there may be no trace.
    The time for which the loop's thread waited for a processor is measured too: it is the machine's delay, not the
    daemon's. With `log.level` at debug, each beat that is later than 10 ms is a line of the log.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._processor_wait = _ProcessorWait()
        self._beat_at_s: float | None = None
        self._beat_s = IDLE_BEAT_S  # From that beat to the next.
        self._waited_s = self._used_s = 0.0  # At that beat.
        self.latest_ms = self.own_latest_ms = 0.0  # The worst since the start; without the time without a processor.
        self._recent_ms = [0.0, 0.0]  # The worst of the last whole window, and of the one that runs.
        self._window_ends_s = 0.0
        self.delays, self.own_delays = Durations(_BOUNDS_S), Durations(_BOUNDS_S)

    async def run(self) -> None:
        """Beats until it is cancelled. Timers without a task: a beat that wakes one takes half as much again."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def beat() -> None:
            if ended.done():
                return
            try:
                loop.call_later(self.beat(), beat)
            except Exception as error:
                ended.set_exception(error)

        with self._processor_wait:
            beat()
            await ended

    def beat(self) -> float:
        """Count how late this beat is. Returns the seconds until the next one is due."""
        now_s, waited_s, used_s = self._clock.monotonic_s(), self._processor_wait.total_s(), time.thread_time()
        if self._beat_at_s is not None:
            due = self._beat_at_s + self._beat_s
            late_s = max(0.0, now_s - due)
            own_s = max(0.0, late_s - (waited_s - self._waited_s))
            self.delays.observe(late_s)
            self.own_delays.observe(own_s)
            self.latest_ms = max(self.latest_ms, late_s * 1000)
            self.own_latest_ms = max(self.own_latest_ms, own_s * 1000)
            if due >= self._window_ends_s:
                self._recent_ms = [self._recent_ms[1], 0.0]
                self._window_ends_s = due + _WINDOW_S
            self._recent_ms[1] = max(self._recent_ms[1], late_s * 1000)
            if late_s > _LOGGED_S and log.isEnabledFor(logging.DEBUG):
                line = {
                    "at_s": now_s,
                    "late_ms": late_s * 1000,
                    "own_ms": own_s * 1000,
                    "used_ms": (used_s - self._used_s) * 1000,  # Of a processor, since the last beat.
                    "processor": _libc.sched_getcpu(),  # Of a virtual machine: its host may have stopped this one only.
                }
                log.debug("the event loop was late", extra=line)
            self._beat_s = next_beat_s(self._beat_s, used_s - self._used_s)
        self._beat_at_s, self._waited_s, self._used_s = now_s, waited_s, used_s
        return self._beat_s

    @property
    def recent_ms(self) -> float:
        """The worst of the last few seconds."""
        return max(self._recent_ms)

    @property
    def silent_s(self) -> float | None:
        """The seconds since the last beat; None before the first one. May be called from any thread."""
        return None if self._beat_at_s is None else self._clock.monotonic_s() - self._beat_at_s


def next_beat_s(beat_s: float, used_s: float) -> float:
    """When the next beat is due, in seconds: soon if the loop's thread used the processor for long in the last beat."""
    return BEAT_S if used_s > _BUSY_SHARE * beat_s else IDLE_BEAT_S


class _ProcessorWait:
    """How long this thread has been ready to run without a processor to run on, as the kernel counts it."""

    _fd = -1

    def __enter__(self) -> Self:
        try:
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # A kernel that does not count it.
            self._fd = -1
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def total_s(self) -> float:
        if self._fd < 0:
            return 0.0
        _on_processor_ns, waited_ns, _slices = os.pread(self._fd, 100, 0).split()
        return int(waited_ns) / 1e9
