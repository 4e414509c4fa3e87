"""Calls on idle connections of the bulk port, which cost less there than over gRPC: `kvservice_api.bulk.CALLS`."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import TypeVar

from google.protobuf.message import Message

from kvservice_api.bulk import MessageKind
from kvservice_api.errors import BulkUnavailable, DeadlineExceeded, InvalidFrame, KVError
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client.channel import BLOCKS
from kvservice_client.connection import Connection
from kvservice_client.retry import Deadline
from kvservice_client.transports.bulk_connections import RETRY_S, BulkConnection, BulkConnections
from kvservice_client.transports.bulk_messages import answer_of, call, carries_call, receive_header, send_hello

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

_CONNECTIONS_MAX = 4  # Are made for calls. Where more calls run at once, gRPC carries the others.


class BulkCaller:
    """Of one client. Thread-safe, and re-entrant: the garbage collector may end a lease at any place."""

    def __init__(self, connection: Connection, pool: BulkConnections) -> None:
        self._connection, self._pool = connection, pool
        self._retry_at_s = 0.0

    def call(self, method: str, request: Message, answer: type[M], deadline: Deadline) -> M | None:
        """A call of `CALLS`. None if it must be made over gRPC: no connection is idle, or it has broken, or half of the
        time has passed; then the daemon may have carried the call out. Where none is idle, one is made for later calls,
        in the background. Raises the daemon's errors.
        """
        connection = self._idle(deadline)
        if connection is None:
            return None
        allowed_s = deadline.remaining_s / 2
        if allowed_s <= 0 or not carries_call(connection, request):
            self._pool.keep(connection)
            return None
        try:
            header, data = call(connection, method, request, Deadline(allowed_s, deadline.clock))
        except (OSError, InvalidFrame):
            connection.close()
            return None
        except DeadlineExceeded:  # The path to the port may be cut off, and with it the other idle connections.
            connection.close()
            self._pool.close_idle()
            return None
        except BaseException:
            connection.close()
            raise
        self._pool.keep(connection)
        return answer_of(answer, header, data)

    def _idle(self, deadline: Deadline) -> BulkConnection | None:
        if self._pool.has_idle:
            try:
                found = self._pool.idle_one(self._pool.endpoint(self._connection.limits(deadline)))
            except BulkUnavailable:
                return None
            if found is not None:
                return found
        if self._pool.count < _CONNECTIONS_MAX and self._connection.clock.now_s() >= self._retry_at_s:
            self._connection.background.submit_once(BulkCaller, self._connect)
        return None

    def _connect(self) -> None:
        """Make one more connection, and have it join a transfer without blocks."""
        clock = self._connection.clock
        attached = self._connection.attach_stream.latest
        if attached is None:
            return
        self._retry_at_s = clock.now_s() + RETRY_S
        deadline, made = self._connection.deadline(None), None
        try:
            made = self._pool.connected(self._pool.endpoint(self._connection.limits(deadline)))
            self._join(made, attached.client_id, deadline)
        except BaseException as error:
            if made is not None:
                made.close()
            if not isinstance(error, (OSError, ValueError, KVError)):
                raise
            log.debug("gRPC carries the calls for %.0f s: %s", RETRY_S, error)
            return
        self._retry_at_s = 0.0
        self._pool.put_back(made)

    def _join(self, made: BulkConnection, client_id: bytes, deadline: Deadline) -> None:
        request = pb.OpenTransferRequest(calls=pb.CallsHeader(client_id=client_id), connections=1)
        answers = self._connection.channel.stream(BLOCKS + "OpenTransfer", request, pb.OpenTransferResponse, deadline)
        with closing(answers):
            opened = next(answers, None)
        if opened is None or not opened.tickets:
            raise InvalidFrame("the daemon opened a transfer without a ticket")
        send_hello(made, opened.tickets[0], client_id, deadline)
        if receive_header(made, deadline).kind is not MessageKind.END:
            raise InvalidFrame("a transfer without blocks does not end at once")
