"""The daemon's bulk port, by hand: loads, saves, and how they end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
from google.rpc import status_pb2
from numpy.typing import NDArray

from kvservice_api.bulk import MessageKind
from kvservice_api.errors import BulkUnavailable, ChecksumMismatch, InvalidRequest, TransferEnded
from kvservice_api.image import checksum
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_api.status import from_status
from kvservice_api.v1 import blocks_pb2, types_pb2
from kvservice_client import Client, Durability, Tier
from tests.daemon import DaemonProcess, until
from tests.integration.bulk_wire import (
    BulkSocket,
    Received,
    checksums_of,
    open_load,
    open_save,
    read_load,
)
from tests.integration.known_blocks import LARGE, SMALL, layers_of, new_chain, slice_bytes
from tests.integration.media import arena
from tests.integration.wire import Upload, Wire, refused


def stored(wire: Wire, layout: Layout, blocks: int) -> BlockChain:
    chain = new_chain(layout, blocks)
    wire.open_layout(layout)
    assert wire.save(Upload.of(wire, layout, chain).messages()).stored == blocks
    return chain


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small slices", "large slices"])
def test_a_load_sends_every_byte_and_then_the_end(wire: Wire, layout: Layout) -> None:
    chain = stored(wire, layout, 24)
    received = Received(layout, chain)
    (ticket,) = open_load(wire, layout, chain)
    with BulkSocket(wire) as connection:
        read_load(connection.hello(ticket), received)
    assert received.is_right()


def test_several_connections_share_a_load(wire: Wire) -> None:
    chain = stored(wire, LARGE, 40)
    received = Received(LARGE, chain)
    tickets = open_load(wire, LARGE, chain, connections=3)
    with ExitStack() as open_until_here:
        connections = [open_until_here.enter_context(BulkSocket(wire)) for _ in tickets]
        for connection, ticket in zip(connections, tickets, strict=True):
            connection.hello(ticket)
        readers = [threading.Thread(target=read_load, args=(each, received)) for each in connections]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert received.is_right()


@pytest.mark.parametrize(("connections", "slices"), [(1, [100, 100, 100]), (3, [64, 36, 64, 36, 64, 36])])
def test_messages_are_smaller_where_many_connections_share_them(
    wire: Wire, connections: int, slices: list[int]
) -> None:
    chain = stored(wire, LARGE, 100)
    ticket, *_ = open_load(wire, LARGE, chain, connections)
    sizes: list[int] = []
    with BulkSocket(wire) as connection:
        connection.hello(ticket)
        while (message := connection.message()[0]).kind is MessageKind.DATA:
            sizes.append(message.size_bytes)
    assert sizes == [count * slice_bytes(LARGE) for count in slices]


def test_a_connection_carries_one_transfer_after_another(wire: Wire) -> None:
    chain = stored(wire, SMALL, 4)
    with BulkSocket(wire) as connection:
        for _ in range(3):
            received = Received(SMALL, chain)
            read_load(connection.hello(*open_load(wire, SMALL, chain)), received)
            assert received.is_right()


def test_a_save_stores_what_it_sends_on_several_connections(wire: Wire) -> None:
    chain = new_chain(LARGE, 8)
    wire.open_layout(LARGE)
    opened = open_save(wire, LARGE, chain, connections=2)
    assert list(opened.blocks) == list(range(8))
    slices = layers_of(LARGE, chain)
    with BulkSocket(wire) as first, BulkSocket(wire) as second:
        first.hello(opened.tickets[0])
        second.hello(opened.tickets[1])
        for layer, blocks in enumerate(slices):
            first.put(layer, 0, b"".join(each.tobytes() for each in blocks[:5]))
            second.put(layer, 5, b"".join(each.tobytes() for each in blocks[5:]))
        first.commit(checksums_of(LARGE, chain, opened.blocks))
        assert list(first.result().stored_blocks) == list(range(8))
        assert second.message()[0].kind.name == "END"
    assert wire.has(LARGE, chain)


def test_a_save_asks_only_for_blocks_that_are_missing(wire: Wire) -> None:
    chain = stored(wire, SMALL, 6)
    longer = new_chain(SMALL, 6)
    assert not open_save(wire, SMALL, chain).blocks
    assert list(open_save(wire, SMALL, longer).blocks) == list(range(6))


def test_a_save_that_no_connection_has_joined_makes_room_for_its_clients_save_by_grpc(wire: Wire) -> None:
    chain, joined = new_chain(SMALL, 3), new_chain(SMALL, 3)
    wire.open_layout(SMALL)
    opened, kept = open_save(wire, SMALL, chain), open_save(wire, SMALL, joined)
    with BulkSocket(wire) as connection, BulkSocket(wire) as late:
        assert wire.save(Upload.of(wire, SMALL, chain).messages()).stored == 3
        assert isinstance(late.hello(*opened.tickets).error(), TransferEnded)
        connection.hello(*kept.tickets)  # Of other blocks: it was not ended.
        for layer, blocks in enumerate(layers_of(SMALL, joined)):
            connection.put(layer, 0, b"".join(each.tobytes() for each in blocks))
        connection.commit(checksums_of(SMALL, joined, kept.blocks))
        assert connection.result().stored == 3


def test_loads_that_no_connection_has_joined_are_few_and_keep_no_other_load_out(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(server__loads_max=2)
    with Wire(daemon.address) as wire:
        wire.attach()
        chain = stored(wire, SMALL, 1)
        tickets = [open_load(wire, SMALL, chain)[0] for _ in range(64)]
        with refused(BulkUnavailable, "wait for their connections"):
            open_load(wire, SMALL, chain)
        for ticket in tickets[:4]:
            received = Received(SMALL, chain)
            with BulkSocket(wire) as connection:
                read_load(connection.hello(ticket), received)
            assert received.is_right()


def test_a_damaged_block_of_a_save_is_refused_and_the_others_are_stored(wire: Wire) -> None:
    chain = new_chain(SMALL, 3)
    opened = open_save(wire, SMALL, chain)
    with BulkSocket(wire) as connection:
        connection.hello(*opened.tickets)
        for layer, blocks in enumerate(layers_of(SMALL, chain)):
            data = bytearray(b"".join(each.tobytes() for each in blocks))
            if layer == 2:
                data[len(blocks[0]) * 2] ^= 1  # In the last block.
            connection.put(layer, 0, bytes(data))
        connection.commit(checksums_of(SMALL, chain, opened.blocks))
        result = connection.result()
    assert list(result.stored_blocks) == [0, 1]
    assert [each.block for each in result.refused] == [2]
    assert "UPLOAD_CORRUPTED" in str(result.refused[0].status.details)


def test_a_daemon_without_a_bulk_port_refuses_transfers(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(server__bulk_address="off")
    with Wire(daemon.address) as wire:
        wire.attach()
        answer = wire.capabilities()
        assert not answer.bulk_port and "bulk" not in answer.transports
        load = blocks_pb2.LoadBlocksRequest(client_id=wire.client_id, lease_id=1)
        with refused(BulkUnavailable, "no bulk port"):
            wire.blocks.OpenTransfer(blocks_pb2.OpenTransferRequest(load=load, connections=1))


@pytest.mark.parametrize("connections", [0, 17])
def test_a_number_of_connections_out_of_range_is_refused(wire: Wire, connections: int) -> None:
    load = blocks_pb2.LoadBlocksRequest(client_id=wire.client_id, lease_id=1)
    with refused(InvalidRequest, "are not 1..16"):
        wire.blocks.OpenTransfer(blocks_pb2.OpenTransferRequest(load=load, connections=connections))


def test_readers_that_stop_occupy_no_worker_and_hold_up_no_other(wire: Wire) -> None:
    chain = stored(wire, LARGE, 200)  # 38 MiB: more than the kernel keeps for a client that does not read.
    small = stored(wire, SMALL, 4)
    with ExitStack() as stalled:
        for _ in range(6):  # More than there are threads.
            stalled.enter_context(BulkSocket(wire)).hello(*open_load(wire, LARGE, chain))
        for _ in range(20):
            received = Received(SMALL, small)
            with BulkSocket(wire) as connection:
                read_load(connection.hello(*open_load(wire, SMALL, small)), received)
            assert received.is_right()


def test_a_reader_that_stops_is_ended_in_time_and_its_blocks_can_be_evicted(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(server__transfer_idle_s=1, ssd__capacity_bytes=0)
    with Wire(daemon.address) as wire, Client(daemon.address) as client:
        wire.attach()
        chain = stored(wire, LARGE, 200)
        (ticket,) = open_load(wire, LARGE, chain)
        with BulkSocket(wire) as connection:
            connection.hello(ticket)
            for lease_id in wire.leases:
                wire.release(lease_id)
            # Eviction works in parts: the load may end between two of them.
            until(lambda: client.evict(chain.keys, Tier.DRAM).missing == len(chain))
            assert connection.is_closed()


def test_a_load_ends_with_the_attachment_of_its_client(daemon: DaemonProcess, wire: Wire) -> None:
    chain = stored(wire, LARGE, 200)
    with Wire(daemon.address) as leaving:
        leaving.attach()
        (ticket,) = open_load(leaving, LARGE, chain)
        connection = BulkSocket(wire)
        connection.hello(ticket, leaving.client_id).message()
        attached = wire.status().clients
    until(lambda: wire.status().clients < attached)
    with connection, pytest.raises(ConnectionError):
        connection.error()  # A message had begun, so that no other may follow.


def test_a_connection_that_breaks_ends_its_transfer_on_the_others(wire: Wire) -> None:
    chain = stored(wire, LARGE, 200)
    tickets = open_load(wire, LARGE, chain, connections=2)
    with BulkSocket(wire) as first, BulkSocket(wire) as second:
        first.hello(tickets[0])
        second.hello(tickets[1])
        first.message()
        first.socket.close()
        assert isinstance(second.error(), TransferEnded)


def damage(daemon: DaemonProcess, data: bytes) -> None:
    """One bit of these bytes, where they are in its arena."""
    medium = arena(daemon)
    medium.flip(medium.find(data) + 5, 0)


def test_a_load_says_what_its_slices_were_when_they_were_stored(wire: Wire, daemon: DaemonProcess) -> None:
    chain, size = stored(wire, LARGE, 30), slice_bytes(LARGE)
    (ticket,) = open_load(wire, LARGE, chain)
    layers = layers_of(LARGE, chain)
    damage(daemon, layers[-1][17].tobytes())
    found = set()
    with BulkSocket(wire) as connection:
        connection.hello(ticket)
        while (message := connection.message())[0].kind is MessageKind.DATA:
            header, data = message
            assert len(connection.checksums) * size == len(data)
            first_slice = header.layer * len(chain) + header.first_block
            for number, expected in enumerate(connection.checksums):
                layer, block = divmod(first_slice + number, len(chain))
                assert expected == checksum(layers[layer][block].data)
                if checksum(data[number * size : (number + 1) * size]) != expected:
                    found.add((layer, block))
    assert found == {(len(layers) - 1, 17)}


def test_a_damaged_part_of_a_slice_ends_a_load_between_two_messages_and_is_dropped(
    wire: Wire, daemon: DaemonProcess
) -> None:
    chain = new_chain(LARGE, 20)
    save_by_ranks(daemon, chain)
    damage(daemon, heads_of(layers_of(LARGE, chain)[-1][17], 2, 4).tobytes())
    right = Received(LARGE, chain)
    with BulkSocket(wire) as connection:
        connection.hello(*open_load(wire, LARGE, chain))
        while (message := connection.message())[0].kind is MessageKind.DATA:
            assert not connection.checksums, "the daemon has verified it"
            right.add(*message)
        assert message[0].kind is MessageKind.ERROR
        error = from_status(status_pb2.Status.FromString(message[1]))
        assert isinstance(error, ChecksumMismatch) and error.details["block"] == "17"
        assert right.is_right_so_far
        assert wire.lookup(LARGE, chain).hit_blocks == 17, "the damaged block is dropped"
        whole = chain[:17]
        received = Received(LARGE, whole)
        read_load(connection.hello(*open_load(wire, LARGE, whole)), received)  # The connection is still of use.
        assert received.is_right()


def test_blocks_come_from_ssd_and_the_first_layer_first(wire: Wire, daemon: DaemonProcess) -> None:
    chain = new_chain(LARGE, 20)
    wire.open_layout(LARGE)
    wire.save(Upload.of(wire, LARGE, chain, types_pb2.DURABILITY_SSD).messages())
    with Client(daemon.address) as client:
        assert client.evict(chain.keys, Tier.DRAM).evicted == 20
    received = Received(LARGE, chain)
    with BulkSocket(wire) as connection:
        read_load(connection.hello(*open_load(wire, LARGE, chain)), received)
    assert received.is_right()


def test_blocks_of_several_shards_come_as_one(daemon: DaemonProcess, wire: Wire) -> None:
    chain = new_chain(LARGE, 5)
    save_by_ranks(daemon, chain)
    received = Received(LARGE, chain)
    with BulkSocket(wire) as connection:
        read_load(connection.hello(*open_load(wire, LARGE, chain)), received)
    assert received.is_right()


def save_by_ranks(daemon: DaemonProcess, chain: BlockChain) -> None:
    """As two shards of each block."""
    with Client(daemon.address) as client:
        for begin in (0, 2):
            rank = client.open_layout(LARGE, Shard(0, LARGE.layers, begin, begin + 2))
            part = [[heads_of(data, begin, begin + 2) for data in blocks] for blocks in layers_of(LARGE, chain)]
            assert rank.save(chain, part, Durability.SSD).stored == len(chain)  # No copy is made after that.


def heads_of(data: NDArray[np.uint8], begin: int, end: int) -> NDArray[np.uint8]:
    """These KV heads of a slice of LARGE."""
    return np.ascontiguousarray(data.reshape(2, LARGE.kv_heads, -1)[:, begin:end]).reshape(-1)


def test_blocks_pass_through_while_dram_is_full(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(dram__capacity_bytes=16 << 20)
    with Wire(daemon.address) as wire, Client(daemon.address) as client:
        wire.attach()
        wire.open_layout(LARGE)
        chain = new_chain(LARGE, 20)
        wire.save(Upload.of(wire, LARGE, chain, types_pb2.DURABILITY_SSD).messages())
        assert client.evict(chain.keys, Tier.DRAM).evicted == 20
        for _ in range(6):  # What they do not refuse stays leased, in DRAM.
            filling = new_chain(LARGE, 20)
            wire.save(Upload.of(wire, LARGE, filling).messages())
            wire.lookup(LARGE, filling)
        received = Received(LARGE, chain)
        with BulkSocket(wire) as connection:
            read_load(connection.hello(*open_load(wire, LARGE, chain)), received)
        assert received.is_right()
        assert wire.status().counters["read_through_bytes"] > 0


def test_a_daemon_that_stops_ends_its_loads_first_and_then_closes_the_port(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0)
    with Wire(daemon.address) as wire:
        wire.attach()
        chain = stored(wire, LARGE, 200)
        received = Received(LARGE, chain)
        port = wire.capabilities().bulk_port
        with BulkSocket(wire) as connection:
            connection.hello(*open_load(wire, LARGE, chain))
            received.add(*connection.message())
            daemon.terminate()
            daemon.wait_for_log("draining: running loads and saves may take 30 s")
            read_load(connection, received)
            assert received.is_right()
            assert connection.is_closed()
    assert daemon.wait_for_end() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_reader_that_stops_holds_up_no_stop_of_the_daemon(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(ssd__capacity_bytes=0, server__drain_timeout_s=0)
    with Wire(daemon.address) as wire:
        wire.attach()
        chain = stored(wire, LARGE, 200)
        with BulkSocket(wire) as connection:
            connection.hello(*open_load(wire, LARGE, chain)).message()
            daemon.terminate()
            assert daemon.wait_for_end() == 0
