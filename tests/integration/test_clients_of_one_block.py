"""Several clients save the same blocks at once: one copy is stored, and no client gets an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvservice_api.keys import BlockChain
from kvservice_api.v1 import admin_pb2
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import Client, Durability
from tests.daemon import DaemonProcess, until
from tests.integration.known_blocks import SMALL, new_chain, save
from tests.integration.wire import Feed, Upload, Wire

_BLOCK_BYTES = 16 * 1024  # What a SMALL block takes in DRAM.


@pytest.fixture
def clients(daemon: DaemonProcess) -> Iterator[tuple[Wire, Wire]]:
    """Two clients of an empty store."""
    with Wire(daemon.address) as first, Wire(daemon.address) as second:
        first.attach()
        second.attach()
        first.open_layout(SMALL)
        first.admin.Discard(admin_pb2.DiscardRequest(everything=True))
        yield first, second


def is_one_copy(wire: Wire, chain: BlockChain) -> bool:
    state = wire.state()
    assert (state["blocks"], state["uploads"]) == (len(chain), 0)
    return state["DRAM bytes"] == len(chain) * _BLOCK_BYTES and wire.has(SMALL, chain)


def test_the_second_save_of_a_block_returns_already_stored(clients: tuple[Wire, Wire]) -> None:
    first, second = clients
    chain = new_chain(SMALL, 3)
    messages = Upload.of(first, SMALL, chain).messages()
    feed = Feed(*messages[:-1])
    saving = first.begin_save(feed)
    until(lambda: first.status().uploads == 3)

    saving_too = second.begin_save(ended(Feed(*Upload.of(second, SMALL, chain).messages())))
    until(lambda: second.lookup(SMALL, chain).hit_blocks == 0 and second.status().uploads == 3)
    feed.send(messages[-1])
    feed.end()

    assert saving.result() == pb.SaveBlocksResponse(stored=3, stored_blocks=range(3))
    assert saving_too.result() == pb.SaveBlocksResponse(already_stored=3)
    assert is_one_copy(first, chain)


def test_where_the_first_gives_up_the_second_stores_the_block(clients: tuple[Wire, Wire]) -> None:
    first, second = clients
    chain = new_chain(SMALL, 3)
    saving = first.begin_save(Feed(*Upload.of(first, SMALL, chain).messages()[:5]))
    until(lambda: first.status().uploads == 3)
    saving_too = second.begin_save(ended(Feed(*Upload.of(second, SMALL, chain).messages())))

    saving.cancel()
    assert saving_too.result() == pb.SaveBlocksResponse(stored=3, stored_blocks=range(3))
    assert is_one_copy(second, chain)


def test_saves_that_overlap_crosswise_do_not_wait_for_each_other_for_ever(clients: tuple[Wire, Wire]) -> None:
    first, second = clients
    chain = new_chain(SMALL, 4)
    uploads = [Upload.of(first, SMALL, chain[:3]), Upload.of(second, SMALL, chain[1:])]
    feeds = [Feed(upload.first) for upload in uploads]
    saving = first.begin_save(feeds[0])
    until(lambda: first.status().uploads == 3)
    saving_too = second.begin_save(feeds[1])
    until(lambda: first.status().uploads == 4)
    for feed, upload in zip(feeds, uploads, strict=True):
        feed.send(*upload.messages()[1:])
        feed.end()

    assert saving.result() == pb.SaveBlocksResponse(stored=3, stored_blocks=range(3))
    assert saving_too.result() == pb.SaveBlocksResponse(stored=1, already_stored=2, stored_blocks=[2])
    assert is_one_copy(first, chain)


def test_eight_clients_at_once_store_one_copy_of_each_block(daemon: DaemonProcess, clients: tuple[Wire, Wire]) -> None:
    chains = [new_chain(SMALL, 12) for _ in range(5)]
    start = threading.Barrier(8)

    def converse(number: int) -> int:
        stored = 0
        with Client(daemon.address) as client:
            for chain in chains:
                start.wait()
                result = save(client, SMALL, chain, Durability.SSD if number % 2 else Durability.DRAM)
                assert (result.stored + result.already_stored, result.refused) == (12, [])
                stored += result.stored
        return stored

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(converse, range(8))) == 60
    until(lambda: clients[0].status().ssd.blocks == 60)
    state = clients[0].state()
    assert (state["blocks"], state["uploads"]) == (60, 0)
    assert state["DRAM bytes"] == state["SSD bytes"] == 60 * _BLOCK_BYTES
    assert all(clients[0].has(SMALL, chain) for chain in chains)


def ended(feed: Feed) -> Feed:
    feed.end()
    return feed
