"""A client's state at its daemon: the attachment, the limits, the opened layouts."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TypeVar

from google.protobuf.message import Message

from kvservice_api.errors import DaemonUnavailable, KVError, UnknownClient, UnknownLayout
from kvservice_api.layout import Layout
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.attach_stream import Attachment, AttachStream
from kvservice_client.background import Background
from kvservice_client.channel import BLOCKS, Channel
from kvservice_client.local_directory import LocalDirectory
from kvservice_client.reports import Reporter
from kvservice_client.retry import SYSTEM_CLOCK, Clock, Deadline, TransferDeadline, Watchdog, retry
from kvservice_client.tls import TlsFiles

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_REPORTS_S = 0.5  # How long `close` waits for queued reports.
_RETRIED_ERRORS = (DaemonUnavailable, UnknownClient, UnknownLayout)


class RequestContext(NamedTuple):
    """The inputs that every request about blocks needs. Valid for one attachment."""

    attachment: Attachment
    limits: pb.GetCapabilitiesResponse


class Connection:
    """Shared by all objects of one client, and closed with the last of them.

    Thread-safe; holds no lock during a call.
    """

    def __init__(
        self,
        address: str,
        name: str,
        timeout_s: float,
        reconnect_wait_s: float,
        tls: TlsFiles | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.clock = clock
        self.channel = Channel(address, tls, clock)
        self.attach_stream = AttachStream(self.channel, name, clock)
        self.reporter = Reporter(self.channel, name, clock)
        self.local_directory = LocalDirectory()
        self._watchdog = Watchdog(clock)
        self.background = Background()
        self.timeout_s = timeout_s
        self._reconnect_wait_s = reconnect_wait_s
        self._limits: pb.GetCapabilitiesResponse | None = None
        self._opened: dict[bytes, int] = {}  # Layout fingerprint -> the boot epoch it was opened in.
        self.close = weakref.finalize(self, _close, self.attach_stream, self.reporter, self.background, self.channel)

    def deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(self.timeout_s if timeout_s is None else timeout_s, self.clock)

    def transfer_deadline(self, timeout_s: float, *, per_layer: bool, idle_s: float | None = None) -> TransferDeadline:
        return TransferDeadline(timeout_s, self.clock, self._watchdog if per_layer else None, idle_s)

    def ask(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> M:
        """One call that may run twice; it is tried again while the daemon restarts."""
        return self.retried(lambda: self.channel.call(method, request, answer, deadline), deadline)

    def retried(self, attempt: Callable[[], T], deadline: Deadline) -> T:
        """The result of `attempt`, which is tried again during a short restart of the daemon."""

        def should_retry(error: KVError) -> bool:
            if isinstance(error, UnknownLayout):
                self._opened.clear()
            return type(error) in _RETRIED_ERRORS and not self.channel.is_closed

        return retry(attempt, deadline, self._reconnect_wait_s, should_retry)

    def session(self, layout: Layout, deadline: Deadline) -> RequestContext:
        """Attach and open the layout, if that is not done yet."""
        attachment = self.attach_stream.current(deadline)
        limits = self.limits(deadline, attachment.boot_epoch)
        self.open_layout(layout, attachment.boot_epoch, deadline)
        return RequestContext(attachment, limits)

    def known_session(self, layout: Layout) -> RequestContext | None:
        """As `session`, without a wait: None if a step is missing. The steps are then done in the background."""
        attachment, limits = self.attach_stream.latest, self._limits
        if attachment is not None and limits is not None:
            epoch = attachment.boot_epoch
            if limits.boot_epoch == epoch == self._opened.get(layout.fingerprint):
                return RequestContext(attachment, limits)
        self.background.submit_once(layout.fingerprint, lambda: self._prepare(layout))
        return None

    def _prepare(self, layout: Layout) -> None:
        deadline = self.deadline(None)
        with suppress(KVError):  # The next call that needs the daemon raises it.
            self.retried(lambda: self.session(layout, deadline), deadline)

    def limits(self, deadline: Deadline, boot_epoch: int | None = None) -> pb.GetCapabilitiesResponse:
        """The daemon's limits, read once per boot epoch."""
        limits = self._limits
        if limits is None or (boot_epoch is not None and limits.boot_epoch != boot_epoch):
            request = pb.GetCapabilitiesRequest()
            limits = self.channel.call(BLOCKS + "GetCapabilities", request, pb.GetCapabilitiesResponse, deadline)
            self._limits = limits
        return limits

    def open_layout(self, layout: Layout, boot_epoch: int, deadline: Deadline) -> None:
        fingerprint = layout.fingerprint
        if self._opened.get(fingerprint) == boot_epoch:
            return
        request = pb.OpenLayoutRequest(layout=layout.to_proto(), fingerprint=fingerprint)
        self.channel.call(BLOCKS + "OpenLayout", request, pb.OpenLayoutResponse, deadline)
        self._opened[fingerprint] = boot_epoch


def _close(attach_stream: AttachStream, reporter: Reporter, background: Background, channel: Channel) -> None:
    reporter.close()
    reporter.join(_REPORTS_S)
    background.close()
    attach_stream.close()
    channel.close()  # Ends the calls of all threads.
    attach_stream.join(1.0)
    background.join(1.0)
