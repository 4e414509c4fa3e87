"""The bulk port's connections, with the time as an argument: what closes them, and what they hold."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from kvservice.bulk.connection import BulkConnection
from kvservice.bulk.port import BulkPort
from kvservice.store.types import Span
from kvservice_api.bulk import PREFACE, pack_hello
from kvservice_api.errors import BulkUnavailable
from tests.certificates import Authority
from tests.clock import HandClock, passes
from tests.stores import CALLER, OpenStore, caller_of, some_chain, some_images, until


@pytest.fixture
async def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def port(clock: HandClock) -> AsyncIterator[BulkPort]:
    port = new_port(clock, None)  # No transfer is opened.
    yield port
    await port.close()


def new_port(clock: HandClock, store: Any, tls: ssl.SSLContext | None = None) -> BulkPort:
    port = BulkPort(store, clock, None if tls is None else lambda: tls, connections_max=3, idle_s=60.0, threads=2)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    port.listen(bound)
    port.start()
    return port


async def connected(port: BulkPort, data: bytes = b"") -> socket.socket:
    """A connection that the port has accepted."""
    before = port.accepted
    client = socket.create_connection(("127.0.0.1", port.port))
    client.setblocking(False)
    client.sendall(data)
    await until(lambda: port.accepted > before)
    return client


async def is_closed(client: socket.socket, within_s: float = 30.0) -> bool:
    async with asyncio.timeout(within_s):
        try:
            return await asyncio.get_running_loop().sock_recv(client, 1) == b""
        except ConnectionError:
            return True


@pytest.mark.parametrize("data", [b"", PREFACE[:3], PREFACE, PREFACE + bytes([1]) + bytes(10)])
async def test_a_connection_that_does_not_say_hello_in_time_is_closed(
    port: BulkPort, clock: HandClock, data: bytes
) -> None:
    with await connected(port, data) as client:
        clock.advance(seconds=9.0)
        await asyncio.sleep(0)
        assert port.connection_count == 1
        await until(lambda: passes(clock) and not port.connection_count)
        assert await is_closed(client)
        assert port.refused["timeout"] == 1


@pytest.mark.parametrize("data", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "a part of a ClientHello"])
async def test_a_handshake_that_does_not_end_in_time_is_closed(clock: HandClock, tmp_path: Path, data: bytes) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*Authority().issue().write(tmp_path))
    port = new_port(clock, None, context)
    with await connected(port, data) as client:
        clock.advance(seconds=9.0)
        await asyncio.sleep(0)
        assert port.connection_count == 1
        await until(lambda: passes(clock) and not port.connection_count)
        assert await is_closed(client)
        assert port.refused["timeout"] == 1
    await port.close()


@pytest.mark.parametrize(("rtt_s", "is_limited"), [(5e-6, True), (50e-6, False), (0.0, False)])
async def test_a_client_on_the_same_host_is_sent_half_a_mib_ahead_of_what_it_has_received(
    port: BulkPort, monkeypatch: pytest.MonkeyPatch, rtt_s: float, is_limited: bool
) -> None:
    monkeypatch.setattr("kvservice.bulk.connection.shortest_rtt_s", lambda connected: rtt_s)
    with await connected(port, PREFACE) as client:
        (connection,) = port._connections.values()
        with socket.socket(fileno=os.dup(connection.fd)) as of_daemon:
            client.sendall(pack_hello(bytes(32), bytes(16)))  # No such ticket: the daemon closes the connection.
            await until(lambda: not port.connection_count or port.refused["unknown"] > 0)
            assert (of_daemon.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 512 << 10) == is_limited


async def test_a_full_port_refuses_while_the_others_are_new(port: BulkPort) -> None:
    opened = [await connected(port) for _ in range(3)]
    with await connected(port) as late:
        assert await is_closed(late)
    assert port.refused["full"] == 1 and port.connection_count == 3
    for each in opened:
        each.close()


async def test_an_old_connection_without_hello_makes_room(port: BulkPort, clock: HandClock) -> None:
    opened = [await connected(port) for _ in range(3)]
    clock.advance(seconds=1.0)
    with await connected(port) as late:
        assert await is_closed(opened[0])
        assert port.connection_count == 3
        late.close()
    for each in opened:
        each.close()


async def test_no_connection_that_has_carried_a_transfer_makes_room_while_others_have_said_nothing(
    port: BulkPort, clock: HandClock
) -> None:
    opened = [await connected(port) for _ in range(3)]
    pooled = next(iter(port._connections.values()))
    pooled.has_joined = pooled.is_pooled = True
    clock.advance(seconds=0.5)
    with await connected(port) as late:
        assert await is_closed(late)
    clock.advance(seconds=0.5)
    opened += [await connected(port) for _ in range(2)]
    assert await is_closed(opened[1]) and await is_closed(opened[2])
    assert pooled in port._connections.values()
    for each in opened:
        each.close()


async def test_several_may_connect_at_a_time_to_a_port_that_is_full_of_idle_connections(
    port: BulkPort, clock: HandClock
) -> None:
    port.connections_max = 8
    opened = [await connected(port) for _ in range(8)]
    for each in port._connections.values():
        each.has_joined = each.is_pooled = True
    late = [await connected(port) for _ in range(2)]
    with await connected(port) as third:
        assert await is_closed(third), "those that say nothing take no more than a quarter"
    assert [each.is_pooled for each in port._connections.values()] == [True] * 6 + [False] * 2
    for each_client in (*opened, *late):
        each_client.close()


async def test_the_longest_idle_connection_makes_room_but_none_that_gets_its_end(port: BulkPort) -> None:
    opened = [await connected(port) for _ in range(3)]
    ending, newer, older = port._connections.values()
    for number, each in enumerate((ending, older, newer)):
        each.has_joined, each.deadline_s = True, each.deadline_s + number
    newer.is_pooled = older.is_pooled = True
    with await connected(port) as late:
        assert await is_closed(opened[2])
        assert list(port._connections.values())[:2] == [ending, newer]
        late.close()
    for each_client in opened:
        each_client.close()


@pytest.mark.parametrize("data", [PREFACE[:3], PREFACE + bytes(10)])
async def test_a_client_that_goes_in_its_first_message_is_counted(port: BulkPort, data: bytes) -> None:
    (await connected(port, data)).close()
    await until(lambda: not port.connection_count)
    assert port.refused["lost"] == 1


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_refused_ticket_is_counted_once_however_its_connection_ends(
    port: BulkPort, clock: HandClock, leaves: bool
) -> None:
    with await connected(port, PREFACE + pack_hello(bytes(32), bytes(16))) as client:
        await until(lambda: port.refused["unknown"] == 1)
        if leaves:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # Reset, as it is closed.
            client.close()
        await until(lambda: (leaves or passes(clock)) and not port.connection_count)
    assert +port.refused == {"unknown": 1}


async def test_an_unexpected_error_ends_no_thread(clock: HandClock, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = None
    port = BulkPort(store, clock, None, connections_max=3, idle_s=60.0, threads=1)
    port.listen(bound := socket.socket())
    port.start()
    errors = [ValueError("of a test")]

    def add(accepted: socket.socket) -> None:
        accepted.close()
        if errors:
            raise errors.pop()
        port.accepted += 1

    monkeypatch.setattr(port, "_add", add)
    clients = [socket.create_connection(("127.0.0.1", port.port)) for _ in range(2)]
    await until(lambda: passes(clock) and port.accepted == 1)
    for client in clients:
        client.close()
    await port.close()
    bound.close()


async def test_a_client_that_goes_leaves_no_connection(port: BulkPort) -> None:
    (await connected(port, PREFACE)).close()
    await until(lambda: not port.connection_count)
    assert not any(port.refused.values())


async def test_closing_the_port_closes_its_connections(port: BulkPort) -> None:
    with await connected(port) as client:
        await port.close()
        assert await is_closed(client)


class LockWithAHeldTurn:
    """The thread that waits for the lock holds it until a thread has not got it, which `meanwhile` causes."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile
        self._lock, self._has_refused = threading.Lock(), threading.Event()

    def acquire(self, blocking: bool = True) -> bool:
        is_taken = self._lock.acquire(blocking)
        if not is_taken:
            self._has_refused.set()
        return is_taken

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._meanwhile()
        assert self._has_refused.wait(30.0)

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


