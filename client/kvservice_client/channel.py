"""The gRPC channel to one daemon: address, options, and calls that end in a KVError."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError, from_rpc_error
from kvservice_client.retry import Deadline
from kvservice_client.tls import TlsFiles, TlsWatch

BLOCKS = "/kvservice_api.v1.BlockService/"
ADMIN = "/kvservice_api.v1.AdminService/"
SESSIONS = "/kvservice_api.v1.SessionService/"

M = TypeVar("M", bound=Message)
R = TypeVar("R")

_MIB = 2**20
OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", -1),  # Frames are bounded by the daemon's max_frame_bytes.
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_frame_size", 16_777_215),  # Fewer, larger pieces: each costs a call and a copy's start.
    ("grpc.http2.lookahead_bytes", 4 * _MIB),  # Sent ahead of the reader; more would leave the caches.
    ("grpc.http2.write_buffer_size", 8 * _MIB),
    ("grpc.http2.bdp_probe", 0),  # With it, gRPC goes by its own guess instead of lookahead_bytes.
    ("grpc.initial_reconnect_backoff_ms", 100),  # A daemon that restarts is found within this time.
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # How long one attempt to connect may take.
    ("grpc.keepalive_time_ms", 20_000),  # A host that vanished is noticed, and its leases given up.
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # 0: an idle client's pings are not held back to one a minute.
    ("grpc.enable_retries", 0),  # What is tried again is decided in retry.py.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class _Link:
    """A gRPC channel, and how many calls run on it. Its credentials never change: others need another one."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.calls = 0
        self._callables: dict[str, Any] = {}

    def callable(self, method: str, make: Callable[[grpc.Channel], Any]) -> Any:
        found = self._callables.get(method)
        if found is None:
            found = self._callables[method] = make(self.channel)
        return found


class Channel:
    """One HTTP/2 connection, opened with the first call and again whenever it breaks. Thread-safe.

    Calls that begin after the TLS files changed share a new connection; those that run live on with the old one.
    """

    def __init__(self, address: str, tls: TlsFiles | None = None) -> None:
        """`address` is host:port, or the path of a UNIX socket, which is never encrypted.

        Raises TlsFileUnusable.
        """
        self.address = address
        self._target = f"unix:{address}" if address.startswith(("/", "./")) else address
        self._tls = TlsWatch(tls) if tls is not None and not self._target.startswith("unix:") else None
        self._lock = threading.RLock()  # Re-entrant: an abandoned stream ends wherever the garbage collector runs.
        self._link = _Link(self._open())
        self._retired: set[_Link] = set()

    def close(self) -> None:
        with self._lock:
            self._tls = None
            links = {self._link, *self._retired}
        for link in links:
            link.channel.close()

    def call(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> M:
        """One request, one answer."""
        deadline.check()
        with self._calling() as link:
            call = link.callable(method, lambda grpc: grpc.unary_unary(method, _to_bytes, answer.FromString))
            response: M = self._guarded(lambda: call(request, timeout=deadline.remaining_s))
        return response

    def stream(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> Generator[M, None, None]:
        """One request, many answers. Leaving the iterator cancels the call."""
        with self._calling() as link:
            call = link.callable(method, lambda grpc: grpc.unary_stream(method, _to_bytes, answer.FromString))
            yield from self._answers(lambda: call(request, timeout=deadline.remaining_s))

    def stream_frames(self, method: str, request: Message, deadline: Deadline) -> Generator[bytes, None, None]:
        """As `stream`, each answer left as the bytes it came in."""
        deadline.check()
        with self._calling() as link:
            call = link.callable(method, lambda grpc: grpc.unary_stream(method, _to_bytes, None))
            yield from self._answers(lambda: call(request, timeout=deadline.remaining_s))

    def send_frames(self, method: str, requests: Iterator[bytes], answer: type[M], deadline: Deadline) -> M:
        """Many requests that are bytes already, one answer."""
        deadline.check()
        with self._calling() as link:
            call = link.callable(method, lambda grpc: grpc.stream_unary(method, None, answer.FromString))
            response: M = self._guarded(lambda: call(requests, timeout=deadline.remaining_s))
        return response

    def converse(self, method: str, requests: Iterator[Message], answer: type[M]) -> Iterator[M]:
        """Many requests, many answers, without a deadline: for a stream that lives as long as its client."""
        with self._calling() as link:
            call = link.callable(method, lambda grpc: grpc.stream_stream(method, _to_bytes, answer.FromString))
            yield from self._answers(lambda: call(requests))

    @contextmanager
    def _calling(self) -> Iterator[_Link]:
        """The link for one call. A link that was replaced closes with its last call."""
        with self._lock:
            if self._tls is not None and self._tls.newer() is not None:
                self._replace_link()
            link = self._link
            link.calls += 1
        try:
            yield link
        finally:
            with self._lock:
                link.calls -= 1
                is_over = not link.calls and link in self._retired
                if is_over:
                    self._retired.remove(link)
            if is_over:
                link.channel.close()

    def _replace_link(self) -> None:
        former, self._link = self._link, _Link(self._open())
        if former.calls:
            self._retired.add(former)
        else:
            former.channel.close()

    def _open(self) -> grpc.Channel:
        if self._tls is None:
            return grpc.insecure_channel(self._target, OPTIONS)
        contents, name = self._tls.latest, self._tls.files.server_name
        credentials = grpc.ssl_channel_credentials(contents.ca, contents.key, contents.certificate)
        naming = (("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)) if name else ()
        return grpc.secure_channel(self._target, credentials, (*OPTIONS, *naming))

    def _answers(self, start: Callable[[], Any]) -> Iterator[Any]:
        call = self._guarded(start)
        try:
            while True:
                try:
                    answer = next(call)
                except StopIteration:
                    return
                except grpc.RpcError as error:
                    raise self._explained(error) from error
                yield answer
        finally:
            call.cancel()  # Without effect on a call that has ended.

    def _guarded(self, run: Callable[[], R]) -> R:
        try:
            return run()
        except grpc.RpcError as error:
            raise self._explained(error) from error
        except ValueError as error:  # What grpc raises for a call on a closed channel.
            raise DaemonUnavailable("the client is closed") from error

    def _explained(self, error: grpc.RpcError) -> KVError:
        known = from_rpc_error(error)
        if type(known) is DaemonUnavailable:  # grpc's own words do not always name the address.
            if (tls := self._tls) is not None:  # Another thread may be closing us.
                tls.look_soon()
            return DaemonUnavailable(f"no answer from the daemon at {self.address}: {known.message}")
        if type(known) is DeadlineExceeded:
            return DeadlineExceeded(f"the daemon at {self.address} did not answer in time")
        return known


def _to_bytes(message: Message) -> bytes:
    return message.SerializeToString()
