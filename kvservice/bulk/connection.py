"""One connection of the bulk port: reads and writes that never block a thread.

What is said on a connection is a generator. It yields what it waits for, and is continued by whichever worker thread
finds that this has come; between two transfers by the event loop. It runs on one thread at a time, which holds the
connection's `lock`.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Callable, Generator
from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP

from kvservice.store.caller import Caller
from kvservice_api.bulk import HEADER_BYTES, PREFACE, MessageHeader, unpack_header
from kvservice_api.socket_buffers import BLOCKED, ENDED, SocketBuffers
from kvservice_api.tcp_links import limit_bytes_ahead, shortest_rtt_s

READABLE, WRITABLE = EPOLLIN, EPOLLOUT
NOW = EPOLLIN | EPOLLOUT  # Continue after the others that can.
WOKEN = EPOLLRDHUP  # Another thread wakes it; or the client closes the connection.
_GONE = EPOLLHUP | EPOLLRDHUP | EPOLLERR
FINAL_S = 10.0  # For the client to take the last message.
QUANTUM_BYTES = 1 << 20  # Moved by a connection before others have their turn.
_STAY_S = 0.02  # For one call: a thread stays with a connection that moves bytes or waits, if no other can move.
_MESSAGE_BYTES = 16 << 10  # As so many bytes a message counts in a turn, besides its own.
_LINGER_BYTES = 64 << 20

Steps = Generator[int, int, None]


class ConnectionLost(Exception):
    """The client has closed the connection, or it broke."""


class Interrupted(Exception):
    """The transfer has ended while more of its bytes were read."""


class BulkConnection:
    """`deadline_s` is when it is closed if it still waits then: a time of the daemon's clock."""

    __slots__ = (
        "_header",
        "_is_limited",
        "_others",
        "_socket",
        "caller",
        "certificate",
        "deadline_s",
        "fd",
        "has_joined",
        "is_closed",
        "is_counted",
        "is_interrupted",
        "is_on_loop",
        "is_pooled",
        "is_woken",
        "lock",
        "moves",
        "received_bytes",
        "sent_bytes",
        "since_s",
        "steps",
        "turn_bytes",
    )

    def __init__(self, accepted: socket.socket, now_s: float, deadline_s: float, others: int) -> None:
        """`others` is a descriptor that is readable while another connection can move."""
        self._socket = accepted
        self.fd = accepted.fileno()
        self.lock = threading.Lock()
        self.since_s, self.deadline_s = now_s, deadline_s
        self.is_counted = False  # By the reason for which it will be closed.
        self.is_pooled = False  # A transfer has ended, and its client may begin another one.
        self.is_on_loop = False  # The event loop continues it, and no worker. Changes with the lock.
        self.has_joined = self.is_woken = self.is_interrupted = self.is_closed = False
        self.certificate = b""  # SHA-256 of the client's certificate; empty without one.
        self.caller: Caller | None = None  # That has opened the transfer which was joined last.
        self.turn_bytes = 0  # Since a thread has begun or continued `steps`.
        self.sent_bytes = self.received_bytes = 0
        self.moves: Callable[[int], None] | None = None  # Called after so many bytes of its transfer have moved.
        self._header = bytearray(HEADER_BYTES)
        self._is_limited = accepted.family == socket.AF_UNIX
        self._others = others
        self.steps: Steps | None = None

    @property
    def is_in_first_hello(self) -> bool:
        """Whether a part of a message has come, and no transfer was joined yet."""
        return not self.has_joined and self.received_bytes not in (0, len(PREFACE))

    @property
    def _stay_s(self) -> float:
        """Only in a transfer: others may be closed at any time, to make room."""
        return 0.0 if self.moves is None else _STAY_S

    def close(self) -> None:
        """With the lock. On return no memory of a transfer is used."""
        self.is_closed = True
        if self.steps is not None:
            self.steps.close()
        self._socket.close()

    def handshake(self, context: ssl.SSLContext) -> Steps:
        """Raises ssl.SSLError, OSError."""
        self._socket = wrapped = context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
        while True:
            try:
                wrapped.do_handshake()
                break
            except ssl.SSLWantReadError:
                yield READABLE
            except ssl.SSLWantWriteError:
                yield WRITABLE
        if shown := wrapped.getpeercert(binary_form=True):
            self.certificate = hashlib.sha256(shown).digest()

    def limit_bytes_ahead(self) -> None:
        """Limit what is sent ahead, if the client is on this host: `tcp_links.limit_bytes_ahead`.

        Called at the beginning of each transfer, because a busy host may show its round trip only after some.
        """
        if not self._is_limited:
            self._is_limited = limit_bytes_ahead(self._socket, shortest_rtt_s(self._socket))

    def read_header(self) -> Generator[int, int, MessageHeader]:
        """Raises InvalidFrame; as `read`."""
        yield from self.read(SocketBuffers([memoryview(self._header)]))
        self.turn_bytes += _MESSAGE_BYTES
        return unpack_header(self._header)

    def read(self, buffers: SocketBuffers) -> Steps:
        """Fill the buffers. Raises ConnectionLost, Interrupted, OSError."""
        while not buffers.is_done:
            if self.is_interrupted:
                raise Interrupted
            wanted = READABLE
            try:
                why, count = buffers.receive(self._socket, QUANTUM_BYTES, self._stay_s, self._others)
            except ssl.SSLWantReadError:
                why, count = BLOCKED, 0
            except ssl.SSLWantWriteError:
                why, count, wanted = BLOCKED, 0, WRITABLE
            self.turn_bytes += count
            self.received_bytes += count
            if why == ENDED:
                raise ConnectionLost
            if why == BLOCKED:
                yield wanted
            elif self.turn_bytes >= QUANTUM_BYTES:
                yield NOW

    def write(self, buffers: SocketBuffers) -> Steps:
        """Send all of them. Raises OSError if the client is gone."""
        while not buffers.is_done:
            wanted = WRITABLE
            try:
                why, count = buffers.send(self._socket, QUANTUM_BYTES, self._stay_s, self._others)
            except ssl.SSLWantWriteError:
                why, count = BLOCKED, 0
            except ssl.SSLWantReadError:
                why, count, wanted = BLOCKED, 0, READABLE
            self.turn_bytes += count
            self.sent_bytes += count
            if why == BLOCKED:
                yield wanted
            elif self.turn_bytes >= QUANTUM_BYTES:
                yield NOW

    def rest(self, deadline_s: float) -> Steps:
        """Between two transfers: the event loop continues it once more has come."""
        self.is_pooled = self.is_on_loop = True
        self.deadline_s = deadline_s
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)  # A transfer may have waited for many bytes.
        has_more = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        yield NOW if has_more else READABLE

    def leave_loop(self) -> Steps:
        """A worker continues it."""
        if self.is_on_loop:
            self.is_on_loop = False
            yield NOW

    def wait(self) -> Steps:
        """Until another thread wakes it. Raises ConnectionLost."""
        if (yield WOKEN) & _GONE:
            raise ConnectionLost

    def linger(self) -> Steps:
        """Let the client read what was sent, although it still sends: otherwise a close would take that from it."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        self._socket.shutdown(socket.SHUT_WR)
        rest, scrap = _LINGER_BYTES, bytearray(64 << 10)
        while rest > 0:
            try:
                count = self._socket.recv_into(scrap)
            except (BlockingIOError, ssl.SSLWantReadError):
                yield READABLE
                continue
            if not count:
                return
            rest -= count
            yield NOW
