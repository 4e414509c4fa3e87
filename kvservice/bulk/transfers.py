"""Loads and saves on the bulk port: what their connections do, on worker threads, and their ends, on the event loop."""

from __future__ import annotations

import asyncio
import math
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice.bulk.connection import BulkConnection, Interrupted, Steps
from kvservice.clock import Clock
from kvservice.store.caller import Caller
from kvservice.store.types import DamagedSlice, FilledUpload, LayerSlice, Part, ReceivedBytes, SaveOutcome
from kvservice_api.bulk import ERROR_BYTES_MAX, UNIT_BYTES, MessageKind, pack_header, unit_bytes
from kvservice_api.errors import DeadlineExceeded, IncompleteSave, InvalidFrame, KVError, TransferEnded
from kvservice_api.image import checksum
from kvservice_api.socket_buffers import SocketBuffers
from kvservice_api.status import to_status

_FLUSH_S = 5.0  # For clients to take the rest of messages that have begun, before an error.
_END = pack_header(MessageKind.END, 0)


class Wakes(Protocol):
    """The bulk port, for a transfer."""

    def wake(self, connection: BulkConnection) -> None:
        """A worker continues it soon. Any thread."""

    def count(self, reason: str) -> None:
        """One more connection has ended for this reason. Any thread."""

    async def pass_turns(self, connections: Sequence[BulkConnection]) -> None:
        """On return no thread is in a turn that had begun before."""

    async def close_all(self, connections: Sequence[BulkConnection]) -> None:
        """On return no thread continues them any more, and they use no memory of a transfer."""


