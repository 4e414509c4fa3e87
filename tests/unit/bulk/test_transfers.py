"""Loads and saves of the bulk port with a store: what they hold, and how they end. The port's time stands still."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from google.rpc import status_pb2

from kvservice.bulk.connection import BulkConnection
from kvservice.bulk.port import TICKET_TTL_S, BulkPort, Opened
from kvservice.bulk.transfers import OutgoingLoad, Transfer
from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.types import Part, SaveOutcome, Span
from kvservice_api.bulk import (
    CALLS,
    HEADER_BYTES,
    HELLO_BYTES,
    PREFACE,
    MessageKind,
    pack_header,
    pack_hello,
    unpack_header,
)
from kvservice_api.errors import KVError, LeaseExpired, TransferEnded
from kvservice_api.layout import Layout, Shard
from kvservice_api.socket_buffers import SocketBuffers
from kvservice_api.status import from_status
from tests.clock import HandClock, passes
from tests.stores import CALLER, MIB, OpenStore, caller_of, header_of, some_chain, some_images, until

BIG = Layout(model_id="big", dtype="float32", layers=2, kv_heads=4, k_head_dim=64, v_head_dim=64, block_tokens=64)
WHOLE = Shard.whole(BIG)
BLOCKS = 40  # 10 MiB: more than the kernel keeps for a client that does not read.
IDLE_S = 60.0


@pytest.fixture
async def opened(open_store: Callable[..., Any]) -> OpenStore:
    store: OpenStore = await open_store(dram_bytes=32 * MIB)
    await store.store.layouts.open(CALLER, BIG)
    return store


@pytest.fixture
async def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def port(opened: OpenStore, clock: HandClock) -> AsyncIterator[BulkPort]:
    port = BulkPort(opened.store, clock, None, connections_max=8, idle_s=IDLE_S, threads=2)
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)  # Accepted sockets have the same.
    bound.bind(("127.0.0.1", 0))
    port.listen(bound)
    port.start()
    yield port
    await port.close()


@pytest.fixture
async def leased(opened: OpenStore, client: Client) -> int:
    """A lease of stored blocks."""
    chain = some_chain(BLOCKS, layout=BIG)
    images = some_images(chain, shard=WHOLE, layout=BIG)
    await opened.save(client, chain, images, shard=WHOLE, layout=BIG)
    lease = opened.lookup(client, chain.keys, shard=WHOLE, layout=BIG)
    assert lease is not None and len(lease.rows) == BLOCKS
    return lease.lease_id


async def open_load(port: BulkPort, client: Client, lease_id: int) -> Opened:
    return await port.open_load(caller_of(client), b"", lease_id, None, Span(), Span(), 1)


def offer_load(port: BulkPort, client: Client, lease_id: int) -> Opened:
    offer = port.offer_load(caller_of(client), b"", lease_id, 1)
    assert offer is not None
    return offer


def joined(port: BulkPort, client: Client, opened: Opened) -> socket.socket:
    """A connection that takes little before it is read from."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port.port))
    connection.setblocking(False)
    connection.send(PREFACE + pack_hello(opened.tickets[0], client.client_id))
    return connection


async def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await asyncio.get_running_loop().sock_recv(connection, size - len(data))
        assert more, "closed"
        data += more
    return data


async def error_on(connection: socket.socket) -> KVError:
    """Of the next message."""
    header = unpack_header(await receive(connection, HEADER_BYTES))
    assert header.kind is MessageKind.ERROR
    return from_status(status_pb2.Status.FromString(await receive(connection, header.size_bytes)))


async def test_blocks_of_a_load_that_ends_late_are_free_when_its_client_leaves(
    opened: OpenStore, port: BulkPort, clock: HandClock, client: Client, leased: int
) -> None:
    with joined(port, client, await open_load(port, client, leased)):
        await until(lambda: passes(clock) and bool(opened.counters.loads_failed))  # It waits for what has begun.
        assert opened.blocks.holds.any()
        opened.leases.detach(caller_of(client), client)
        await until(lambda: not opened.blocks.holds.any())
        await until(lambda: not port.connection_count)


