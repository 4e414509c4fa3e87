"""How long a call may take, and what is tried again."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kvservice_api.errors import DeadlineExceeded, KVError, Overloaded
from kvservice_client import arguments, forks

T = TypeVar("T")

_PAUSE_FIRST_S = 0.01
_PAUSE_MAX_S = 0.1
_LINGER_S = 10.0  # How long the watchdog's thread stays without work. A start per layer would take longer than a wait.


class Clock:
    """The client's time in seconds, from a clock that never goes back, and its waits. Tests pass another clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait for the event, at most that long. Whether it is set."""
        return event.wait(seconds)

    def wait_for(self, changed: threading.Condition, predicate: Callable[[], object], seconds: float) -> bool:
        """As ``changed.wait_for(predicate, seconds)``, with its lock held. Whether the predicate is true."""
        return bool(changed.wait_for(predicate, seconds))


SYSTEM_CLOCK = Clock()


class Deadline:
    """A moment on the client's clock."""

    def __init__(self, seconds: float, clock: Clock = SYSTEM_CLOCK) -> None:
        """Raises InvalidRequest where `seconds` is not a number from 0 to 1e9."""
        self.allowed_s = seconds = arguments.seconds(seconds, "timeout_s")
        self.clock = clock
        self.end_s = clock.now_s() + seconds

    @property
    def remaining_s(self) -> float:
        return max(0.0, self.end_s - self.clock.now_s())

    @property
    def of_stream_s(self) -> float | None:
        """The time for a stream that begins now; None if only `cancel` ends it."""
        return self.remaining_s

    @property
    def was_cancelled(self) -> bool:
        """Whether another thread has ended the streams under this deadline."""
        return False

    @property
    def idle_s(self) -> float | None:
        """How long the daemon may send nothing; None if only the whole time counts."""
        return None

    @property
    def error(self) -> KVError:
        """The error to raise when no time remains."""
        return DeadlineExceeded(f"the {self.allowed_s:.3g} s allowed for this call have passed")

    def check(self) -> None:
        if not self.remaining_s:
            raise self.error

    def add_call(self, cancel_call: Callable[[], object]) -> None:
        """A stream runs under this deadline. A deadline that can be cancelled then calls `cancel_call`."""

    def remove_call(self, cancel_call: Callable[[], object]) -> None:
        """The stream has ended."""

    def begin_answer(self) -> None:
        """The daemon's next answer is awaited from now on."""

    def end_answer(self) -> None:
        """It has arrived, or will not."""


class TransferDeadline(Deadline):
    """A moment for a whole transfer, or a time for each of its layers. Time between two layers does not count.

    With a time per layer, each wait for an answer of the daemon may have a shorter time, because a daemon that sends
    nothing hangs, and one that sends much works.

    gRPC fixes a call's deadline when the call begins. So the calls of a transfer with a time per layer have no deadline
    of their own, and the watchdog cancels them. `cancel` may be called from any thread.
    """

    def __init__(
        self, seconds: float, clock: Clock, watchdog: Watchdog | None = None, idle_s: float | None = None
    ) -> None:
        """With `watchdog`, `seconds` are for each layer, and `idle_s` for each answer. Raises InvalidRequest as
        `Deadline`.
        """
        super().__init__(seconds, clock)
        self._watchdog = watchdog
        self._idle_s = idle_s
        self._layer_s = seconds  # Of the layer that is awaited.
        self._layer_end_s = math.inf
        self._error: KVError | None = None
        self._calls: set[Callable[[], object]] = set()  # Each cancels a running call.
        if watchdog is not None:
            self.end_s = math.inf

    @property
    def is_per_layer(self) -> bool:
        return self._watchdog is not None

    @property
    def remaining_s(self) -> float:
        return 0.0 if self._error is not None else super().remaining_s

    @property
    def of_stream_s(self) -> float | None:
        return self.remaining_s if self._watchdog is None else None

    @property
    def was_cancelled(self) -> bool:
        return self._error is not None

    @property
    def idle_s(self) -> float | None:
        return self._idle_s if self._watchdog is not None else None

    @property
    def error(self) -> KVError:
        if self._error is not None:
            return self._error
        if self._watchdog is not None and self.end_s < self._layer_end_s:
            return DeadlineExceeded(f"the daemon sent nothing of the layer for {self._idle_s:.3g} s")
        if self._watchdog is not None:
            return DeadlineExceeded(f"the layer did not arrive within the {self._layer_s:.3g} s allowed for it")
        return super().error

    def check(self) -> None:
        if self._error is not None or self.clock.now_s() >= self.end_s:  # As `remaining_s`. Asked for each layer.
            raise self.error

    def check_cancelled(self) -> None:
        """Raises the error that ended the transfer."""
        if self._error is not None:
            raise self._error

    def begin_layer(self, allowed_s: float | None = None) -> None:
        """The time of a layer begins, or another time, `allowed_s`. Raises as `check_cancelled`."""
        self.check_cancelled()
        if self._watchdog is not None:
            self._layer_s = self.allowed_s if allowed_s is None else allowed_s
            self.end_s = self._layer_end_s = self.clock.now_s() + self._layer_s
            self._watchdog.add(self)

    def end_layer(self) -> None:
        if self._watchdog is not None:
            self._watchdog.remove(self)
            self.end_s = self._layer_end_s = math.inf

    def begin_answer(self) -> None:
        if self._watchdog is not None and self._idle_s is not None and self._layer_end_s < math.inf:
            self.end_s = min(self._layer_end_s, self.clock.now_s() + self._idle_s)
            self._watchdog.add(self)

    def end_answer(self) -> None:
        if self._watchdog is not None:
            self.end_s = self._layer_end_s

    @contextmanager
    def layer(self, allowed_s: float | None = None) -> Iterator[None]:
        self.begin_layer(allowed_s)
        try:
            yield
        finally:
            self.end_layer()

    def cancel(self, error: KVError) -> None:
        """End the running calls. The transfer raises `error`, or the error of an earlier `cancel`. Does not block."""
        if self._error is None:
            self._error = error
        for cancel_call in tuple(self._calls):
            cancel_call()

    def add_call(self, cancel_call: Callable[[], object]) -> None:
        self._calls.add(cancel_call)
        if self._error is not None:  # Checked after the call was added, so no `cancel` misses it.
            cancel_call()

    def remove_call(self, cancel_call: Callable[[], object]) -> None:
        self._calls.discard(cancel_call)


