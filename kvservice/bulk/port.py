"""The bulk port of a daemon: its listener, its worker threads, its connections, and how transfers begin and end.

A few threads share one epoll: whichever is free continues the next connection that can move, for about 1 MiB, and then
queues it again behind the others. So no client occupies a thread, and no block passes the event loop. Between two
transfers the event loop continues a connection, by an epoll of its own: then calls come, which it answers anyway.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import select
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from kvservice.bulk.calls import Answer, Calls
from kvservice.bulk.connection import NOW, READABLE, BulkConnection, ConnectionLost, Steps
from kvservice.bulk.dialogue import Dialogue
from kvservice.bulk.tickets import TransferTickets
from kvservice.bulk.transfers import CallsOnly, IncomingSave, OutgoingLoad, Transfer
from kvservice.clock import Clock
from kvservice.store.caller import Caller
from kvservice.store.store import BlockStore
from kvservice.store.tasks import Tasks
from kvservice.store.types import FilledUpload, SaveHeader, SaveOutcome, Span
from kvservice.tiers.files import on_thread
from kvservice_api.bulk import CONNECTIONS_MAX, MessageHeader
from kvservice_api.errors import INTERNAL, BulkUnavailable, InvalidFrame, InvalidRequest, KVError, TransferEnded
from kvservice_api.layout import Shard

log = logging.getLogger(__name__)

TICKET_TTL_S = 5.0
_UNJOINED_MAX = 64  # Transfers of one client that none of its connections has joined yet.
_HELLO_S = 10.0  # From the connection, with its handshake, to the first HELLO.
_FRESH_S = 1.0  # A connection that has not said HELLO for longer makes room for another one.
_LOOK_EVERY_S = 0.5
_BACKLOG = 128
_ACCEPTED_A_TURN = 16
_CONTINUED_A_TURN = 8  # Of the event loop, which has other work too.
REASONS = (
    "full",
    "garbage",
    "handshake",
    "timeout",
    "lost",
    "unknown",
    "used",
    "expired",
    "foreign",
    "frame",
    "internal",
)


class Opened(NamedTuple):
    """What a client needs to use a transfer."""

    tickets: list[bytes]
    ttl_s: float


class BulkPort:
    """Until `listen` it refuses all transfers. `context` returns what handshakes use; None without TLS."""

    def __init__(
        self,
        store: BlockStore,
        clock: Clock,
        context: Callable[[], ssl.SSLContext] | None,
        *,
        connections_max: int,
        idle_s: float,
        threads: int,
    ) -> None:
        self._store, self._clock = store, clock
        self._listener: socket.socket | None = None
        self._calls: Calls | None = None
        self.port = 0
        self.connections_max, self._idle_s = connections_max, idle_s
        self._open_tickets: TransferTickets[Transfer] = TransferTickets()
        self._dialogue = Dialogue(self._open_tickets, clock, context, self.count, self._talk_of_call)
        self._tasks = Tasks()
        self._running: set[Transfer] = set()
        self._lock = threading.Lock()
        self._connections: dict[int, BulkConnection] = {}  # By file descriptor.
        self.accepted = 0
        self.refused: Counter[str] = Counter(dict.fromkeys(REASONS, 0))  # Connections and tickets, by reason.
        self.ended: Counter[tuple[str, str]] = Counter({(kind, "OK"): 0 for kind in ("load", "save")})  # Transfers.
        self._bytes = [0, 0]  # Received and sent on connections that are closed.
        self._is_accepting = True
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"bulk-{number}", daemon=True) for number in range(threads)
        ]
        self._epoll = select.epoll()
        self._ending = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._ending, select.EPOLLIN)
        self._loop = asyncio.get_running_loop()
        self._loop_epoll = select.epoll()  # Of the connections that the event loop continues.

    def listen(self, bound: socket.socket) -> None:
        """Accept connections there, once this is started."""
        self._listener = bound
        bound.setblocking(False)
        bound.listen(_BACKLOG)
        self.port = bound.getsockname()[1]
        self._epoll.register(bound, select.EPOLLIN | select.EPOLLONESHOT)

    def answer_calls(self, answer: Answer) -> None:
        """Have it answer calls on connections that have joined a transfer. Without it they are InvalidFrame."""
        self._calls = Calls(answer, partial(self._turn, events=NOW, on_loop=True), self._tasks)

    def _talk_of_call(self, connection: BulkConnection, header: MessageHeader) -> Steps:
        if self._calls is None:
            raise InvalidFrame("this port answers no calls")
        return self._calls.talk(connection, header)

    def start(self) -> None:
        if self._listener is not None:
            for thread in self._threads:
                thread.start()
            self._tasks.start(self._watch(), "bulk connections")
            self._loop.add_reader(self._loop_epoll.fileno(), self._continue_on_loop)

    async def close(self) -> None:
        """End all transfers, close all connections, and stop the threads. Idempotent."""
        if self._is_closed:
            return
        await self._tasks.stop()
        self._is_closed = True
        if self._calls is not None:
            self._calls.is_stopped = True
        self._loop.remove_reader(self._loop_epoll.fileno())
        os.eventfd_write(self._ending, 1)
        await on_thread(self._join)
        await self.close_all(list(self._connections.values()))
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._epoll.close()
        self._loop_epoll.close()
        os.close(self._ending)

    def _join(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    # Facts, for metrics

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def moved_bytes(self) -> tuple[int, int]:
        """Received and sent since the start, with headers. Any thread."""
        with self._lock:
            received, sent = self._bytes
            for each in self._connections.values():
                received, sent = received + each.received_bytes, sent + each.sent_bytes
        return received, sent

    # Transfers

    async def open_load(
        self,
        caller: Caller,
        certificate: bytes,
        lease_id: int,
        shard: Shard | None,
        blocks: Span,
        layers: Span,
        connections: int,
    ) -> Opened:
        """Raises BulkUnavailable, InvalidRequest; as `Loads.to_send`."""
        self._check(caller, connections)
        send = await self._store.loads.to_send(caller, lease_id, shard, blocks, layers)
        load = OutgoingLoad(self, self._clock, caller, certificate, self._idle_s, connections=connections)
        self._run(caller, load, partial(load.run, send))
        return self._opened(load, connections)

    def offer_load(self, caller: Caller, certificate: bytes, lease_id: int, connections: int) -> Opened | None:
        """As `open_load`, for all of a lease. The load begins once a connection has brought a ticket of it. Until then
        it holds nothing, and does not count among the client's transfers. None without a bulk port.
        """
        if self._listener is None:
            return None

        def begin(load: OutgoingLoad) -> None:
            try:
                if self._is_closed:
                    raise TransferEnded("the daemon stops")
                self._run(caller, load, partial(load.run, self._store.loads.to_send_all(caller, lease_id)))
            except KVError as error:
                load.end_with(error)
                self.ended[load.kind, load.result] += 1  # No call has failed, so nothing else says why.

        connections = min(connections, CONNECTIONS_MAX)
        load = OutgoingLoad(self, self._clock, caller, certificate, self._idle_s, begin, connections=connections)
        return self._opened(load, connections, is_offer=True)

    async def open_save(
        self,
        caller: Caller,
        certificate: bytes,
        header: SaveHeader,
        connections: int,
        encode: Callable[[SaveOutcome], bytes],
        *,
        on_ssd: bool,
    ) -> tuple[Opened, FilledUpload]:
        """A save, and its upload with the places that are to be filled. `encode` makes a RESULT of its outcome.

        Raises BulkUnavailable, InvalidRequest; as `Saves.fill`.
        """
        self._check(caller, connections)
        upload = self._store.saves.fill(caller, header, "bulk")
        save = IncomingSave(self, self._clock, caller, certificate, self._idle_s, upload, encode, on_ssd=on_ssd)
        task = self._run(caller, save, save.run)
        try:
            await asyncio.shield(save.opened)
        except asyncio.CancelledError:
            task.cancel()
            raise
        return self._opened(save, connections), upload

    def open_calls(self, caller: Caller, certificate: bytes, connections: int) -> Opened:
        """A transfer without blocks, for connections that carry calls. Raises BulkUnavailable, InvalidRequest,
        UnknownClient.
        """
        self._check(caller, connections)
        self._store.leases.client(caller)
        calls = CallsOnly(self, self._clock, caller, certificate, self._idle_s)
        return self._opened(calls, connections, is_offer=True)

    def supersede(self, caller: Caller, keys: Sequence[bytes]) -> None:
        """End the client's saves of any of these blocks that it has opened and not joined: it has another way now."""
        saves = [each for each in self._unjoined(caller) if isinstance(each, IncomingSave)]
        wanted = set(keys) if saves else set()
        for each in saves:
            if each.stores(wanted):
                each.fail(TransferEnded("its client stores the blocks by another call"))

    def _unjoined(self, caller: Caller) -> list[Transfer]:
        return [each for each in self._running if not each.has_joined and each.client_id == caller.client]

    def _check(self, caller: Caller, connections: int) -> None:
        if self._listener is None:
            raise BulkUnavailable("this daemon has no bulk port")
        if not 1 <= connections <= CONNECTIONS_MAX:
            raise InvalidRequest(f"{connections} connections are not 1..{CONNECTIONS_MAX}", field="connections")
        if len(self._unjoined(caller)) >= _UNJOINED_MAX:
            raise BulkUnavailable(f"{_UNJOINED_MAX} transfers of this client wait for their connections")

    def _run(
        self, caller: Caller, transfer: Transfer, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> asyncio.Task[None]:
        """Raises UnknownClient."""
        client = self._store.leases.client(caller)
        task = self._tasks.start(work(), f"bulk transfer of {client.name}")

        def detached() -> None:
            task.cancel()

        client.on_detach.add(detached)
        self._running.add(transfer)

        def ended(task: asyncio.Task[None]) -> None:
            client.on_detach.discard(detached)
            self._running.discard(transfer)
            transfer.abandon()
            is_fault = not task.cancelled() and task.exception() is not None
            self.ended[transfer.kind, INTERNAL if is_fault else transfer.result] += 1

        task.add_done_callback(ended)
        return task

    def _opened(self, transfer: Transfer, connections: int, *, is_offer: bool = False) -> Opened:
        expires_s = self._clock.monotonic_s() + TICKET_TTL_S
        return Opened(self._open_tickets.issue(transfer, connections, expires_s, is_offer=is_offer), TICKET_TTL_S)

    # Connections, on worker threads

    def _work(self) -> None:
        ready: list[tuple[int, int]] = []
        while not self._is_closed:
            try:
                ready = self._continue_next(ready)
            except Exception:  # Otherwise the others would have a thread less, or none.
                log.exception("a thread of the bulk port goes on after an error")
                ready = []
                self._is_accepting = False  # Maybe: `_watch` makes sure.

    def _continue_next(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What is `ready`, or the next that can move. Returns what is ready afterwards, if a thread has found that."""
        for fd, events in ready or self._epoll.poll(maxevents=1):
            if fd == self._ending:
                break
            if self._listener is not None and fd == self._listener.fileno():
                self._accept()
            elif (connection := self._connections.get(fd)) is not None:
                return self._turn(connection, events)
        return []

    def _turn(self, connection: BulkConnection, events: int, *, on_loop: bool = False) -> list[tuple[int, int]]:
        """Continue it as long as it can move and no other can. Returns the other that can, and its events. The event
        loop continues it once.
        """
        connection.is_woken = True  # First: the thread that has the lock checks it after the release.
        if not connection.lock.acquire(blocking=False):
            return []
        others: list[tuple[int, int]] = []
        try:
            if connection.is_closed:
                return []
            connection.is_woken = False
            assert connection.steps is not None
            wanted = NOW
            while wanted == NOW and not others and connection.is_on_loop == on_loop:
                connection.turn_bytes = 0
                wanted = connection.steps.send(events)
                if connection.turn_bytes and connection.moves is not None:
                    connection.moves(connection.turn_bytes)
                if on_loop:
                    break
                if wanted == NOW:
                    others, events = self._epoll.poll(0, 1), NOW
            self._arm(connection, wanted)
        except StopIteration:
            self._close(connection)
        except Exception as error:
            self._close(connection, _reason(error, connection))
        finally:
            connection.lock.release()
        if connection.is_woken:
            self.wake(connection)
        return others

    def _arm(self, connection: BulkConnection, events: int) -> None:
        if not connection.is_on_loop:
            self._epoll.modify(connection.fd, events | select.EPOLLONESHOT)
            return
        try:
            self._loop_epoll.modify(connection.fd, events | select.EPOLLONESHOT)
        except FileNotFoundError:  # For the first time.
            self._loop_epoll.register(connection.fd, events | select.EPOLLONESHOT)

    def _continue_on_loop(self) -> None:
        for fd, events in self._loop_epoll.poll(0, _CONTINUED_A_TURN):
            if (connection := self._connections.get(fd)) is not None:
                self._turn(connection, events, on_loop=True)

    def wake(self, connection: BulkConnection) -> None:
        """It is continued soon. Any thread."""
        connection.is_woken = True
        with suppress(OSError, ValueError):  # It was closed meanwhile, or the port.
            self._arm(connection, NOW)

    def count(self, reason: str) -> None:
        """One more connection was refused or ended for this reason. Any thread."""
        with self._lock:
            self.refused[reason] += 1

    def _close(self, connection: BulkConnection, reason: str = "") -> None:
        """With its lock."""
        if connection.is_closed:
            return
        if reason and not connection.is_counted:
            self.count(reason)
        with self._lock:
            if self._connections.get(connection.fd) is connection:
                del self._connections[connection.fd]
            self._bytes[0] += connection.received_bytes
            self._bytes[1] += connection.sent_bytes
        connection.close()

    async def pass_turns(self, connections: Sequence[BulkConnection]) -> None:
        """On return no thread is in a turn that had begun before."""

        def wait() -> None:
            for each in connections:
                with each.lock:
                    pass
                if each.is_woken:  # A thread that had its turn meanwhile has left it.
                    self.wake(each)

        if connections:
            await on_thread(wait)

    async def close_all(self, connections: Sequence[BulkConnection]) -> None:
        """On return no thread continues them any more, and they use no memory of a transfer."""

        def close() -> None:
            for each in connections:
                with each.lock:
                    self._close(each)

        if connections:
            await on_thread(close)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            for _ in range(_ACCEPTED_A_TURN):
                accepted, _ = self._listener.accept()
                self._add(accepted)
        except BlockingIOError:
            pass
        except OSError:  # The process has no more file descriptors: `_watch` tries again.
            self._is_accepting = False
            return
        self._epoll.modify(self._listener, select.EPOLLIN | select.EPOLLONESHOT)

    def _add(self, accepted: socket.socket) -> None:
        now_s = self._clock.monotonic_s()
        self.accepted += 1
        if self._is_closed or not self._has_room(now_s):
            self.count("full")
            accepted.close()
            return
        accepted.setblocking(False)
        if accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = BulkConnection(accepted, now_s, now_s + _HELLO_S, self._epoll.fileno())
        connection.steps = self._dialogue.talk(connection)
        next(connection.steps)
        with self._lock:
            self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, READABLE | select.EPOLLONESHOT)

    def _has_room(self, now_s: float) -> bool:
        """Whether one more may be open. If none is left, the oldest one that has not said HELLO for `_FRESH_S` makes
        room; if there is none, the pooled one that is idle for the longest time. But those that have not said HELLO
        take no more than a quarter of the port from pooled ones: they may be a stranger's.
        """
        if len(self._connections) < self.connections_max:
            return True
        connections = list(self._connections.values())
        strangers = [each for each in connections if not each.has_joined]
        closed_first = [each for each in strangers if each.since_s + _FRESH_S <= now_s]
        if not closed_first and (not strangers or len(strangers) < self.connections_max // 4):
            closed_first = [each for each in connections if each.is_pooled]
        closed_first.sort(key=lambda each: each.deadline_s)

        def why(each: BulkConnection) -> str | None:
            return "full" if each.is_pooled or not each.has_joined else None

        return any(self._close_if(each, why) for each in closed_first)

    def _close_if(self, connection: BulkConnection, why: Callable[[BulkConnection], str | None]) -> bool:
        """Close it, unless a thread continues it just now. `why` is asked with its lock, because it may have joined a
        transfer since the caller looked at it. It returns the reason that is counted, or "" for none; None to keep it.
        """
        if not connection.lock.acquire(blocking=False):
            return False
        try:
            if (reason := why(connection)) is None:
                return False
            self._close(connection, reason)
            return True
        finally:
            connection.lock.release()
            if connection.is_woken:  # While this thread had the lock.
                self.wake(connection)

    # On the event loop

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_EVERY_S)
            now_s = self._clock.monotonic_s()
            for transfer in self._open_tickets.expire(now_s):
                if transfer in self._running:
                    transfer.fail(TransferEnded("no connection has brought a ticket of the transfer in time"))
            for each in list(self._connections.values()):
                if each.deadline_s <= now_s:
                    self._close_if(each, partial(_overdue, now_s))
            if not self._is_accepting and self._listener is not None:
                self._is_accepting = True
                self._epoll.modify(self._listener, select.EPOLLIN | select.EPOLLONESHOT)


def _overdue(now_s: float, connection: BulkConnection) -> str | None:
    """By which reason a connection is counted that is closed because its time is over; None if it is not."""
    if connection.deadline_s > now_s:
        return None
    return "" if connection.has_joined else "timeout"


def _reason(error: Exception, connection: BulkConnection) -> str:
    """By which a connection is counted that such an error has ended."""
    if isinstance(error, ssl.SSLError) and not connection.has_joined:
        return "handshake"
    if isinstance(error, InvalidFrame):
        return "garbage"
    if isinstance(error, ConnectionLost | OSError):
        return "lost" if connection.deadline_s == math.inf or connection.is_in_first_hello else ""
    log.error("a connection of the bulk port failed", exc_info=error)
    return "internal"
