"""Loads on the bulk port that the lookup has offered: no call opens them, and no offer that ends is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from kvservice_api.errors import LeaseExpired
from kvservice_api.socket_buffers import SocketBuffers
from kvservice_client import BlockCache, BlockChain, Client, Lease
from kvservice_client.transports import bulk_caller, bulk_messages, bulk_transfer
from kvservice_client.transports.bulk_connections import BulkConnection
from tests.daemon import NEVER_S, DaemonProcess, until
from tests.integration.bulk_wire import BulkSocket, Received, read_load
from tests.integration.conversations import large_layout, layers_of, new_chain, same
from tests.integration.known_blocks import SMALL
from tests.integration.known_blocks import new_chain as new_known_chain
from tests.integration.wire import Upload, Wire

LAYOUT = large_layout()  # 12 MiB per block.


class Calls(list[str]):
    """The names of the calls that a client makes; `over_grpc` has those that do not go over the bulk port."""

    def __init__(self) -> None:
        self.over_grpc: list[str] = []


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client(transport="bulk", timeout_s=NEVER_S) as client:
        yield client


@pytest.fixture
def blocks(client: Client) -> BlockCache:
    return client.open_layout(LAYOUT)


@pytest.fixture(params=[1, 2], ids=["one connection", "two connections"])
def chain(request: pytest.FixtureRequest, blocks: BlockCache, monkeypatch: pytest.MonkeyPatch) -> BlockChain:
    """Two stored blocks. The client has connections, from the save."""
    monkeypatch.setattr(bulk_transfer, "_connections", lambda size_bytes, rtt_s, with_tls: request.param)
    chain = new_chain(LAYOUT, 2 * LAYOUT.block_tokens)
    assert blocks.save(chain, layers_of(blocks, chain)).stored == 2
    return chain


@pytest.fixture
def calls(client: Client, chain: BlockChain, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Those that the client makes from now on."""
    channel, made = client._connection.channel, Calls()

    def recorded(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(method: str, *others: Any) -> Any:
            made.append(method.rpartition("/")[2])
            made.over_grpc.append(made[-1])
            return inner(method, *others)

        return call

    def recorded_call(connection: BulkConnection, method: str, *others: Any) -> Any:
        made.append(method)
        return bulk_messages.call(connection, method, *others)

    for module in (bulk_caller, bulk_transfer):
        monkeypatch.setattr(module, "call", recorded_call)

    for name in ("call", "stream"):
        monkeypatch.setattr(channel, name, recorded(getattr(channel, name)))
    return made


def is_loaded(lease: Lease, blocks: BlockCache, chain: BlockChain, **options: Any) -> bool:
    """By the bulk port, with every byte right."""
    layers = list(lease.load(**options))
    return same([each.data for each in layers], layers_of(blocks, chain)) and {e.transport for e in layers} == {"bulk"}


def refused_tickets(lease: Lease) -> None:
    """As if the daemon took none of the offer's tickets any more."""
    assert lease._offered is not None
    lease._offered._tickets = [bytes(32) for _ in lease._offered._tickets]


def test_a_hit_is_looked_up_loaded_and_released_without_a_call_over_grpc(
    blocks: BlockCache, chain: BlockChain, calls: Calls
) -> None:
    for _ in range(3):
        with blocks.lookup(chain) as lease:
            assert is_loaded(lease, blocks, chain)
    assert calls == ["LookupPrefix", "ReleaseLease"] * 3
    assert not calls.over_grpc


def test_a_save_is_opened_without_a_call_over_grpc(blocks: BlockCache, chain: BlockChain, calls: Calls) -> None:
    another = new_chain(LAYOUT, LAYOUT.block_tokens)
    assert blocks.save(another, layers_of(blocks, another)).stored == 1
    assert calls == ["OpenTransfer"]
    assert not calls.over_grpc


def test_an_adopted_lease_is_loaded_without_a_further_call(
    daemon: DaemonProcess, blocks: BlockCache, chain: BlockChain, calls: Calls
) -> None:
    with daemon.client("exporter", transport="grpc") as exporter, exporter.open_layout(LAYOUT).lookup(chain) as lease:
        ticket = lease.export()
    with blocks.adopt(ticket) as adopted:
        assert is_loaded(adopted, blocks, chain)
    assert calls == ["AdoptLease", "ReleaseLease"]


def test_an_offer_is_for_one_load_of_all_hits(blocks: BlockCache, chain: BlockChain, calls: Calls) -> None:
    with blocks.lookup(chain) as lease:
        part = [layer.data for layer in lease.load(first_block=1)]
        assert same(part, [layer[len(layer) // 2 :] for layer in layers_of(blocks, chain)])
        assert calls == ["LookupPrefix", "OpenTransfer"]
        assert is_loaded(lease, blocks, chain)
        assert calls == ["LookupPrefix", "OpenTransfer"], "this one was offered"
        assert is_loaded(lease, blocks, chain)
        assert calls == ["LookupPrefix", "OpenTransfer", "OpenTransfer"]


def test_an_offer_whose_time_is_over_is_not_used(blocks: BlockCache, chain: BlockChain, calls: Calls) -> None:
    with blocks.lookup(chain) as lease:
        assert lease._offered is not None
        lease._offered._end_s = 0.0
        assert is_loaded(lease, blocks, chain)
    assert calls == ["LookupPrefix", "OpenTransfer", "ReleaseLease"]


def test_an_offer_that_the_daemon_refuses_is_no_error_and_the_port_stays_in_use(
    client: Client, blocks: BlockCache, chain: BlockChain, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with blocks.lookup(chain) as lease:
            refused_tickets(lease)
            assert is_loaded(lease, blocks, chain)
    assert calls == ["LookupPrefix", "OpenTransfer", "ReleaseLease"] * 2
    stats = client.stats()
    assert not stats.bulk_refused_because and not stats.transports["bulk"].fallbacks and not caplog.records


def test_the_offer_of_a_lease_that_has_ended_at_the_daemon_says_so(
    client: Client, blocks: BlockCache, chain: BlockChain
) -> None:
    lease = blocks.lookup(chain)
    lease._send_release(lease._release_request(), NEVER_S)  # The lease's object does not know.
    with pytest.raises(LeaseExpired):
        list(lease.load())


def test_a_load_that_is_closed_early_leaves_nothing_behind(
    client: Client, blocks: BlockCache, chain: BlockChain, calls: Calls
) -> None:
    with blocks.lookup(chain) as lease:
        with closing(lease.load()) as layers:
            next(layers)
        assert is_loaded(lease, blocks, chain)
    until(lambda: client.evict(chain, "dram").held == 0)


def test_bytes_that_change_on_the_way_of_an_offered_load_come_again(
    client: Client, blocks: BlockCache, chain: BlockChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    flips, summed = [1], SocketBuffers.receive

    def receive(buffers: SocketBuffers, *args: Any) -> tuple[int, int]:
        found = summed(buffers, *args)
        if buffers.is_done and len(buffers.sums) and flips:
            buffers.sums[0] ^= flips.pop()
        return found

    with blocks.lookup(chain) as lease:
        monkeypatch.setattr(SocketBuffers, "receive", receive)
        assert same([layer.data for layer in lease.load()], layers_of(blocks, chain))
    assert not flips and client.stats().transports["bulk"].mismatches == 1


def test_a_daemon_that_offers_no_load_is_asked_for_one(
    blocks: BlockCache, chain: BlockChain, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = blocks._look_up

    def older(*others: Any, **options: Any) -> Any:
        session, answer = inner(*others, **options)
        answer.ClearField("offered_load")
        return session, answer

    monkeypatch.setattr(blocks, "_look_up", older)
    with blocks.lookup(chain) as lease:
        assert is_loaded(lease, blocks, chain)
    assert calls == ["LookupPrefix", "OpenTransfer", "ReleaseLease"]


def test_small_loads_loads_in_place_and_loads_before_the_first_connection_are_not_asked_for(
    daemon: DaemonProcess, chain: BlockChain
) -> None:
    for transport, is_mapped in (("bulk", False), ("auto", True), ("grpc", False)):
        with daemon.client(transport=transport) as other:
            blocks = other.open_layout(LAYOUT)
            if is_mapped:
                blocks.ping()
            with blocks.lookup(chain) as lease:
                assert lease._offered is None, transport


def test_lookups_that_never_load_keep_no_load_out(wire: Wire) -> None:
    chain = new_known_chain(SMALL, 4)
    wire.open_layout(SMALL)
    assert wire.save(Upload.of(wire, SMALL, chain).messages()).stored == 4
    offers = [wire.lookup(SMALL, chain, offer_load=3).offered_load.tickets for _ in range(70)]
    assert all(len(tickets) == 3 for tickets in offers)
    assert not wire.lookup(SMALL, chain).HasField("offered_load")
    assert not wire.lookup(SMALL, new_known_chain(SMALL, 1), offer_load=1).HasField("offered_load")
    assert len(wire.lookup(SMALL, chain, offer_load=99).offered_load.tickets) == 16
    with BulkSocket(wire) as first, BulkSocket(wire) as second:
        for tickets in offers[:2]:
            received = Received(SMALL, chain)
            read_load(first.hello(tickets[0]), received)
            assert received.is_right()
        assert second.hello(tickets[1]).message()[0].kind.name == "END"


def test_a_daemon_without_a_bulk_port_offers_none(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(server__bulk_address="off")
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        chain = new_known_chain(SMALL, 1)
        assert wire.save(Upload.of(wire, SMALL, chain).messages()).stored == 1
        answer = wire.lookup(SMALL, chain, offer_load=1)
        assert answer.lease_id and not answer.HasField("offered_load")