class Watchdog:
    """Cancels transfers whose layer did not arrive in time. Its thread runs while there are such transfers."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        self._changed = threading.Condition()
        self._watched: set[TransferDeadline] = set()
        self._has_thread = False
        self._wakes_at_s = 0.0
        self._must_look = False

    def add(self, deadline: TransferDeadline) -> None:
        """Raises Overloaded if there is no thread that could cancel it."""
        with self._changed:
            if not self._has_thread:
                try:
                    threading.Thread(target=self._run, name="kvservice-layers", daemon=True).start()
                except RuntimeError as error:
                    raise Overloaded(f"no thread for the time limits of transfers: {error}") from error
                self._has_thread = True
            elif deadline.end_s < self._wakes_at_s:  # Otherwise the thread sees it when it wakes up.
                self._must_look = True
                self._changed.notify()
            self._watched.add(deadline)

    def remove(self, deadline: TransferDeadline) -> None:
        with self._changed:
            self._watched.discard(deadline)

    def _run(self) -> None:
        while (late := self._late()) is not None:
            for each in late:
                each.cancel(each.error)  # Without our lock: gRPC has locks of its own.

    def _late(self) -> list[TransferDeadline] | None:
        """Wait for transfers that are late. None if there was no transfer for a while: the thread then ends."""
        with self._changed:
            while True:
                if late := [each for each in self._watched if not each.remaining_s]:
                    self._watched.difference_update(late)
                    return late
                now_s = self._clock.now_s()
                self._wakes_at_s = min((each.end_s for each in self._watched), default=now_s + _LINGER_S)
                self._must_look = False
                self._clock.wait_for(self._changed, lambda: self._must_look, self._wakes_at_s - now_s)
                if not self._watched and not self._must_look:
                    self._has_thread = False
                    return None


def retry(
    attempt: Callable[[], T],
    deadline: Deadline,
    patience_s: float,
    repair: Callable[[KVError], bool],
) -> T:
    """The result of `attempt`, which may run more than once.

    After an error, `repair` says whether another attempt can help. Attempts end with the deadline,
    or after `patience_s`, whichever is earlier: an engine recomputes rather than waits.
    """
    patience = Deadline(min(patience_s, deadline.remaining_s), deadline.clock)
    pause_s = _PAUSE_FIRST_S
    while True:
        deadline.check()
        try:
            return attempt()
        except KVError as error:
            if not repair(error) or patience.remaining_s < pause_s:
                raise
        deadline.clock.sleep(pause_s)  # Below the remaining time of patience and deadline, which were checked above.
        pause_s = min(2 * pause_s, _PAUSE_MAX_S)