class Transfer:
    """What loads and saves have in common. Its connections use it on worker threads, under `_lock`."""

    kind: ClassVar[str]

    def __init__(self, port: Wakes, clock: Clock, caller: Caller, certificate: bytes, idle_s: float) -> None:
        self._port, self._clock = port, clock
        self.caller, self.client_id, self.certificate = caller, caller.client, certificate
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._connections: dict[BulkConnection, int] = {}  # And the numbers of their tickets.
        self._failure: Exception | None = None
        self._final: bytes | None = None  # The message that ends it, on its first connection.
        self._is_error = False
        self._waiting: list[asyncio.Future[None]] = []
        self.moved_s = clock.monotonic_s()  # When bytes have moved.
        self.has_joined = False  # Any connection.
        self._when_joined: Callable[[], None] | None = None
        self.result = "OK"  # Or the reason of the error that has ended it.
        self.closes_connections = False  # Once it has ended.

    # On worker threads

    def join(self, connection: BulkConnection, number: int) -> None:
        """Also after the transfer's end: then it gets the final message."""
        with self._lock:
            self._connections[connection] = number
            connection.is_interrupted = False
            is_first, self.has_joined = not self.has_joined, True
        if is_first:
            self._loop.call_soon_threadsafe(self._joined)
        self._restart_idle()

    def moves(self, size_bytes: int) -> None:
        """So many bytes have moved."""
        self._restart_idle()

    def _restart_idle(self) -> None:
        self.moved_s = self._clock.monotonic_s()

    def talk(self, connection: BulkConnection) -> Steps:
        """All that is said on a connection that has joined."""
        raise NotImplementedError

    def left(self, connection: BulkConnection) -> None:
        """The connection is closed, or has got the final message."""
        with self._lock:
            del self._connections[connection]
            is_lost = self._final is None and self._failure is None
            is_last = self._final is not None and not self._connections
        if is_lost:
            self.fail(TransferEnded("a connection of the transfer was lost"))
        if is_last:
            self._notify()

    def fail(self, error: Exception) -> None:
        """The first error ends the transfer. Any thread."""
        with self._lock:
            if self._failure is None:
                self._failure = error
        self._notify()

    def _notify(self) -> None:
        self._loop.call_soon_threadsafe(self._changed)

    def finish(self, connection: BulkConnection) -> Steps:
        """Send the final message. Then, after the error of a save, the connection is of no use."""
        with self._lock:  # `end` interrupts connections before it has set the message.
            final, is_first = self._final, self._is_error or self._connections[connection] == 0
        assert final is not None
        connection.deadline_s = self._clock.monotonic_s() + self._idle_s
        yield from connection.write(SocketBuffers([memoryview(final if is_first else _END)]))

    # On the event loop

    def when_joined(self, call: Callable[[], None] | None) -> None:
        """Call it once a connection has joined. A KVError that it raises ends the transfer. None: call nothing."""
        self._when_joined = call
        if self.has_joined:
            self._joined()

    def _joined(self) -> None:
        call, self._when_joined = self._when_joined, None
        if call is not None:
            try:
                call()
            except KVError as error:
                self.fail(error)

    def _changed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def _until(self, is_done: Callable[[], bool], stalled: KVError) -> None:
        """Raises what `fail` was called with; `stalled` if no byte moves for too long."""
        while not is_done():
            if self._failure is not None:
                raise self._failure
            waiter = self._loop.create_future()
            self._waiting.append(waiter)
            if not self._is_to_wait(is_done):
                continue
            rest_s = self.moved_s + self._idle_s - self._clock.monotonic_s()
            try:
                async with self._clock.timeout(max(0.0, rest_s)):
                    await waiter
            except TimeoutError:
                if self._clock.monotonic_s() >= self.moved_s + self._idle_s:
                    raise stalled from None

    def _is_to_wait(self, is_done: Callable[[], bool]) -> bool:
        return self._failure is None and not is_done()

    def end(self, message: bytes, *, is_error: bool = False) -> None:
        """Give all connections their final message."""
        with self._lock:
            if self._final is not None:
                return
            ends_s = self._clock.monotonic_s() + self._idle_s
            for connection in self._connections:
                connection.is_interrupted = True  # First: it looks at the message without the lock.
                connection.deadline_s = ends_s  # Its socket may be full, so that no worker continues it.
            self._final, self._is_error = message, is_error
            connections = list(self._connections)
        for connection in connections:
            self._port.wake(connection)

    def abandon(self) -> None:
        """Its task has ended. If that was cancelled before its first step, this is the transfer's end."""
        if self._final is None:
            self.end_with(TransferEnded(f"the {self.kind} was ended"))

    def end_with(self, error: KVError) -> None:
        self.result = error.reason
        data = to_status(error).SerializeToString()
        if len(data) > ERROR_BYTES_MAX:
            data = to_status(type(error)(error.message[:1000])).SerializeToString()
        self.end(pack_header(MessageKind.ERROR, len(data)) + data, is_error=True)


class CallsOnly(Transfer):
    """A transfer without blocks: it ends at once, and its connections carry calls from then on."""

    kind = "calls"

    def __init__(self, port: Wakes, clock: Clock, caller: Caller, certificate: bytes, idle_s: float) -> None:
        super().__init__(port, clock, caller, certificate, idle_s)
        self.end(_END)

    def talk(self, connection: BulkConnection) -> Steps:
        yield from self.finish(connection)