async def test_a_load_whose_client_leaves_before_its_first_step_ends(
    opened: OpenStore, port: BulkPort, client: Client, leased: int
) -> None:
    opening = asyncio.ensure_future(open_load(port, client, leased))
    asyncio.get_running_loop().call_soon(lambda: opened.leases.detach(caller_of(client), client))
    with joined(port, client, await opening) as connection:
        assert isinstance(await error_on(connection), TransferEnded)
    assert port.ended["load", "TRANSFER_ENDED"] == 1


async def test_a_load_that_ends_by_a_fault_of_the_daemon_is_counted_as_that(
    opened: OpenStore, port: BulkPort, client: Client, leased: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send(sender: OutgoingLoad) -> None:
        raise ValueError("of a test")

    async def to_send(*_: object) -> Callable[[OutgoingLoad], Any]:
        return send

    monkeypatch.setattr(opened.store.loads, "to_send", to_send)
    with joined(port, client, await open_load(port, client, leased)) as connection:
        assert isinstance(await error_on(connection), TransferEnded)
    assert +port.ended == {("load", "INTERNAL"): 1}


async def test_an_offered_load_is_nothing_until_a_connection_brings_its_ticket(
    opened: OpenStore, port: BulkPort, clock: HandClock, client: Client, leased: int
) -> None:
    offers = [offer_load(port, client, leased) for _ in range(200)]
    opened_too = await open_load(port, client, leased)  # The limit of transfers without a connection is not reached.
    await until(lambda: opened.blocks.holds.sum() == BLOCKS)  # Those of that load.
    clock.advance(seconds=TICKET_TTL_S)
    await until(lambda: passes(clock) and bool(sum(port.ended.values())))
    assert port.ended["load", "TRANSFER_ENDED"] == 1, "only that load has ended"
    for late in offers[0], opened_too:
        with joined(port, client, late) as connection:
            assert isinstance(await error_on(connection), TransferEnded)
    with joined(port, client, offer_load(port, client, leased)):
        await until(lambda: opened.blocks.holds.sum() == BLOCKS)


async def test_an_offered_load_whose_lease_has_ended_says_so_and_its_connection_stays_of_use(
    opened: OpenStore, port: BulkPort, client: Client, leased: int
) -> None:
    offer, another = (offer_load(port, client, leased) for _ in range(2))
    await opened.leases.release(caller_of(client), leased)
    with joined(port, client, offer) as connection:
        assert isinstance(await error_on(connection), LeaseExpired)
        connection.send(pack_hello(another.tickets[0], client.client_id))
        assert isinstance(await error_on(connection), LeaseExpired)


async def test_a_save_whose_client_leaves_before_its_first_step_ends(
    opened: OpenStore, port: BulkPort, client: Client
) -> None:
    header = header_of(some_chain(2, layout=BIG), shard=WHOLE, layout=BIG)
    opening = asyncio.ensure_future(port.open_save(caller_of(client), b"", header, 1, no_answer, on_ssd=False))
    asyncio.get_running_loop().call_soon(lambda: opened.leases.detach(caller_of(client), client))
    with pytest.raises(TransferEnded):
        await opening
    assert port.ended["save", "TRANSFER_ENDED"] == 1


def no_answer(_: SaveOutcome) -> bytes:
    return b""


class Interrupted:
    """A connection whose thread looks for the final message as soon as it is interrupted."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self.deadline_s, self.written, self.is_on_loop = 0.0, b"", False
        self.reader = threading.Thread(target=self._finish)

    @property
    def is_interrupted(self) -> bool:
        return self.reader.ident is not None

    @is_interrupted.setter
    def is_interrupted(self, value: bool) -> None:
        if value:
            self.reader.start()
            self.reader.join(0.1)  # It finds no message until the transfer is ended.

    def _finish(self) -> None:
        connection: Any = self
        list(self._transfer.finish(connection))

    def write(self, buffers: SocketBuffers) -> Iterator[int]:
        near, far = socket.socketpair()
        with near, far:
            buffers.send(near, 0, 1.0)
            self.written = far.recv(100)
        yield 0


async def test_a_connection_that_is_interrupted_first_waits_for_the_final_message(
    port: BulkPort, clock: HandClock
) -> None:
    load = OutgoingLoad(port, clock, CALLER, b"", IDLE_S)
    connection: Any = Interrupted(load)
    load.join(connection, 0)
    connection.fd = 1 << 20  # Never open.
    load.end(b"the end")
    connection.reader.join()
    assert connection.written == b"the end"


class InAMessage:
    """A connection that takes a turn for each message, and another one to wait."""

    def write(self, buffers: SocketBuffers) -> Iterator[str]:
        yield "writes"

    def wait(self) -> Iterator[str]:
        yield "waits"


async def test_the_last_message_of_a_load_that_was_stopped_is_not_its_end(port: BulkPort, clock: HandClock) -> None:
    load = OutgoingLoad(port, clock, CALLER, b"", IDLE_S)
    connection: Any = InAMessage()
    load.join(connection, 0)
    load.put([Part(0, block, 0, [memoryview(b"some")], []) for block in range(2)], is_last=True)
    steps: Any = load.talk(connection)
    assert next(steps) == "writes"
    stopping = asyncio.ensure_future(load.stop())
    await asyncio.sleep(0)
    assert next(steps) == "waits"
    stopping.cancel()
    with suppress(asyncio.CancelledError):
        await stopping


async def test_a_load_counts_as_open_until_its_client_has_taken_the_end(port: BulkPort, clock: HandClock) -> None:
    load = OutgoingLoad(port, clock, CALLER, b"", IDLE_S)
    connection: Any = Interrupted(load)
    connection.fd = 1 << 20
    load.join(connection, 0)
    waiting = asyncio.ensure_future(load.until_taken())
    await asyncio.sleep(0)
    connection.reader.join()
    assert connection.deadline_s == clock.monotonic_s() + IDLE_S
    done, _ = await asyncio.wait({waiting}, timeout=0.02)
    assert not done
    load.left(connection)
    await waiting


async def test_a_client_that_reads_little_by_little_is_ended_in_time(
    opened: OpenStore, port: BulkPort, clock: HandClock, client: Client, leased: int
) -> None:
    with joined(port, client, await open_load(port, client, leased)) as connection:
        for _ in range(200):
            with suppress(BlockingIOError):
                connection.recv(4096)
            await asyncio.sleep(0.002)
            clock.advance(seconds=1)
            if opened.counters.loads_failed:
                break
        assert opened.counters.loads_failed
        await until(lambda: passes(clock) and not opened.blocks.holds.any())


async def test_a_client_that_waited_for_the_daemon_has_its_whole_time_from_then_on(
    port: BulkPort, clock: HandClock
) -> None:
    load = OutgoingLoad(port, clock, CALLER, b"", IDLE_S)
    clock.advance(seconds=IDLE_S + 1)  # For a read from SSD.
    load.put([Part(0, 0, 0, [memoryview(bytes(10))], [])], is_last=True)
    waiting = asyncio.ensure_future(load.until_sent(10))
    await asyncio.sleep(0)
    clock.advance(seconds=IDLE_S - 1)
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    assert not done
    clock.advance(seconds=1)
    with pytest.raises(KVError, match="read nothing"):
        await waiting


async def test_a_call_is_answered_for_the_caller_that_has_opened_the_last_transfer(
    port: BulkPort, client: Client, leased: int
) -> None:
    async def answer(number: int, request: bytes, caller: Caller, certificate: bytes) -> tuple[MessageKind, bytes]:
        assert (number, caller, certificate) == (CALLS.index("ReleaseLease"), caller_of(client), b"")
        return MessageKind.ANSWER, request[::-1]

    port.answer_calls(answer)
    with await loaded(port, client, leased) as connection:
        for _ in range(3):
            send_call(connection, "ReleaseLease", b"abc")
            header = unpack_header(await receive(connection, HEADER_BYTES))
            assert header.kind is MessageKind.ANSWER
            assert await receive(connection, header.size_bytes) == b"cba"


async def test_between_two_transfers_the_event_loop_continues_a_connection(
    port: BulkPort, client: Client, leased: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that passes a worker takes a third longer. The bytes of a transfer are left to the workers."""
    threads: dict[str, list[threading.Thread]] = {"read_header": [], "talk": []}

    def record(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def recorded(*arguments: Any) -> Any:
            if name == "talk":  # Before its first step: the others may wait on another thread.
                threads[name].append(threading.current_thread())
            result = yield from original(*arguments)
            if name == "read_header":
                threads[name].append(threading.current_thread())
            return result

        monkeypatch.setattr(kind, name, recorded)

    async def answer(number: int, request: bytes, *_: object) -> tuple[MessageKind, bytes]:
        return MessageKind.ANSWER, request

    record(BulkConnection, "read_header")
    record(OutgoingLoad, "talk")
    port.answer_calls(answer)
    with await loaded(port, client, leased) as connection:
        for _ in range(3):
            send_call(connection, "ReleaseLease", b"abc")
            await receive(connection, HEADER_BYTES + 3)
        connection.send(pack_hello((await open_load(port, client, leased)).tickets[0], client.client_id))
        await received_end(connection)
    first, *later = [thread is threading.main_thread() for thread in threads["read_header"]]
    assert not first and later == [True] * 4
    assert len(threads["talk"]) == 2 and threading.main_thread() not in threads["talk"]


async def test_a_client_that_leaves_answers_unread_and_opens_a_transfer_is_closed(
    port: BulkPort, client: Client, leased: int, clock: HandClock
) -> None:
    """Its socket is full, so no worker continues the connection."""

    async def answer(*_: object) -> tuple[MessageKind, bytes]:
        return MessageKind.ANSWER, bytes(2048)

    port.answer_calls(answer)
    with await loaded(port, client, leased) as connection:
        (of_daemon,) = port._connections.values()
        poll = select.poll()
        poll.register(of_daemon.fd, select.POLLOUT)
        await until(lambda: of_daemon.is_pooled)
        while of_daemon.is_pooled:  # The kernel may still make room after it had none: then a worker ends the transfer.
            while poll.poll(0):
                sent = of_daemon.sent_bytes
                send_call(connection, "ReleaseLease", b"abc")
                await until(lambda sent=sent: of_daemon.sent_bytes > sent)  # type: ignore[misc]
            received = of_daemon.received_bytes
            opened = port.open_calls(caller_of(client), b"", 1)
            connection.send(pack_hello(opened.tickets[0], client.client_id))
            await until(lambda before=received: of_daemon.received_bytes == before + HEADER_BYTES + HELLO_BYTES)  # type: ignore[misc]
            await asyncio.sleep(0.05)
        await until(lambda: passes(clock) and not port.connection_count)


async def test_a_call_whose_client_leaves_is_cancelled(port: BulkPort, client: Client, leased: int) -> None:
    seen = []

    async def answer(*_: object) -> tuple[MessageKind, bytes]:
        seen.append("begun")
        try:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    port.answer_calls(answer)
    with await loaded(port, client, leased) as connection:
        send_call(connection, "OpenTransfer", b"")
        await until(lambda: seen == ["begun"])
        (of_daemon,) = port._connections.values()
        assert not of_daemon.is_pooled, "it does not make room for others meanwhile"
    await until(lambda: seen == ["begun", "cancelled"])
    await until(lambda: not port.connection_count)


async def loaded(port: BulkPort, client: Client, lease_id: int) -> socket.socket:
    """A connection that has carried a load."""
    connection = joined(port, client, await open_load(port, client, lease_id))
    await received_end(connection)
    return connection


async def received_end(connection: socket.socket) -> None:
    while (header := unpack_header(await receive(connection, HEADER_BYTES))).kind is not MessageKind.END:
        await receive(connection, header.size_bytes)


def send_call(connection: socket.socket, method: str, request: bytes) -> None:
    connection.send(pack_header(MessageKind.CALL, len(request), layer=CALLS.index(method)) + request)