async def test_a_connection_that_can_move_while_turns_are_awaited_has_its_turn_afterwards(port: BulkPort) -> None:
    with await connected(port) as client:
        (connection,) = port._connections.values()
        lock: Any = LockWithAHeldTurn(lambda: client.sendall(b"GET / HTTP/1.1"))
        connection.lock = lock
        await port.pass_turns([connection])
        await until(lambda: port.refused["garbage"] == 1)


async def test_a_connection_that_can_move_while_it_is_looked_at_has_its_turn_afterwards(port: BulkPort) -> None:
    with await connected(port) as client:
        (connection,) = port._connections.values()

        def keep_it(connection: BulkConnection) -> None:
            client.sendall(b"GET / HTTP/1.1")
            end_s = time.monotonic() + 30.0
            while not connection.is_woken:  # A worker finds that it can move, and that another thread has it.
                assert time.monotonic() < end_s

        assert not port._close_if(connection, keep_it)
        await until(lambda: port.refused["garbage"] == 1)


class LockTakenLate:
    """Before the thread that does not wait for the lock gets it, another thread continues the connection: `turn`."""

    def __init__(self, turn: Callable[[], None]) -> None:
        self._turn = turn

    def acquire(self, blocking: bool = True) -> bool:
        self._turn()
        return True

    def release(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


async def test_a_connection_that_joins_a_transfer_when_its_time_is_over_stays(port: BulkPort, clock: HandClock) -> None:
    with await connected(port) as client:
        (connection,) = port._connections.values()
        joins = asyncio.Event()

        def join() -> None:
            connection.has_joined, connection.deadline_s = True, math.inf
            joins.set()

        lock: Any = LockTakenLate(join)
        connection.lock, connection.deadline_s = lock, clock.monotonic_s()
        await until(lambda: passes(clock) and joins.is_set())
        assert list(port._connections.values()) == [connection] and not connection.is_closed
        client.close()
        await until(lambda: not port.connection_count)


async def test_a_connection_that_joins_a_transfer_while_the_port_is_full_makes_no_room(
    port: BulkPort, clock: HandClock
) -> None:
    opened = [await connected(port) for _ in range(3)]
    joining, *others = port._connections.values()
    for each in others:
        each.since_s += 1.0  # Only the first is old enough.
    clock.advance(seconds=1.0)
    lock: Any = LockTakenLate(lambda: setattr(joining, "has_joined", True))
    joining.lock = lock
    with await connected(port) as late:
        assert await is_closed(late)
    assert joining in port._connections.values()
    for each_client in opened:
        each_client.close()


async def test_without_a_listener_transfers_are_refused(clock: HandClock) -> None:
    store: Any = None
    port = BulkPort(store, clock, None, connections_max=3, idle_s=60.0, threads=1)
    with pytest.raises(BulkUnavailable):
        await port.open_load(CALLER, b"", 1, None, Span(), Span(), 1)
    await port.close()


async def test_an_offered_load_that_cannot_begin_is_counted_with_its_error(
    open_store: Callable[..., Any], clock: HandClock
) -> None:
    """As one that was opened is: no call fails, so that only this count says why loads fail."""
    opened: OpenStore = await open_store()
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(1)
    await opened.save(client, chain, some_images(chain))
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    port = new_port(clock, opened.store)
    offered = port.offer_load(caller_of(client), b"", lease.lease_id, 1)
    assert offered is not None
    opened.leases.end(lease)
    with await connected(port, PREFACE + pack_hello(offered.tickets[0], client.client_id)):
        await until(lambda: bool(port.ended["load", "LEASE_EXPIRED"]))
    assert +port.ended == {("load", "LEASE_EXPIRED"): 1}
    await port.close()