class OutgoingLoad(Transfer):
    """A load: the parts that the store queues, for whichever connection can take one. `PartSender` for the store."""

    kind = "load"

    def __init__(
        self,
        port: Wakes,
        clock: Clock,
        caller: Caller,
        certificate: bytes,
        idle_s: float,
        begin: Callable[[OutgoingLoad], None] | None = None,
        *,
        connections: int = 1,
    ) -> None:
        """`begin` starts it on the event loop once a connection has joined; without it, the caller does."""
        super().__init__(port, clock, caller, certificate, idle_s)
        self._begin = begin
        self.sent_bytes = 0
        self.unit_bytes = unit_bytes(connections)
        self._queue: deque[Part] = deque()
        self._queued_all = False
        self._is_stopped = False
        self._moving_bytes = 0  # Since the idle time was restarted.
        self._sending: set[BulkConnection] = set()
        self._parked: set[BulkConnection] = set()
        self._notify_at: float = math.inf

    async def run(self, send: Callable[[OutgoingLoad], Awaitable[None]]) -> None:
        try:
            await send(self)
        except KVError as error:
            self.end_with(error)
        except BaseException:
            self.abandon()
            raise

    # On worker threads

    def talk(self, connection: BulkConnection) -> Steps:
        while self._final is None:
            part = self._take(connection)
            if part is None:
                yield from connection.wait()
                continue
            size = sum(map(len, part.runs))
            if (found := _damaged(part)) is not None:
                self.fail(DamagedSlice(found))  # First: without it, the last part of another connection is the end.
                self._done(connection, 0)
                continue
            yield from connection.write(SocketBuffers(_message(part, size)))
            self._done(connection, size)
        yield from self.finish(connection)

    def moves(self, size_bytes: int) -> None:
        """A client that reads less than a unit in its idle time keeps the blocks in place for too long."""
        with self._lock:
            self._moving_bytes += size_bytes
            if self._moving_bytes < UNIT_BYTES:
                return
            self._moving_bytes = 0
        self._restart_idle()

    def _take(self, connection: BulkConnection) -> Part | None:
        with self._lock:
            if self._failure is None and not self._is_stopped and self._queue:
                self._sending.add(connection)
                return self._queue.popleft()
            self._parked.add(connection)
            return None

    def _done(self, connection: BulkConnection, size: int) -> None:
        with self._lock:
            self._sending.discard(connection)
            self.sent_bytes += size
            is_notified = self.sent_bytes >= self._notify_at
            if is_notified:
                self._notify_at = math.inf
            is_all = self._queued_all and not self._is_stopped and self._failure is None
            is_last = is_all and not self._queue and not self._sending
        if is_last and size:
            self.end(_END)
        if is_notified:
            self._notify()

    def left(self, connection: BulkConnection) -> None:
        with self._lock:
            self._sending.discard(connection)
            self._parked.discard(connection)
        super().left(connection)

    # On the event loop

    def _joined(self) -> None:
        begin, self._begin = self._begin, None
        if begin is not None:
            begin(self)
        super()._joined()

    # For the store

    def put(self, parts: Sequence[Part], *, is_last: bool) -> None:
        with self._lock:
            if not self._queue and not self._sending:
                self._restart_idle()  # Until now the client has waited, not the daemon.
            self._queue.extend(parts)
            self._queued_all = is_last
            parked, self._parked = self._parked, set()
        for connection in parked:
            self._port.wake(connection)

    async def until_sent(self, size_bytes: int) -> None:
        def is_sent() -> bool:
            with self._lock:
                if self.sent_bytes >= size_bytes:
                    return True
                self._notify_at = min(self._notify_at, size_bytes)
                return False

        stalled = DeadlineExceeded(f"the client read nothing for {self._idle_s:g} s, or too little; the load was ended")
        await self._until(is_sent, stalled)

    async def until_taken(self) -> None:
        self.end(_END)
        self._restart_idle()
        stalled = DeadlineExceeded(f"the client did not read the end of its load for {self._idle_s:g} s")
        await self._until(lambda: not self._connections, stalled)

    async def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            self._queue.clear()
        task = asyncio.current_task()
        is_cancelled = task is not None and task.cancelling()  # The client has gone, or the daemon stops.
        ends_s = self._clock.monotonic_s() + (0.0 if is_cancelled else _FLUSH_S)
        try:
            while self._sending and self._clock.monotonic_s() < ends_s:
                await self._clock.sleep(0.005)
        finally:
            with self._lock:
                sending = list(self._sending)
            await self._port.close_all(sending)


