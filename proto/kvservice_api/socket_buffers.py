"""Buffers that are filled from a socket or sent to one, in order, with the xxh3-64 of each.

On plain sockets a C extension (`socket_buffers.c`) moves many pieces in one call, without the interpreter's lock, and
sums each piece while it is in the cache. Without the extension, and on TLS, Python does the same piece by piece.
"""

from __future__ import annotations

import socket
import ssl
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, cast

import xxhash

from kvservice_api import copying
from kvservice_api.tcp_links import set_corked

# Why a move has ended. The numbers are also in `socket_buffers.c`.
MOVED: Final = 0  # All bytes have moved, or those of a turn, or the time is over.
BLOCKED: Final = 1  # The socket has or takes no more now, or a signal has come.
ENDED: Final = 2  # The other side has closed the connection.

_PIECE_BYTES = 512 << 10  # By one call of Python, and summed after it.
_LOW_BYTES = 256 << 10  # Waited for, if so many are missing: each wait costs as much as copying 50 KiB.
_TLS_BYTES = 256 << 10  # Sent by one call: it returns once all of them are written, and only then they count.
_RECORDS_BYTES = 256 << 10  # Received by one call on TLS.
_CORKED_BYTES_MIN = 128 << 10  # Of a message on TLS: two segments of loopback.
_JOINED_BYTES = 16 << 10  # Smaller buffers are sent together on TLS: a record.
_BUFFERS_MAX = 512  # In one call; Linux takes 1024.
_PARTIAL_BYTES = 72  # What `socket_buffers.c` keeps of the checksum of a buffer that is there in part.


