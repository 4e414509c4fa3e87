"""Loads and views in shared memory that the answer of the lookup is enough for: no call finds the blocks again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import pytest

from kvservice_api.copying import copy_slices
from kvservice_api.errors import ChecksumMismatch, LeaseExpired
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import BlockCache, BlockChain, Client, Durability, Layout, Lease, Shard, View
from kvservice_client.transports import bulk_caller, bulk_messages, shm
from kvservice_client.transports.bulk_connections import BulkConnection
from tests.daemon import NEVER_S, DaemonProcess, until
from tests.integration.known_blocks import SMALL, layers_of, new_chain, save
from tests.integration.media import arena, flip_bit_of

Calls = list[str]


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client(transport="shm", timeout_s=NEVER_S) as client:
        client.open_layout(SMALL).lookup(new_chain(SMALL, 1))
        yield client


@pytest.fixture
def blocks(client: Client) -> BlockCache:
    return client.open_layout(SMALL)


@pytest.fixture
def chain(client: Client) -> BlockChain:
    """Three blocks in DRAM, and on SSD: their copies there keep them in their place no longer."""
    chain = new_chain(SMALL, 3)
    save(client, SMALL, chain, Durability.SSD)
    return chain


@pytest.fixture
def calls(client: Client, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The names of the RPCs that the client makes from now on."""
    channel, made = client._connection.channel, Calls()

    def recorded(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(method: str, *others: Any) -> Any:
            made.append(method.rpartition("/")[2])
            return inner(method, *others)

        return call

    def recorded_call(connection: BulkConnection, method: str, *others: Any) -> Any:
        made.append(method)
        return bulk_messages.call(connection, method, *others)

    on_the_port = client._transports._calls
    assert on_the_port is not None
    until(lambda: on_the_port._pool.has_idle)  # Made with the first call, for the later ones.
    monkeypatch.setattr(bulk_caller, "call", recorded_call)
    for name in ("call", "stream"):
        monkeypatch.setattr(channel, name, recorded(getattr(channel, name)))
    return made


def loaded(lease: Lease, **options: Any) -> list[np.ndarray[Any, Any]]:
    return [layer.data for layer in lease.load(**options)]


def expected(chain: BlockChain) -> list[np.ndarray[Any, Any]]:
    return [np.concatenate(layer) for layer in layers_of(SMALL, chain)]


def end_at_the_daemon(client: Client, lease: Lease) -> None:
    """As the daemon ends it at its time. The lease's object does not know."""
    request = pb.ReleaseLeaseRequest(client_id=lease._attachment.client_id, lease_id=lease._lease_id)
    method = "/kvservice_api.v1.BlockService/ReleaseLease"
    client._connection.channel.call(method, request, pb.ReleaseLeaseResponse, client._connection.deadline(None))


def test_a_hit_is_looked_up_and_loaded_with_one_call(blocks: BlockCache, chain: BlockChain, calls: Calls) -> None:
    with blocks.lookup(chain) as lease:
        assert all(map(np.array_equal, loaded(lease), expected(chain)))
        assert calls == ["LookupPrefix"]
        part = loaded(lease, first_block=1, block_count=1)
        assert all(np.array_equal(found, layer[1]) for found, layer in zip(part, layers_of(SMALL, chain), strict=True))
        assert calls == ["LookupPrefix"]


def test_a_view_needs_a_call_only_if_the_daemon_has_blocks_to_verify_for_it(
    blocks: BlockCache, chain: BlockChain, calls: Calls
) -> None:
    def seen(view: View) -> list[np.ndarray[Any, Any]]:
        return [np.concatenate([part for (part,) in view.slices(layer)]) for layer in range(SMALL.layers)]

    with blocks.lookup(chain) as lease, lease.view(verify="always") as view:
        assert all(map(np.array_equal, seen(view), expected(chain)))
    assert calls == ["LookupPrefix", "ReleaseLease"]

    with blocks.lookup(chain) as lease:
        lease._are_verified = False  # As long as the daemon has not read what the client wrote.
        with lease.view() as view:
            assert all(map(np.array_equal, seen(view), expected(chain)))
    assert calls[2:] == ["LookupPrefix", "LocateBlocks", "ReleaseLease"]

    with blocks.lookup(chain) as lease, lease.view() as view:
        assert all(map(np.array_equal, seen(view), expected(chain)))
    assert calls[5:] == ["LookupPrefix", "ReleaseLease"], "it has verified them now"


def test_an_adopted_lease_is_loaded_without_a_further_call(
    daemon: DaemonProcess, blocks: BlockCache, chain: BlockChain, calls: Calls
) -> None:
    with daemon.client("exporter", transport="grpc") as exporter, exporter.open_layout(SMALL).lookup(chain) as lease:
        ticket = lease.export()
    with blocks.adopt(ticket) as adopted:
        assert all(map(np.array_equal, loaded(adopted), expected(chain)))
        assert calls == ["AdoptLease"]


def test_a_lease_that_ends_with_its_load_ends_at_the_daemon_too_and_is_counted(
    client: Client, blocks: BlockCache, chain: BlockChain, calls: Calls
) -> None:
    lease = blocks.lookup(chain, request_id="short")
    assert all(map(np.array_equal, loaded(lease, release=True), expected(chain)))
    assert not lease.remaining_s
    with pytest.raises(LeaseExpired):
        loaded(lease)
    until(lambda: calls == ["LookupPrefix", "ReleaseLease"])
    until(lambda: client.evict(chain, "dram").held == 0)
    (lookup,) = client.admin.explain_request("short").lookups
    assert [(each.blocks, each.outcome) for each in lookup.loads] == [(3, "done")]


def test_blocks_that_have_left_since_the_lookup_are_not_read(
    client: Client, blocks: BlockCache, chain: BlockChain, calls: Calls
) -> None:
    lease = blocks.lookup(chain)
    end_at_the_daemon(client, lease)
    assert client.admin.discard(chain).discarded == 3
    with pytest.raises(LeaseExpired):
        loaded(lease)
    assert "LocateBlocks" in calls, "the daemon says why"


def test_a_small_load_has_all_layers_with_its_first(client: Client, blocks: BlockCache, chain: BlockChain) -> None:
    lease = blocks.lookup(chain)
    layers = lease.load()
    found = [next(layers).data]
    end_at_the_daemon(client, lease)
    assert client.admin.discard(chain).discarded == 3
    found += [layer.data for layer in layers]
    assert all(map(np.array_equal, found, expected(chain)))


def test_blocks_that_leave_while_they_are_read_end_the_load(
    client: Client, blocks: BlockCache, chain: BlockChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "HELPED_BYTES_MIN", 0)  # As for a large load.
    lease = blocks.lookup(chain)
    layers = lease.load()
    assert np.array_equal(next(layers).data, expected(chain)[0])
    end_at_the_daemon(client, lease)
    assert client.admin.discard(chain).discarded == 3
    with pytest.raises(LeaseExpired, match="moved or evicted"):
        next(layers)


def test_no_layer_is_yielded_whose_blocks_have_left_while_it_was_copied(
    client: Client, blocks: BlockCache, chain: BlockChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = blocks.lookup(chain)

    def copied(*arguments: Any, **options: Any) -> Any:
        sums = copy_slices(*arguments, **options)
        end_at_the_daemon(client, lease)
        assert client.admin.discard(chain).discarded == 3
        return sums

    monkeypatch.setattr(shm, "copy_slices", copied)
    with pytest.raises(LeaseExpired, match="moved or evicted"):
        next(lease.load())


LARGE = Layout("large", "uint8", layers=12, kv_heads=4, k_head_dim=256, v_head_dim=256, block_tokens=256)  # 512 KiB.


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slices each call copies."""
    counts: list[int] = []

    def counted(sources: Any, targets: Any, slices: Any, *others: Any, **options: Any) -> Any:
        counts.append(len(slices))
        return copy_slices(sources, targets, slices, *others, **options)

    monkeypatch.setattr(shm, "copy_slices", counted)
    return counts


@pytest.mark.parametrize(
    "shard",
    [Shard(0, 12, 0, 4), Shard(0, 12, 1, 3), Shard(2, 11, 0, 4)],
    ids=["all of it", "some heads", "some layers"],
)
def test_a_large_load_copies_its_first_layer_alone_and_then_several_at_a_time(
    client: Client, copies: list[int], shard: Shard
) -> None:
    chain = new_chain(LARGE, 1)
    save(client, LARGE, chain)
    copies.clear()
    with client.open_layout(LARGE, shard).lookup(chain) as lease:
        found = loaded(lease)
    whole = [layer[0].reshape(2, 4, -1) for layer in layers_of(LARGE, chain)[shard.layer_begin : shard.layer_end]]
    wanted = [layer[:, shard.head_begin : shard.head_end].ravel() for layer in whole]
    assert len(found) == len(wanted) and all(map(np.array_equal, found, wanted))
    assert client.stats().transports["shm"].mismatches == 0
    assert sum(copies) == shard.layers and min(copies) == 1 and max(copies) >= 2
    assert len(copies) <= shard.layers // 2 + 1


def test_damage_in_layers_that_are_copied_together_is_found_and_named(
    daemon: DaemonProcess, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    chain = new_chain(LARGE, 2)
    save(client, LARGE, chain)
    flip_bit_of(arena(daemon), LARGE, chain.keys[1], 7)
    with client.open_layout(LARGE).lookup(chain) as lease, pytest.raises(ChecksumMismatch):
        loaded(lease)
    assert "layer 7 of block 1 is not what its checksum says" in caplog.text


def test_a_load_whose_caller_stops_after_the_last_layer_is_counted(
    client: Client, blocks: BlockCache, chain: BlockChain
) -> None:
    with blocks.lookup(chain, request_id="stops") as lease, closing(lease.load()) as layers:
        assert len(list(islice(layers, SMALL.layers))) == SMALL.layers
    (lookup,) = client.admin.explain_request("stops").lookups
    assert [(each.blocks, each.outcome) for each in lookup.loads] == [(3, "done")]


@pytest.mark.parametrize(("count", "is_located"), [(256, True), (257, False)])
def test_places_are_named_for_256_blocks_at_most(
    client: Client, blocks: BlockCache, calls: Calls, count: int, is_located: bool
) -> None:
    chain = new_chain(SMALL, count)
    save(client, SMALL, chain)
    calls.clear()
    with blocks.lookup(chain) as lease:
        ticket = lease.export()
        with blocks.adopt(ticket) as adopted:
            loaded(lease)
            loaded(adopted)
    assert calls.count("LocateBlocks") == (0 if is_located else 2)


def test_a_daemon_that_names_no_places_is_asked_for_them(
    blocks: BlockCache, chain: BlockChain, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = blocks._look_up

    def older(*others: Any, **options: Any) -> Any:
        session, answer = inner(*others, **options)
        answer.ClearField("located")
        return session, answer

    monkeypatch.setattr(blocks, "_look_up", older)
    with blocks.lookup(chain) as lease:
        assert all(map(np.array_equal, loaded(lease), expected(chain)))
    assert calls == ["LookupPrefix", "LocateBlocks", "ReleaseLease"]
