"""The key generation of an engine: read from the daemon once, and changed only by the engine's own resets.

It is not read again, also not from a restarted daemon: the engine's weights are still those of its generation, and
another engine may have begun a new generation for other weights.
"""

from __future__ import annotations

import logging
import threading

from kvservice_api.errors import KVError
from kvservice_client import BlockCache, Clock
from kvservice_client.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

_RETRY_S = 1.0
_CALL_S = 10.0  # The daemon answers once its disk has written a file.


class KeyGeneration:
    """Thread-safe. A thread calls the daemon; it exists only until the generation is known."""

    def __init__(self, blocks: BlockCache, clock: Clock) -> None:
        """Begins to read the generation, and does not wait for it."""
        self._blocks = blocks
        self._clock = clock
        self._lines = RateLimitedLog(log)
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._number: int | None = None
        self._must_begin = False  # The generation that the daemon has must not be used any more.
        self._thread: threading.Thread | None = None
        self._start()

    @property
    def number(self) -> int | None:
        """None until the daemon has answered: then no key can be computed. Does not wait."""
        return self._number

    def begin(self, wait_s: float) -> bool:
        """Begin a new generation; waits for the daemon at most `wait_s`. Whether it is durable.

        False: `number` is None until the thread has begun one. The former is not used again.
        """
        with self._changed:
            self._number, self._must_begin = None, True
            if self._thread is None:
                self._start()
            return self._clock.wait_for(self._changed, lambda: self._number is not None, wait_s)

    def close(self) -> None:
        """End the thread, once its call has ended. Does not wait."""
        self._closed.set()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="kvservice-generation", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                if self._ask():
                    return
            except Exception as error:  # The thread must try again: without a number nothing is looked up or saved.
                reason = error.reason if isinstance(error, KVError) else type(error).__name__
                self._lines.warning(
                    "nothing is looked up or saved until the daemon gives a key generation: %s: %s",
                    reason,
                    error,
                    kind=str(reason),
                )
                self._clock.wait(self._closed, _RETRY_S)

    def _ask(self) -> bool:
        """Ask the daemon once. Whether the number is set: not if a reset came meanwhile. Raises KVError."""
        must_begin = self._must_begin
        number = self._blocks.begin_generation(_CALL_S) if must_begin else self._blocks.generation(_CALL_S)
        with self._changed:
            if must_begin != self._must_begin:
                return False
            self._number, self._must_begin, self._thread = number, False, None
            self._changed.notify_all()
        return True
