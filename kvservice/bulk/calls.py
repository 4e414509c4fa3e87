"""Calls on connections of the bulk port: the event loop reads the request and answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from kvservice.bulk.connection import BulkConnection, Steps
from kvservice.store.caller import Caller
from kvservice.store.tasks import Tasks
from kvservice_api.bulk import CALLS, MessageHeader, MessageKind, pack_header
from kvservice_api.errors import InvalidFrame
from kvservice_api.socket_buffers import SocketBuffers

# Takes the method's position in `CALLS`, its request, its caller, and the caller's certificate. Returns the kind of the
# message that answers it, and its payload.
Answer = Callable[[int, bytes, Caller, bytes], Awaitable[tuple[MessageKind, bytes]]]


class Calls:
    """Of all connections of a port. `proceed` continues a connection, on the event loop."""

    def __init__(self, answer: Answer, proceed: Callable[[BulkConnection], Any], tasks: Tasks) -> None:
        self._answer, self._proceed, self._tasks = answer, proceed, tasks
        self._loop = asyncio.get_running_loop()
        self.is_stopped = False  # Set on the event loop: no call begins any more.

    def talk(self, connection: BulkConnection, header: MessageHeader) -> Steps:
        """The rest of a CALL, and its answer. Raises InvalidFrame, and as `BulkConnection.read` and `wait`."""
        caller = connection.caller
        if caller is None or header.layer >= len(CALLS):
            raise InvalidFrame(f"a call of the method {header.layer} is not for this connection now")
        request = bytearray(header.size_bytes)
        yield from connection.read(SocketBuffers([memoryview(request)]))
        connection.is_pooled = False  # Until it is answered, it does not make room for another one.
        answers: list[bytes] = []

        async def work() -> None:
            kind, data = await self._answer(header.layer, bytes(request), caller, connection.certificate)
            answers.append(pack_header(kind, len(data)) + data)
            self._proceed(connection)

        task = None if self.is_stopped else self._tasks.start(work(), "a call on the bulk port")
        try:
            while not answers:
                yield from connection.wait()
        finally:
            if task is not None and not answers:  # The connection is closed, on any thread.
                self._loop.call_soon_threadsafe(task.cancel)
        yield from connection.write(SocketBuffers([memoryview(answers[0])]))
