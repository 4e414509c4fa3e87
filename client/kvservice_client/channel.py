"""The gRPC channel to one daemon: address, options, and calls that end in a KVError."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import Message

from kvservice_api import spans
from kvservice_api.address import TcpAddress, UnixAddress, parse_address
from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, InvalidRequest, KVError
from kvservice_api.status import from_rpc_error
from kvservice_client import forks
from kvservice_client.own_grpc import own_grpc
from kvservice_client.retry import SYSTEM_CLOCK, Clock, Deadline
from kvservice_client.tls import TlsContents, TlsFiles, TlsWatch

BLOCKS = "/kvservice_api.v1.BlockService/"
ADMIN = "/kvservice_api.v1.AdminService/"
SESSIONS = "/kvservice_api.v1.SessionService/"
HINTS = "/kvservice_api.v1.HintService/"
DEVICES = "/kvservice_api.v1.DeviceService/"

if TYPE_CHECKING:
    import grpc  # For type checks; at run time `own_grpc()` is used.

M = TypeVar("M", bound=Message)
R = TypeVar("R")
A = TypeVar("A")

_MIB = 2**20
OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", -1),  # Frames are bounded by the daemon's max_frame_bytes.
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_frame_size", 16_777_215),  # Fewer, larger pieces, because each piece has a fixed cost.
    ("grpc.http2.lookahead_bytes", 4 * _MIB),  # Sent ahead of the reader; more would leave the processor's caches.
    ("grpc.http2.write_buffer_size", 8 * _MIB),
    ("grpc.http2.bdp_probe", 0),  # If it is on, gRPC uses its own estimate instead of lookahead_bytes.
    ("grpc.experimental.tcp_min_read_chunk_size", 64 * 1024),  # 512 keys are read in one piece, not in three.
    ("grpc.experimental.tcp_read_chunk_size", 64 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),  # A restarted daemon is found within this time.
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # How long one attempt to connect may take.
    ("grpc.keepalive_time_ms", 20_000),  # Detects a host that has failed, and ends its leases.
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # 0: do not limit an idle client's pings to one per minute.
    ("grpc.enable_retries", 0),  # retry.py decides what is tried again.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class _Link:
    """A gRPC channel, and how many calls run on it. Its credentials never change: others need another one."""

    def __init__(self, grpc: Any, channel: grpc.Channel) -> None:
        self.grpc = grpc  # The module that made the channel, and whose errors it raises.
        self.channel = channel
        self.calls = 0
        self.streams: set[Any] = set()  # Running calls that are objects of gRPC.
        self.generation = forks.generation
        self._callables: dict[str, Any] = {}

    def callable(self, method: str, make: Callable[[grpc.Channel], Any]) -> Any:
        found = self._callables.get(method)
        if found is None:
            found = self._callables[method] = make(self.channel)
        return found

    @property
    def is_inherited(self) -> bool:
        """Whether it is the link of a parent of this process. Do not use such a link or its calls."""
        return self.generation != forks.generation


class Channel:
    """One HTTP/2 connection, opened at the first call, and again when it breaks. Thread-safe.

    Calls that begin after a change of the TLS files share a new connection; running calls continue on the old one.
    A forked child opens a connection of its own.
    """

    def __init__(self, address: str, tls: TlsFiles | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        """`address` is host:port, or the path of a UNIX socket, which is never encrypted.

        Raises InvalidRequest, TlsFileUnusable.
        """
        try:
            self._address = parse_address(address)
        except ValueError as error:
            raise InvalidRequest(str(error), field="address") from error
        self.address = address
        self._tls = TlsWatch(tls, clock) if tls is not None and isinstance(self._address, TcpAddress) else None
        self._lock = threading.RLock()  # Re-entrant: the garbage collector may end an abandoned stream at any place.
        self._link: _Link | None = None
        self._retired: set[_Link] = set()
        self._is_closed = False
        forks.register(self)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def host(self) -> str | None:
        """Where the daemon's other ports are; None behind a UNIX socket."""
        return self._address.host if isinstance(self._address, TcpAddress) else None

    @property
    def tls(self) -> tuple[TlsContents, str] | None:
        """What a new connection uses of the TLS files, and the name that the daemon's certificate must have.

        Raises as a call if the client is closed.
        """
        watch = self._tls
        if watch is None or self.host is None:
            return None
        with self._lock:
            self._current()
        return watch.latest, watch.files.server_name or self.host

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._tls = None
            links = {self._link, *self._retired} if self._link is not None else self._retired
        for link in links:
            link.channel.close()

    def reset_in_child(self) -> None:
        """Do not close or destroy the parent's connections here: that would wait for threads of the parent."""
        inherited = {self._link, *self._retired} if self._link is not None else self._retired
        for link in inherited:
            forks.keep_forever(link)
        self._lock = threading.RLock()
        self._link, self._retired = None, set()
        if inherited:
            forks.give_up_sockets(self._is_peer)

    def _is_peer(self, peer: Any) -> bool:
        """Whether a connected socket leads to the daemon. For a host name only the port is compared."""
        if isinstance(self._address, UnixAddress):
            return isinstance(peer, str) and os.path.realpath(peer) == os.path.realpath(self._address.path)
        if not isinstance(peer, tuple) or peer[1] != self._address.port:
            return False
        try:
            wanted = ip_address(self._address.host)
        except ValueError:
            return True
        found = ip_address(peer[0].partition("%")[0])
        return found == wanted or getattr(found, "ipv4_mapped", None) == wanted

    def call(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> M:
        """One request, one answer."""
        deadline.check()
        metadata = spans.headers()
        link = self._begin_call()
        try:
            call = link.callable(method, lambda grpc: grpc.unary_unary(method, _to_bytes, answer.FromString))
            deadline.begin_answer()
            try:
                response: M = call(request, timeout=deadline.remaining_s, metadata=metadata)
            except (link.grpc.RpcError, ValueError) as error:
                raise self._known(error) from error
            finally:
                deadline.end_answer()
        finally:
            self._end_call(link)
        return response

    def stream(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> Answers[M]:
        """One request, many answers. The call begins when the first answer is requested."""
        return self._answers(method, "unary_stream", answer.FromString, request, deadline)

    def stream_frames(self, method: str, request: Message, deadline: Deadline) -> Answers[bytes]:
        """As `stream`, with each answer as its encoded bytes."""
        return self._answers(method, "unary_stream", None, request, deadline)

    def send_frames(self, method: str, requests: Iterator[bytes], answer: type[M], deadline: Deadline) -> M:
        """Many encoded requests, one answer."""
        deadline.check()
        metadata = spans.headers()
        link = self._begin_call()
        try:
            call = link.callable(method, lambda grpc: grpc.stream_unary(method, None, answer.FromString))
            response: M = call(requests, timeout=deadline.remaining_s, metadata=metadata)
        except (link.grpc.RpcError, ValueError) as error:
            raise self._known(error) from error
        finally:
            self._end_call(link)
        return response

    def converse(
        self, method: str, requests: Iterator[Message], answer: type[M], deadline: Deadline | None = None
    ) -> Answers[M]:
        """Many requests, many answers. Without a deadline for a stream that is open as long as its client."""
        return self._answers(method, "stream_stream", answer.FromString, requests, deadline)

    def _answers(self, method: str, kind: str, decode: Any, request: Any, deadline: Deadline | None) -> Answers[Any]:
        def start(link: _Link) -> Any:
            if deadline is not None:
                deadline.check()
            call = link.callable(method, lambda grpc: getattr(grpc, kind)(method, _to_bytes, decode))
            timeout_s = None if deadline is None else deadline.of_stream_s
            try:
                return call(request, timeout=timeout_s, metadata=spans.headers())
            except (link.grpc.RpcError, ValueError) as error:
                raise self._known(error) from error

        return Answers(self, start, deadline)

    def _begin_call(self) -> _Link:
        with self._lock:
            link = self._current()
            link.calls += 1
        return link

    def _end_call(self, link: _Link) -> None:
        """A replaced link closes with its last call. A parent's link is not closed."""
        if link.is_inherited:
            return
        with self._lock:
            link.calls -= 1
            is_over = not link.calls and link in self._retired
            if is_over:
                self._retired.remove(link)
        if is_over:
            link.channel.close()

    def _current(self) -> _Link:
        """The link for new calls; opens or replaces it if needed. The caller holds the lock."""
        if self._is_closed:
            raise DaemonUnavailable("the client is closed")
        former = self._link
        if former is not None and (self._tls is None or self._tls.newer() is None):
            return former
        link = self._link = self._open()
        if former is not None and former.calls:
            self._retired.add(former)
        elif former is not None:
            former.channel.close()
        return link

    def _open(self) -> _Link:
        grpc, target = own_grpc(), self._address.target
        if self._tls is None:
            return _Link(grpc, grpc.insecure_channel(target, OPTIONS))
        name = self._tls.files.server_name
        credentials = grpc.ssl_channel_credentials(*self._tls.latest.pem)
        naming = (("grpc.ssl_target_name_override", name), ("grpc.default_authority", name)) if name else ()
        return _Link(grpc, grpc.secure_channel(target, credentials, (*OPTIONS, *naming)))

    def _known(self, error: grpc.RpcError | ValueError) -> KVError:
        """What a call has raised, as one of our errors. grpc raises ValueError for a call on a closed channel."""
        return DaemonUnavailable("the client is closed") if isinstance(error, ValueError) else self._explained(error)

    def _explained(self, error: grpc.RpcError) -> KVError:
        known = from_rpc_error(error)
        if type(known) is DaemonUnavailable:  # grpc's own message does not always name the address.
            if (tls := self._tls) is not None:  # Another thread may be closing this channel.
                tls.look_soon()
            return DaemonUnavailable(f"no answer from the daemon at {self.address}: {known.message}")
        if type(known) is DeadlineExceeded:
            return DeadlineExceeded(f"the daemon at {self.address} did not answer in time")
        return known


class Answers(Generic[A]):
    """The answers of one call. An iterator, not a generator: none of its code runs between two answers.

    `close` cancels the call unless it has ended; so does the object's destructor. For one thread at a time.
    """

    def __init__(self, channel: Channel, start: Callable[[_Link], Any], deadline: Deadline | None) -> None:
        """A `deadline` that is cancelled from another thread cancels the call. Its error is then raised."""
        self._channel = channel
        self._start = start
        self._deadline = deadline
        self._link: _Link | None = None
        self._call: Any = None
        self._is_over = False

    def __iter__(self) -> Answers[A]:
        return self

    def __next__(self) -> A:
        if self._is_over:
            raise StopIteration
        try:
            return self._next(self._link or self._begin())
        except BaseException:
            self.close()
            raise

    def _begin(self) -> _Link:
        link = self._link = self._channel._begin_call()
        self._call = self._start(link)
        link.streams.add(self._call)
        if self._deadline is not None:
            self._deadline.add_call(self._call.cancel)
        return link

    def _next(self, link: _Link) -> A:
        if link.is_inherited:
            raise DaemonUnavailable("this call was begun before fork(), in the parent: begin it again here")
        deadline = self._deadline
        if deadline is not None:
            deadline.begin_answer()
        try:
            answer: A = next(self._call)
        except link.grpc.RpcError as error:
            if deadline is not None and deadline.was_cancelled:
                raise deadline.error from error
            raise self._channel._explained(error) from error
        finally:
            if deadline is not None:
                deadline.end_answer()
        return answer

    def close(self) -> None:
        link, was_over = self._link, self._is_over
        self._is_over = True
        if was_over or link is None or link.is_inherited:
            return
        if self._call is not None:
            if self._deadline is not None:
                self._deadline.remove_call(self._call.cancel)
            self._call.cancel()  # No effect on a call that has ended.
            link.streams.discard(self._call)
        self._channel._end_call(link)

    def __del__(self) -> None:
        self.close()


def _to_bytes(message: Message) -> bytes:
    return message.SerializeToString()
