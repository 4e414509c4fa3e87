"""Connections to the daemon's bulk port, plain or TLS: each is kept for the next transfer."""

from __future__ import annotations

import logging
import math
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakSet

from kvservice_api.bulk import PREFACE
from kvservice_api.errors import BulkUnavailable
from kvservice_api.socket_buffers import ENDED, SocketBuffers
from kvservice_api.tcp_links import limit_bytes_ahead, shortest_rtt_s
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import forks
from kvservice_client.connection import Connection
from kvservice_client.retry import Deadline
from kvservice_client.tls import TlsContents

log = logging.getLogger(__name__)

CONNECT_S = 1.0  # With TLS's handshake.
RETRY_S = 30.0  # Until a port that could not be reached is tried again.
_IDLE_MAX = 8
_IDLE_S = 45.0  # The daemon closes idle connections after 60 s.
_WAIT_S = 1.0  # At most, of one system call; the deadline is checked between two.
_TIMEVAL = struct.Struct("@ll")


class Endpoint(NamedTuple):
    """To which port connections lead, and how. Those to another one are not used again."""

    host: str
    port: int
    boot_epoch: int  # After a restart of the daemon its old connections are gone.
    tls: tuple[TlsContents, str] | None


class BulkConnection:
    """One connection. For one thread at a time; `shut_down` may be called from any. Errors are OSErrors."""

    def __init__(self, family: int, endpoint: Endpoint) -> None:
        """Not connected yet."""
        self.endpoint = endpoint
        self.idle_since_s = 0.0
        self.has_joined = False  # A transfer. Then the daemon knows its caller, and takes calls.
        self.arrived: Callable[[], None] | None = None  # Called when bytes have come that no deadline waits for.
        self.pause_s = _WAIT_S  # After which a call returns with what has come.
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._wait_s: float | None = None
        self._is_limited = False

    def connect(self, address: Any, context: ssl.SSLContext | None, limit: Deadline) -> None:
        """Connect, and send the preface."""
        self._socket.settimeout(max(1e-3, limit.remaining_s))
        self._socket.connect(address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None and self.endpoint.tls is not None:
            self._socket.settimeout(max(1e-3, limit.remaining_s))
            name = self.endpoint.tls[1]
            wrapped = context.wrap_socket(self._socket, server_hostname=name, do_handshake_on_connect=False)
            self._socket = wrapped
            wrapped.do_handshake()
        self._socket.settimeout(None)
        self._socket.sendall(PREFACE)
        self.limit_bytes_ahead(self.rtt_s)

    @property
    def rtt_s(self) -> float:
        """The shortest round trip of its link. 0 if it is not known yet."""
        return shortest_rtt_s(self._socket)

    def limit_bytes_ahead(self, rtt_s: float) -> None:
        """Limit what is sent ahead, once, if the daemon is on this host: `tcp_links.limit_bytes_ahead`."""
        self._is_limited = self._is_limited or limit_bytes_ahead(self._socket, rtt_s)

    @property
    def is_stale(self) -> bool:
        """Whether this idle connection has ended, or the daemon sent what was not requested."""
        if isinstance(self._socket, ssl.SSLSocket):
            return not self._is_quiet(self._socket)
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def _is_quiet(self, encrypted: ssl.SSLSocket) -> bool:
        """Whether a read would wait. The socket does not show it: OpenSSL may have read ahead."""
        self._wait_s = 0.0
        encrypted.settimeout(self._wait_s)
        try:
            encrypted.read(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False

    def receive(self, buffers: SocketBuffers, deadline: Deadline | None = None) -> None:
        """Fill all of them. Raises the deadline's error, whose idle time begins again with each piece that comes;
        without one, only `shut_down` ends the wait.
        """
        while not buffers.is_done:
            why, count = buffers.receive(self._socket, 0, self._bound(deadline))
            if why == ENDED:
                raise ConnectionResetError("the daemon closed the connection")
            if count and deadline is not None:
                deadline.begin_answer()
            elif count and self.arrived is not None:
                self.arrived()

    def send(self, buffers: SocketBuffers, deadline: Deadline | None = None) -> None:
        """Send all of them. Raises as `receive`."""
        while not buffers.is_done:
            buffers.send(self._socket, 0, self._bound(deadline))

    def _bound(self, deadline: Deadline | None) -> float:
        """Limit the next system call to the time that is left. Returns after how many seconds a move is to end."""
        wait_s = None
        if deadline is not None:
            remaining_s = deadline.remaining_s
            if not remaining_s:
                raise deadline.error
            # Half of it, because a move may wait for so long once more: in its last system call.
            wait_s = max(1e-3, min(remaining_s / 2, self.pause_s))
        elif self.arrived is not None:
            wait_s = self.pause_s
        move_s = self.pause_s if wait_s is None else wait_s
        if wait_s == self._wait_s:
            return move_s
        self._wait_s = wait_s
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.settimeout(wait_s)
            return move_s
        # Not `settimeout`, which makes the socket non-blocking, with a poll before each call and no MSG_WAITALL.
        seconds, part = divmod(wait_s or 0.0, 1)
        timeval = _TIMEVAL.pack(int(seconds), int(part * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        return move_s

    def shut_down(self) -> None:
        """End it, also under a thread that waits for it."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # SSLSocket's own drops what that thread uses.

    def close(self) -> None:
        """No thread uses it any more."""
        with suppress(OSError):
            self._socket.close()

    __del__ = close  # Of a client that is dropped.


class User(Protocol):
    """What uses connections. `changed` is notified when it needs none any more."""

    changed: threading.Condition

    def use(self, connection: BulkConnection) -> None:
        """It has the connection from now on. Raises as `check_not_over`, if it has closed the connection."""

    @property
    def is_over(self) -> bool:
        """Whether it needs no connection any more."""

    def check_not_over(self) -> None:
        """Raises an OSError if it needs no connection any more."""


class _Attempt:
    """To connect, on a thread of its own: a slow name server or handshake is waited for as long as the user wants."""

    def __init__(self, endpoint: Endpoint, user: User) -> None:
        self.endpoint = endpoint
        self.changed = user.changed
        self.is_awaited = True  # Otherwise the connection is kept for the next transfer.
        self.made: BulkConnection | None = None
        self.error: BulkUnavailable | None = None

    @property
    def is_done(self) -> bool:
        return self.made is not None or self.error is not None


class BulkConnections:
    """The idle connections of one client, and how to make more. Thread-safe. A forked child begins without any."""

    def __init__(self, connection: Connection, is_demanded: Callable[[], bool]) -> None:
        """`is_demanded` says that no other transport may be used."""
        self._connection = connection
        self.is_demanded = is_demanded
        self._all: WeakSet[BulkConnection] = WeakSet()
        self._is_closed = False
        self.reset_in_child()
        forks.register(self)

    def reset_in_child(self) -> None:
        for each in list(self._all):
            each.close()  # Only this process's file descriptor.
        self._all = WeakSet()
        self._lock = threading.RLock()
        self._idle: list[BulkConnection] = []
        self._rtt: tuple[Endpoint, float] | None = None  # Of the one that was put back last.
        self._unawaited: _Attempt | None = None  # That still connects, although its user has given up.
        self._address: tuple[Endpoint, tuple[int, Any]] | None = None  # Family and address that were reached last.
        self._context: tuple[TlsContents, ssl.SSLContext] | None = None
        self._unreachable: tuple[Endpoint, float, str] | None = None  # Until when it is not tried, and why.

    @property
    def is_locked_here(self) -> bool:
        """Whether this thread is within a method: the garbage collector may call others at any place."""
        return bool(cast(Any, self._lock)._is_owned())  # As `threading.Condition` asks it.

    def close(self) -> None:
        """Also ends the transfers that run."""
        with self._lock:
            self._is_closed, idle, self._idle = True, self._idle, []
            used = set(self._all).difference(idle)
        for each in idle:
            each.close()
        for each in used:
            each.shut_down()

    def close_idle(self) -> None:
        """The next transfers make connections of their own."""
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()

    def endpoint(self, limits: pb.GetCapabilitiesResponse) -> Endpoint:
        """Raises BulkUnavailable if the daemon has no bulk port, or it could not be reached recently."""
        channel = self._connection.channel
        if channel.host is None:
            raise BulkUnavailable("this client uses a UNIX socket: only a host and port lead to the bulk port")
        if "bulk" not in limits.transports or not limits.bulk_port:
            raise BulkUnavailable("the daemon has no bulk port")
        endpoint = Endpoint(channel.host, limits.bulk_port, limits.boot_epoch, channel.tls)
        with self._lock:
            unreachable = self._unreachable
        if unreachable is None or unreachable[0] != endpoint or self._connection.clock.now_s() >= unreachable[1]:
            return endpoint
        raise BulkUnavailable(unreachable[2])

    def rtt_s(self, endpoint: Endpoint) -> float | None:
        """The round trip, when a connection there was last put back. None if none was."""
        known = self._rtt
        return known[1] if known is not None and known[0] == endpoint else None

    def take(self, endpoint: Endpoint, deadline: Deadline, user: User) -> BulkConnection:
        """An idle connection, or a new one. The user has it from now on, and closes it.

        Raises BulkUnavailable if the port cannot be reached within a second. If another transport may be used, it is
        not waited for longer than the deadline's idle time, or half of the time that is left. Raises the errors of user
        and deadline.
        """
        while (found := self.idle_one(endpoint)) is not None:
            user.use(found)
            if not found.is_stale:
                return found
        deadline.check()
        made = self._connect(endpoint, deadline, user)
        user.use(made)
        return made

    def check_reachable(self, limits: pb.GetCapabilitiesResponse) -> None:
        """Make a connection within a second, and close it. Raises BulkUnavailable, and logs nothing."""
        endpoint = self.endpoint(limits)
        try:
            self.connected(endpoint).close()
        except (OSError, ValueError) as error:
            raise BulkUnavailable(_why_unreachable(endpoint, error)) from error

    def _connect(self, endpoint: Endpoint, deadline: Deadline, user: User) -> BulkConnection:
        attempt = _Attempt(endpoint, user)
        with self._lock:
            if self._is_closed:
                raise BulkUnavailable("the client was closed")
            if self._unawaited is not None and self._unawaited.endpoint == endpoint and not self.is_demanded():
                raise BulkUnavailable(_still_connecting(endpoint))
        try:
            threading.Thread(target=self._attempt, args=(attempt,), name="kvservice-connect", daemon=True).start()
        except RuntimeError as error:
            raise BulkUnavailable(f"no thread to connect to the bulk port: {error}") from error
        wait_s = min(1.1 * CONNECT_S, deadline.remaining_s)  # A little longer than the attempt, for its reason.
        if not self.is_demanded():
            wait_s = min(wait_s, deadline.remaining_s / 2, deadline.idle_s or math.inf)
        made = None
        try:
            with user.changed:
                deadline.clock.wait_for(user.changed, lambda: attempt.is_done or user.is_over, wait_s)
                made = attempt.made
        finally:
            with user.changed:
                attempt.is_awaited = made is not None
                unused = None if attempt.is_awaited else attempt.made  # Read here: later ones its thread puts back.
                if not attempt.is_done:
                    self._unawaited = attempt
            if unused is not None:
                self.put_back(unused)
        if made is not None:
            return made
        user.check_not_over()
        deadline.check()
        if self.is_demanded() and not attempt.is_done and wait_s < CONNECT_S:
            raise deadline.error  # Nothing else carries the order, and its time is over.
        raise attempt.error or BulkUnavailable(_still_connecting(endpoint))

    def _attempt(self, attempt: _Attempt) -> None:
        made = error = None
        try:
            made = self.connected(attempt.endpoint)
        except (OSError, ValueError) as failure:  # ValueError: of a name that no name server takes.
            error = self._is_unreachable(attempt.endpoint, failure)
        with attempt.changed:
            attempt.made, attempt.error = made, error
            if self._unawaited is attempt:
                self._unawaited = None
            attempt.changed.notify_all()
            is_awaited = attempt.is_awaited
        if made is not None and not is_awaited:
            self.put_back(made)

    def connected(self, endpoint: Endpoint) -> BulkConnection:
        """A new connection, made within a second. Raises OSError; ValueError for a name that no name server takes."""
        context, addresses = self._tls_context(endpoint), self._addresses(endpoint)
        limit = Deadline(CONNECT_S, self._connection.clock)
        failure = OSError("its name has no address")
        for count, (family, address) in enumerate(addresses):
            made = BulkConnection(family, endpoint)
            try:
                with self._lock:
                    self._all.add(made)
                made.connect(address, context, Deadline(limit.remaining_s / (len(addresses) - count), limit.clock))
            except OSError as error:
                made.close()
                failure = error
                continue
            with self._lock:
                is_closed = self._is_closed
                self._unreachable, self._address = None, (endpoint, (family, address))
            if is_closed:  # While it connected: it was not shut down, or to no effect.
                made.close()
                raise ConnectionAbortedError("the client was closed")
            return made
        raise failure

    def put_back(self, connection: BulkConnection) -> None:
        """All messages of its transfer were sent and received."""
        connection.arrived, connection.pause_s = None, _WAIT_S
        rtt_s = connection.rtt_s
        connection.limit_bytes_ahead(rtt_s)
        self._rtt = connection.endpoint, rtt_s
        self.keep(connection)

    def keep(self, connection: BulkConnection) -> None:
        """It is idle, and as it was when it was taken."""
        now_s = self._connection.clock.now_s()
        connection.idle_since_s = now_s
        with self._lock:
            if not self._is_closed:
                self._idle.append(connection)
                connection = self._idle[0]
                if len(self._idle) <= _IDLE_MAX and now_s < connection.idle_since_s + _IDLE_S:
                    return
                del self._idle[0]
        connection.close()

    @property
    def has_idle(self) -> bool:
        return bool(self._idle)

    @property
    def count(self) -> int:
        """Of connections, idle or used."""
        return len(self._all)

    def idle_one(self, endpoint: Endpoint) -> BulkConnection | None:
        """The one that was used last; the caller puts it back or closes it. Those that lead elsewhere, or are too old,
        are closed.
        """
        now_s = self._connection.clock.now_s()
        with self._lock:
            useful = [each for each in self._idle if each.endpoint == endpoint and now_s < each.idle_since_s + _IDLE_S]
            useless = [each for each in self._idle if each not in useful]
            self._idle = useful
            found = useful.pop() if useful else None
        for each in useless:
            each.close()
        return found

    def _addresses(self, endpoint: Endpoint) -> list[tuple[int, Any]]:
        """Family and address: the one that was reached, as all connections must lead to one daemon; else all."""
        with self._lock:
            if self._address is not None and self._address[0] == endpoint:
                return [self._address[1]]
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        return [(int(family), address) for family, _, _, _, address in found]

    def _tls_context(self, endpoint: Endpoint) -> ssl.SSLContext | None:
        if endpoint.tls is None:
            return None
        contents = endpoint.tls[0]
        with self._lock:
            if self._context is None or self._context[0] is not contents:
                self._context = contents, contents.context()
            return self._context[1]

    def _is_unreachable(self, endpoint: Endpoint, error: OSError | ValueError) -> BulkUnavailable:
        why = _why_unreachable(endpoint, error)
        self.forget(endpoint, why)
        return BulkUnavailable(why)

    def forget(self, endpoint: Endpoint, why: str) -> None:
        """The port cannot be used now, for this reason: it is tried again after a while."""
        with self._lock:
            is_news = self._unreachable is None and not self._is_closed
            self._address = None
            self._unreachable = endpoint, self._connection.clock.now_s() + RETRY_S, why
        if is_news and not self.is_demanded():
            log.warning("%s; gRPC carries the blocks, and the port is tried again after %.0f s", why, RETRY_S)


def _why_unreachable(endpoint: Endpoint, error: OSError | ValueError) -> str:
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return f"the bulk port {endpoint.port} of {endpoint.host} cannot be reached: {reason}"


def _still_connecting(endpoint: Endpoint) -> str:
    return f"the connection to the bulk port {endpoint.port} of {endpoint.host} is not ready yet"
