"""The Attach stream, kept open by a background thread.

Leases and uploads belong to the stream and end with it. When it breaks, the thread attaches again. Another boot epoch
shows that the daemon has restarted. A client without leases or uploads is not affected.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import forks
from kvservice_client.channel import BLOCKS, Channel
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import SYSTEM_CLOCK, Clock, Deadline

log = logging.getLogger(__name__)

_PAUSE_FIRST_S = 0.05
_PAUSE_MAX_S = 1.0


class Attachment(NamedTuple):
    """The daemon's id for this client, valid while the stream is open."""

    client_id: bytes
    boot_epoch: int


def default_name() -> str:
    """The default name of a client: its host and process."""
    return f"{socket.gethostname()}/{os.getpid()}"


class AttachStream:
    """Keeps one attachment open. The thread starts at the first call that needs it."""

    def __init__(self, channel: Channel, client_name: str, clock: Clock = SYSTEM_CLOCK) -> None:
        """If `client_name` is empty, `default_name` of the attaching process is used."""
        self._channel = channel
        self._client_name = client_name
        self._clock = clock
        self._log = RateLimitedLog(log)
        self._closed = threading.Event()
        self._listeners: list[Callable[[], None]] = []
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        """Begin unattached: the attachment and its leases stay with the parent. A closed stream stays closed."""
        self._changed = threading.Condition()
        self._attachment: Attachment | None = None
        self._error: KVError = DaemonUnavailable("not attached yet")
        self._attempts_failed = 0
        self._thread: threading.Thread | None = None
        self._retry_now = threading.Event()  # A call waits for the attachment: end the pause between attempts.
        self._stop_stream = threading.Event()  # The current stream has ended, or must end.
        was_closed, self._closed = self._closed.is_set(), threading.Event()
        if was_closed:
            self._closed.set()

    def current(self, deadline: Deadline) -> Attachment:
        """The attachment. Without one, waits for the end of the next attempt, and raises its error if it failed."""
        attachment = self._attachment
        if attachment is not None:
            return attachment
        with self._changed:
            if self._closed.is_set():
                raise DaemonUnavailable("the client is closed")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="kvservice-attach", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise DaemonUnavailable(f"there is no thread to attach to the daemon: {error}") from error
                self._thread = thread
            attempt = self._attempts_failed + 1
            self._retry_now.set()
            has_ended = deadline.clock.wait_for(
                self._changed,
                lambda: self._attachment or self._attempts_failed >= attempt or self._closed.is_set(),
                deadline.remaining_s,
            )
            if self._attachment is not None:
                return self._attachment
            if not has_ended:
                raise DeadlineExceeded(f"the daemon at {self._channel.address} did not answer in time")
            raise type(self._error)(self._error.message)

    @property
    def latest(self) -> Attachment | None:
        """The attachment if there is one now. Does not wait."""
        return self._attachment

    def is_current(self, attachment: Attachment) -> bool:
        return self._attachment == attachment

    def is_attached_as(self, client_id: bytes) -> bool:
        attachment = self._attachment
        return attachment is not None and attachment.client_id == client_id

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` when an attachment has begun or ended, on the attach stream's thread."""
        self._listeners.append(listener)

    def close(self) -> None:
        """End the stream, and with it all leases. The channel must be closed after this."""
        with self._changed:
            self._closed.set()
            self._stop_stream.set()
            self._retry_now.set()
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        pause_s = _PAUSE_FIRST_S
        while not self._closed.is_set():
            self._retry_now.clear()
            was_attached = False
            over = self._stop_stream = threading.Event()
            try:
                for answer in self._channel.converse(BLOCKS + "Attach", self._requests(over), pb.AttachResponse):
                    was_attached = True
                    self._set(Attachment(answer.client_id, answer.boot_epoch))
                self._detached(DaemonUnavailable(f"the daemon at {self._channel.address} ended this attachment"))
            except KVError as error:
                self._detached(error)
            finally:
                over.set()
            pause_s = _PAUSE_FIRST_S if was_attached else min(2 * pause_s, _PAUSE_MAX_S)
            self._clock.wait(self._retry_now, pause_s)

    def _requests(self, over: threading.Event) -> Iterator[pb.AttachRequest]:
        yield pb.AttachRequest(client_name=self._client_name or default_name())
        over.wait()  # On gRPC's own thread. An early return would end the stream; without `over` the thread would leak.

    def _set(self, attachment: Attachment) -> None:
        with self._changed:
            self._attachment = attachment
            self._changed.notify_all()
        self._notify_listeners()

    def _detached(self, error: KVError) -> None:
        with self._changed:
            was_attached = self._attachment is not None
            self._attachment, self._error = None, error
            self._attempts_failed += 1
            self._changed.notify_all()
        if was_attached and not self._closed.is_set():
            self._log.warning(
                "the daemon at %s was lost, and with it this client's leases: %s", self._channel.address, error.message
            )
        self._notify_listeners()

    def _notify_listeners(self) -> None:
        for listener in self._listeners:
            listener()