class IncomingSave(Transfer):
    """A save: connections write to the upload's places."""

    kind = "save"

    def __init__(
        self,
        port: Wakes,
        clock: Clock,
        caller: Caller,
        certificate: bytes,
        idle_s: float,
        upload: FilledUpload,
        encode: Callable[[SaveOutcome], bytes],
        *,
        on_ssd: bool,
    ) -> None:
        super().__init__(port, clock, caller, certificate, idle_s)
        self._upload, self._encode, self._on_ssd = upload, encode, on_ssd
        self._received: ReceivedBytes | None = None
        self._commit: NDArray[np.uint64] | None = None
        self.opened: asyncio.Future[FilledUpload] = self._loop.create_future()

    async def run(self) -> None:
        try:
            async with self._upload as upload:
                try:
                    self._received = ReceivedBytes(upload)
                    self._restart_idle()
                    self.opened.set_result(upload)
                    outcome = await self._committed(self._received)
                except BaseException as error:
                    self._end_by(error)  # From now on no thread begins to write to the places.
                    with self._lock:
                        connections = list(self._connections)
                    await self._port.pass_turns(connections)
                    raise
            data = self._encode(outcome)
            self.end(pack_header(MessageKind.RESULT, len(data)) + data)
        except KVError as error:
            self._end_by(error)
        except BaseException as error:
            self._end_by(error)
            raise

    async def _committed(self, received: ReceivedBytes) -> SaveOutcome:
        stalled = IncompleteSave(f"nothing arrived for {self._idle_s:g} s")
        await self._until(lambda: self._commit is not None, stalled)
        await self._until(lambda: not received.missing_bytes, stalled)
        assert self._commit is not None
        return await self._upload.commit(received.checksums, on_ssd=self._on_ssd, expected=self._commit)

    def _end_by(self, error: BaseException) -> None:
        if isinstance(error, KVError):
            self.end_with(error)
        else:
            self.abandon()

    def end_with(self, error: KVError) -> None:
        self.closes_connections = True
        super().end_with(error)
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # Otherwise asyncio logs it if the call was cancelled.

    def stores(self, keys: set[bytes]) -> bool:
        """Whether it stores any of these blocks."""
        return not keys.isdisjoint(self._upload.request.keys)

    # On worker threads

    def talk(self, connection: BulkConnection) -> Steps:
        try:
            while self._final is None:
                yield from self._message(connection)
        except Interrupted:
            pass
        except InvalidFrame as error:
            self._port.count("frame")
            connection.is_counted = True
            self.fail(error)
            while self._final is None:
                yield from connection.wait()
        yield from self.finish(connection)

    def _message(self, connection: BulkConnection) -> Steps:
        header = yield from connection.read_header()
        received = self._received
        assert received is not None
        if header.kind is MessageKind.DATA:
            claimed = received.claim(header.layer, header.first_block, header.offset_bytes, header.size_bytes)
            buffers = SocketBuffers(claimed.memory, summed=True, streamed=received.is_large)
            yield from connection.read(buffers)
            received.arrived(claimed, buffers.sums)
            if not received.missing_bytes:
                self._notify()
        elif header.kind is MessageKind.COMMIT and self._connections[connection] == 0:
            if header.size_bytes != 8 * received.slice_count:
                raise InvalidFrame(f"the checksums have {header.size_bytes} bytes, not {8 * received.slice_count}")
            data = bytearray(header.size_bytes)
            yield from connection.read(SocketBuffers([memoryview(data)]))
            self._commit = np.frombuffer(data, "<u8").astype(np.uint64)
            self._notify()
            while self._final is None:
                yield from connection.wait()
        else:
            raise InvalidFrame(f"a message {header.kind.name} is not for this connection now")


def _message(part: Part, size: int) -> list[memoryview]:
    """With the checksums, if the client verifies the part."""
    at = {"layer": part.layer, "first_block": part.first_block}
    if not part.checksums:
        head = pack_header(MessageKind.DATA, size, offset_bytes=part.first_offset_bytes, **at)
        return [memoryview(head), *part.runs]
    sums = struct.pack(f"<{len(part.checksums)}Q", *part.checksums)
    head = pack_header(MessageKind.SUMMED_DATA, size + len(sums), offset_bytes=size, **at)
    return [memoryview(head), *part.runs, memoryview(sums)]


def _damaged(part: Part) -> LayerSlice | None:
    """The first slice of the part whose bytes are not those that were stored."""
    return next((found for found in part.unverified if checksum(found.data) != found.expected), None)