class SocketBuffers:
    """For one thread at a time. `sums` has the checksum of each buffer that has moved, if they are `summed`.

    What is received `streamed` does not stay in the processor's caches, if it is summed too: faster for transfers that
    are larger than these (`copying.STREAMED_BYTES_MIN`).
    """

    __slots__ = ("_at", "_buffers", "_digest", "_is_corked", "_offset", "_partial", "_streamed", "sums")

    def __init__(self, buffers: Sequence[memoryview], *, summed: bool = False, streamed: bool = False) -> None:
        self._buffers = buffers
        self._streamed = streamed
        self._at = self._offset = 0  # The first buffer that is not complete, and how much of it has moved.
        self.sums = array("Q", bytes(8 * len(buffers) if summed else 0))
        self._partial = bytearray(_PARTIAL_BYTES if summed else 0)
        self._digest: xxhash.xxh3_64 | None = None
        self._is_corked = False
        self._advance(0)

    @property
    def is_done(self) -> bool:
        return self._at == len(self._buffers)

    def receive(self, source: socket.socket, turn_bytes: int, wait_s: float, watched: int = -1) -> tuple[int, int]:
        """Fill buffers. Returns why it ends, and how many bytes have come.

        It ends after `wait_s` and, if the descriptor `watched` is readable, after `turn_bytes`. With one, the socket
        blocks no thread: the extension waits for both. Without one, as the socket is set. Raises OSError, and SSLError
        on TLS.
        """
        if copying.native is not None and not isinstance(source, ssl.SSLSocket):
            return self._move(source, turn_bytes, wait_s, watched, is_sending=False)
        try:
            if isinstance(source, ssl.SSLSocket):
                into = self._buffers[self._at][self._offset :][:_RECORDS_BYTES]
                count = _receive_records(source, into, wait_s)
            else:
                flags = socket.MSG_WAITALL if watched < 0 else socket.MSG_DONTWAIT
                count = source.recvmsg_into(self._next(_PIECE_BYTES), 0, flags)[0]
        except (BlockingIOError, TimeoutError):
            if watched >= 0:
                self._set_low(source)
            return BLOCKED, 0
        self._advance(count)
        return MOVED if count else ENDED, count

    def send(self, target: socket.socket, turn_bytes: int, wait_s: float, watched: int = -1) -> tuple[int, int]:
        """Send buffers; otherwise as `receive`."""
        if copying.native is not None and not isinstance(target, ssl.SSLSocket):
            return self._move(target, turn_bytes, wait_s, watched, is_sending=True)
        try:
            if isinstance(target, ssl.SSLSocket):
                count = self._send_records(target)
            else:
                flags = 0 if watched < 0 else socket.MSG_DONTWAIT
                count = target.sendmsg(self._next(_PIECE_BYTES), (), flags)
        except (BlockingIOError, TimeoutError):
            return BLOCKED, 0
        self._advance(count)
        if self._is_corked and self.is_done:
            set_corked(target, is_corked=False)
        return MOVED, count

    def _move(
        self, plain: socket.socket, turn_bytes: int, wait_s: float, watched: int, *, is_sending: bool
    ) -> tuple[int, int]:
        assert copying.native is not None
        why: int
        count: int
        why, self._at, self._offset, count = copying.native.move_buffers(
            plain.fileno(),
            watched,
            is_sending,
            self._buffers,
            self._at,
            self._offset,
            self.sums,
            self._partial,
            self._streamed,
            turn_bytes,
            wait_s,
        )
        return why, count

    def _next(self, size_bytes: int) -> list[memoryview]:
        """About so many bytes, for one call: each buffer costs time even if none of its bytes move."""
        found = [self._buffers[self._at][self._offset :][:size_bytes]]
        size_bytes -= len(found[0])
        for each in self._buffers[self._at + 1 : self._at + _BUFFERS_MAX]:
            if size_bytes <= 0:
                break
            found.append(each[:size_bytes])
            size_bytes -= len(each)
        return found

    def _send_records(self, target: ssl.SSLSocket) -> int:
        """TLS writes each record of 16 KiB by itself. Corked, the kernel sends several of them in one segment."""
        if not self._is_corked and sum(map(len, self._next(_CORKED_BYTES_MIN))) == _CORKED_BYTES_MIN:
            self._is_corked = True
            set_corked(target, is_corked=True)
        return target.send(self._record())

    def _record(self) -> memoryview | bytes:
        found = self._buffers[self._at][self._offset :][:_TLS_BYTES]
        return found if len(found) >= _JOINED_BYTES else b"".join(self._next(_JOINED_BYTES))

    def _advance(self, count: int) -> None:
        """So many bytes more have moved. Passes empty buffers."""
        while self._at < len(self._buffers):
            buffer = self._buffers[self._at]
            begin, end = self._offset, min(self._offset + count, len(buffer))
            if begin == end < len(buffer):
                return
            if self.sums:
                self._sum(buffer, begin, end)
            count -= end - begin
            self._offset = end
            if end == len(buffer):
                self._at, self._offset = self._at + 1, 0

    def _sum(self, buffer: memoryview, begin: int, end: int) -> None:
        if end - begin == len(buffer):
            self.sums[self._at] = xxhash.xxh3_64_intdigest(buffer)
            return
        if self._digest is None:
            self._digest = xxhash.xxh3_64()
        self._digest.update(buffer[begin:end])
        if end == len(buffer):
            self.sums[self._at], self._digest = self._digest.intdigest(), None

    def _set_low(self, source: socket.socket) -> None:
        """It is readable once as many bytes as are missing have come, or `_LOW_BYTES`; and at its end."""
        missing = sum(map(len, self._next(_LOW_BYTES)))
        with suppress(OSError):
            source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, missing)


def _receive_records(source: ssl.SSLSocket, into: memoryview, wait_s: float) -> int:
    """Fill it: TLS reads a record of at most 16 KiB per call. Less if nothing comes in the socket's time limit, and
    after `wait_s`: each record may take the time limit of the socket. Returns the number of bytes, 0 at the end. Raises
    as `SSLSocket.read` if none has come.
    """
    size, end_s = len(into), time.monotonic() + wait_s
    read = cast(Callable[[int, memoryview], int], source.read)  # `recv_into` calls it, for each record.
    filled = count = read(size, into)
    while count and filled < size and time.monotonic() < end_s:
        try:
            count = read(size - filled, into[filled:])
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            break
        filled += count
    return filled
