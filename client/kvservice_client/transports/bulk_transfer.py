"""One transfer on the bulk port: its connections, its threads, and how it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from types import TracebackType
from typing import Self

from kvservice_api import spans
from kvservice_api.bulk import CONNECTIONS_MAX
from kvservice_api.errors import InvalidFrame, KVError, TransferEnded
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import forks
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.retry import Deadline
from kvservice_client.transports.base import LoadOrder, NotCarried, OfferRefused
from kvservice_client.transports.bulk_connections import BulkConnection, BulkConnections, Endpoint
from kvservice_client.transports.bulk_messages import answer_of, call, carries_call, send_hello

_CONNECTION_BYTES = 8 * 2**20  # Another connection is worth its thread for as many bytes.
_CONNECTIONS_NEAR, _CONNECTIONS_FAR = 2, 8  # A window of a few MiB does not fill a long link.
_FAR_RTT_S = 1e-3
_PROCESSORS_MIN = 4  # With fewer, a second plain connection near by is worth its threads for large transfers only.
_LARGE_BYTES = 64 * 2**20
END_S = 0.5  # For the end of a transfer of which all has arrived. Otherwise its connection is not kept.


class NotNeeded(Exception):
    """A thread's connection came after the transfer had ended on the others."""


class BulkTransfer:
    """A context manager. Leaving it ends the transfer, and waits until none of its threads uses the caller's memory."""

    def __init__(self, connection: Connection, pool: BulkConnections, client_id: bytes, deadline: Deadline) -> None:
        self._connection = connection
        self._pool = pool
        self._client_id = client_id
        self._deadline = deadline
        self.changed = threading.Condition()
        self.error: Exception | None = None  # The first of a thread.
        self.progress = 0  # Counts what arrives.
        self.working = 0  # Threads that have not done their work yet.
        self._running = 0  # Threads that have not ended yet.
        self.first: BulkConnection
        self.is_far = False  # Whether one connection is much slower than several.
        self._used: list[BulkConnection] = []
        self._threads: list[threading.Thread] = []
        self._is_over = False
        self._is_offered = False
        self._fresh_until_s = 0.0  # Until then the daemon that has issued the tickets takes them.
        self._generation = forks.generation

    def take_up(self, order: LoadOrder, size_bytes: int) -> Sequence[bytes]:
        """If a load of these blocks is offered, take the first connection, and return the tickets that are of use; none
        if it is not. If the daemon refuses them, leaving this raises OfferRefused. Raises BulkUnavailable.
        """
        offered = order.offered if not order.first_layer else None
        tickets = offered.take(self._deadline.clock.now_s()) if offered is not None else []
        if tickets:
            self._is_offered = True
            self._connect()
            tickets = tickets[: self.connections(size_bytes)]
        return tickets

    def _connect(self) -> None:
        self._take_first(self._pool.endpoint(self._connection.limits(self._deadline)))
        self.is_far = self.first.rtt_s >= _FAR_RTT_S

    def open(self, request: pb.OpenTransferRequest, size_bytes: int) -> pb.OpenTransferResponse:
        """Take the first connection, and ask for tickets. Raises BulkUnavailable, InvalidFrame, the daemon's errors."""
        deadline = self._deadline
        self._connect()
        request.connections = self.connections(size_bytes)
        is_called = (opened := self._called(request)) is not None
        if not is_called:
            channel = self._connection.channel
            # As a stream of one answer, because a stream ends when its load is cancelled.
            with closing(
                channel.stream(BLOCKS + "OpenTransfer", request, pb.OpenTransferResponse, deadline)
            ) as answers:
                opened = next(answers, None)
        if opened is None or not opened.tickets:
            raise InvalidFrame("the daemon opened a transfer without a ticket")
        self._fresh_until_s = deadline.clock.now_s() + opened.ttl_ms / 2000
        if not is_called:  # Else the ticket is bound to the certificate of the first connection.
            endpoint = self._pool.endpoint(self._connection.limits(deadline))
            if endpoint != self.first.endpoint:  # The TLS files have changed, and the ticket is bound to them.
                self.release(self.first)
                self._take_first(endpoint)
        return opened

    def _called(self, request: pb.OpenTransferRequest) -> pb.OpenTransferResponse | None:
        """The answer, asked for on the first connection. None if the request must be sent over gRPC."""
        if spans.current() is not None or not carries_call(self.first, request):
            return None
        with self.answer():
            return answer_of(pb.OpenTransferResponse, *call(self.first, "OpenTransfer", request, self._deadline))

    def connections(self, size_bytes: int) -> int:
        """How many are of use for so many bytes."""
        return connections_of(size_bytes, self.first.rtt_s, self.first.endpoint)

    def _take_first(self, endpoint: Endpoint) -> None:
        try:
            with self.answer() if self._pool.is_demanded() else nullcontext():  # Else it is no answer that is late.
                self.first = self._pool.take(endpoint, self._deadline, self)
        except OSError as error:
            raise self._explained(error) from error

    def greet(self, ticket: bytes) -> None:
        """Begin on the first connection."""
        with self.answer():
            send_hello(self.first, ticket, self._client_id, self._deadline)

    def start(
        self,
        ticket: bytes | None,
        work: Callable[[BulkConnection], None],
        then: Callable[[BulkConnection], None] | None = None,
    ) -> None:
        """Have a thread do the work, on a connection of its own; without a ticket, on the first one.

        Raises NotCarried if there is no thread for the first one; without another one, the others carry all.
        """
        thread = threading.Thread(target=self._run, args=(ticket, work, then), name="kvservice-bulk", daemon=True)
        with self.changed:
            self.working += 1
            self._running += 1
        try:
            thread.start()
        except RuntimeError as error:
            with self.changed:
                self.working -= 1
                self._running -= 1
            if ticket is None:
                raise NotCarried(f"no thread to receive it: {error}") from error

    def _run(
        self,
        ticket: bytes | None,
        work: Callable[[BulkConnection], None],
        then: Callable[[BulkConnection], None] | None,
    ) -> None:
        is_working = True
        with self.changed:
            if self._is_over:  # The caller has left, and does not wait for this thread.
                return
            self._threads.append(threading.current_thread())
        try:
            connection = self.first if ticket is None else self._another(ticket)
            if connection is not None:
                work(connection)
                is_working = False
                with self.changed:
                    self.working -= 1
                    self.changed.notify_all()
                if then is not None:
                    then(connection)
                self.release(connection)
        except NotNeeded:
            pass
        except Exception as error:
            self.error = self.error or error  # Before the thread counts itself out: the caller looks after that.
        finally:
            with self.changed:
                self._running -= 1
                self.working -= is_working
                self.changed.notify_all()

    def _another(self, ticket: bytes) -> BulkConnection | None:
        """None if there is none: the others carry all."""
        try:
            connection = self._pool.take(self.first.endpoint, self._deadline, self)
            send_hello(connection, ticket, self._client_id)
        except (OSError, KVError):
            return None
        return connection

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        """Raises the first error of a thread, or the deadline's, which may be for the time without an arrival;
        NotCarried if no thread is left that could change it.
        """
        deadline, seen = self._deadline, -1
        try:
            with self.changed:
                while not is_done():
                    self.check()
                    if seen != self.progress:
                        seen = self.progress
                        deadline.begin_answer()
                    wait_s = deadline.remaining_s
                    if not wait_s:
                        raise deadline.error
                    if self.is_over or not self.working:
                        raise NotCarried("its connections ended before all had arrived")
                    if deadline.idle_s is not None:
                        wait_s = min(wait_s, deadline.idle_s / 2)
                    deadline.clock.wait_for(self.changed, lambda: is_done() or self._has_stopped, wait_s)
        finally:
            deadline.end_answer()

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def _has_stopped(self) -> bool:
        return self._is_over or not self.working or self.error is not None

    def answer(self) -> AbstractContextManager[None]:
        """While the caller's thread uses the first connection. Explains its errors."""
        return _Answer(self)

    def check(self) -> None:
        """Raises the first error of a thread."""
        if self.error is not None:
            raise self._explained(self.error)

    def check_not_over(self) -> None:
        if self._is_over:
            raise ConnectionAbortedError("the transfer has ended")

    def release(self, connection: BulkConnection) -> None:
        """It may carry another transfer."""
        with self.changed:
            if self._is_over or connection not in self._used:
                return
            self._used.remove(connection)
        self._pool.put_back(connection)

    def finish(self) -> None:
        """All has arrived: let the threads end by themselves, so that their connections are kept."""
        with self.changed:
            self.changed.wait_for(lambda: not self._running, END_S)

    def shut_down(self) -> None:
        """End the transfer, from any thread. Its threads end soon."""
        with self.changed:
            self._is_over = True
            for each in self._used:
                each.shut_down()
            self.changed.notify_all()

    def use(self, connection: BulkConnection) -> None:
        """A connection of this transfer from now on. Raises as `check_not_over`."""
        with self.changed:
            self._used.append(connection)  # Leaving the transfer closes it.
            if self._deadline.idle_s is not None:
                connection.arrived, connection.pause_s = self._arrived, self._deadline.idle_s / 4
            self.check_not_over()

    def _arrived(self) -> None:
        with self.changed:
            self.progress += 1

    def _explained(self, error: Exception) -> Exception:
        if isinstance(error, OSError):
            if not self._deadline.remaining_s:
                return self._deadline.error
            return NotCarried(f"its connection broke: {error.strerror or error}")
        return error

    def __enter__(self) -> Self:
        self._deadline.add_call(self.shut_down)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._generation != forks.generation:
            return  # The threads and the connections are the parent's.
        self._deadline.remove_call(self.shut_down)
        self.shut_down()
        is_refused = isinstance(error, TransferEnded) and error.details.get("refused") == "ticket"
        if is_refused and self._deadline.clock.now_s() < self._fresh_until_s:
            endpoint = self.first.endpoint
            why = f"the bulk port {endpoint.port} of {endpoint.host} leads to another daemon: it refuses a new ticket"
            self._pool.forget(endpoint, why)
        if threading.current_thread() in self._threads or self._pool.is_locked_here:
            # The garbage collector ends a load that was dropped, on one of its own threads, or on one for which these
            # wait: it cannot wait for them.
            with suppress(RuntimeError):  # No thread can be started: the connections are closed with their last users.
                threading.Thread(target=self._close, name="kvservice-bulk-end", daemon=True).start()
            return
        self._close()
        if is_refused and self._is_offered:
            raise OfferRefused("the daemon does not know the tickets of its offer any more") from error

    def _close(self) -> None:
        """Wait for all threads, and close the connections that are not kept."""
        interrupt: BaseException | None = None
        while self._threads:
            try:
                self._threads[-1].join()
                self._threads.pop()
            except BaseException as signal:  # Of a signal handler. No thread may write any more after this returns.
                interrupt = signal
        for each in self._used:
            each.close()
        if interrupt is not None:
            raise interrupt


class _Answer:
    """A class, because a suspended load keeps no generators but its own."""

    def __init__(self, transfer: BulkTransfer) -> None:
        self._transfer = transfer

    def __enter__(self) -> None:
        self._transfer._deadline.begin_answer()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transfer._deadline.end_answer()
        if isinstance(error, OSError):
            raise self._transfer._explained(error) from error


def connections_of(size_bytes: int, rtt_s: float, endpoint: Endpoint) -> int:
    """How many connections are of use for so many bytes."""
    return _connections(size_bytes, rtt_s, with_tls=endpoint.tls is not None)


def _connections(size_bytes: int, rtt_s: float, *, with_tls: bool) -> int:
    """How many fill the link."""
    if rtt_s >= _FAR_RTT_S:
        wanted = _CONNECTIONS_FAR
    else:
        helps = with_tls or size_bytes >= _LARGE_BYTES or len(os.sched_getaffinity(0)) >= _PROCESSORS_MIN
        wanted = _CONNECTIONS_NEAR if helps else 1
    return max(1, min(wanted, size_bytes // _CONNECTION_BYTES, CONNECTIONS_MAX))
