"""`explain` against a real daemon: a test per reason of a miss, and tests of what it answers about a request."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvservice_api.errors import ChecksumMismatch, Draining, IncompleteSave, Overloaded, RequestNotFound, TierFull
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import types_pb2
from kvservice_client import BlockChain, Client, Durability, Layout, Tier, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, compare, new_chain, save
from tests.integration.media import flip_data, ssd_file
from tests.integration.wire import Feed, Upload, Wire, refused
from tests.layouts import changed

_RECORD_BEHIND_KEY = 60  # Bytes from the start of an object's key in the index to somewhere in its record.


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client("engine") as made:
        yield made


def miss_of(client: Client, chain: BlockChain) -> pb.Miss:
    """Why the chain's first block is missing."""
    block = client.admin.explain_block(chain.keys[0])
    assert block.HasField("miss"), "it is stored"
    assert (block.miss.key, len(block.shards)) == (chain.keys[0], 0)
    assert block.miss.remembers_since == block.remembers_since
    return block.miss


def fill(client: Client, layout: Layout = LARGE) -> list[BlockChain]:
    """More blocks than fit into the small daemon, each in a chain of its own."""
    chains = [new_chain(layout) for _ in range(60)]
    for chain in chains:
        save(client, layout, chain)
    return chains


@pytest.fixture
def small_daemon(new_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    """Space for 20 large blocks, and no SSD."""
    return new_daemon(dram__capacity_bytes=8 * MIB, ssd__capacity_bytes=0, pins__fraction_max=1.0)


# Misses


def test_never_stored(client: Client) -> None:
    started_at = client.admin.status().started_at
    miss = miss_of(client, new_chain(SMALL))
    assert miss.reason == pb.MISS_REASON_NEVER_STORED
    assert not miss.HasField("event")
    assert not miss.HasField("dram_emptied_at")
    assert 0 <= started_at.seconds - miss.remembers_since.seconds <= 30


def test_dropped_at_save_because_there_was_no_space(small_daemon: DaemonProcess) -> None:
    with small_daemon.client() as client:
        cache, leases = client.open_layout(LARGE), []
        while (result := save(client, LARGE, chain := new_chain(LARGE))).is_complete:
            leases.append(cache.lookup(chain, lease_ttl_s=60))
        assert isinstance(result.refused[0][1], TierFull)
        miss = miss_of(client, chain)
        assert miss.reason == pb.MISS_REASON_DROPPED_AT_SAVE
        assert (miss.event.kind, miss.event.detail) == (pb.EVENT_KIND_REFUSED, "TIER_FULL")


def test_dropped_at_save_because_its_bytes_were_damaged_on_the_way(daemon: DaemonProcess, client: Client) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        chain = new_chain(SMALL)
        upload = Upload.of(wire, SMALL, chain)
        upload.commit.checksums = bytes(len(upload.commit.checksums))
        assert len(wire.save(upload.messages()).refused) == 1
    miss = miss_of(client, chain)
    assert miss.reason == pb.MISS_REASON_DROPPED_AT_SAVE
    assert (miss.event.kind, miss.event.detail) == (pb.EVENT_KIND_REFUSED, "UPLOAD_CORRUPTED")


def test_dropped_at_save_because_it_ended_without_a_commit(daemon: DaemonProcess, client: Client) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        chain = new_chain(SMALL)
        with refused(IncompleteSave, "without a commit"):
            wire.save(Upload.of(wire, SMALL, chain).messages()[:-1])
    miss = miss_of(client, chain)
    assert miss.reason == pb.MISS_REASON_DROPPED_AT_SAVE
    assert miss.event.kind == pb.EVENT_KIND_ABANDONED


def test_dropped_at_save_because_too_many_saves_ran(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(server__saves_max=1)
    with Wire(daemon.address) as wire, daemon.client() as client:
        wire.attach()
        wire.open_layout(SMALL)
        saving = wire.begin_save(Feed(*Upload.of(wire, SMALL, new_chain(SMALL)).messages()[:2]))
        until(lambda: wire.status().uploads == 1)
        chain = new_chain(SMALL)
        with refused(Overloaded, "1 saves are open"):
            wire.save(Upload.of(wire, SMALL, chain).messages())
        miss = miss_of(client, chain)
        assert (miss.reason, miss.event.detail) == (pb.MISS_REASON_DROPPED_AT_SAVE, "OVERLOADED")
        saving.cancel()


def test_dropped_at_save_because_the_daemon_was_drained(daemon: DaemonProcess, client: Client) -> None:
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        *_, last = client.admin.drain()
        assert last.done
        chain = new_chain(SMALL)
        with refused(Draining, "draining"):
            wire.save(Upload.of(wire, SMALL, chain).messages())
        client.admin.undo_drain()
    miss = miss_of(client, chain)
    assert (miss.reason, miss.event.detail) == (pb.MISS_REASON_DROPPED_AT_SAVE, "DRAINING")


def test_evicted_by_the_policy(small_daemon: DaemonProcess) -> None:
    with small_daemon.client() as client:
        chain = fill(client)[0]
        miss = miss_of(client, chain)
        assert miss.reason == pb.MISS_REASON_EVICTED
        event = miss.event
        assert (event.kind, event.detail, event.tier) == (pb.EVENT_KIND_EVICTED, "foresight", types_pb2.TIER_DRAM)
        assert event.last_copy
        assert client.admin.status().started_at.seconds <= event.at.seconds


def test_evicted_on_request_from_both_tiers_one_after_the_other(client: Client) -> None:
    chain = new_chain(SMALL)
    save(client, SMALL, chain, Durability.SSD)
    client.evict(chain, Tier.SSD)
    block = client.admin.explain_block(chain.keys[0])
    assert [(event.kind, event.tier, event.last_copy) for event in block.events] == [
        (pb.EVENT_KIND_EVICTED_ON_REQUEST, types_pb2.TIER_SSD, False)
    ]
    client.evict(chain, Tier.DRAM)
    miss = miss_of(client, chain)
    assert miss.reason == pb.MISS_REASON_EVICTED
    assert (miss.event.kind, miss.event.tier) == (pb.EVENT_KIND_EVICTED_ON_REQUEST, types_pb2.TIER_DRAM)


def test_expired_is_what_a_pin_had_kept_until_its_end(small_daemon: DaemonProcess) -> None:
    with small_daemon.client() as client:
        chain = new_chain(LARGE)
        save(client, LARGE, chain)
        pin = client.admin.pin(chain, 0.3)
        until(lambda: not client.admin.explain_block(chain.keys[0]).shards[0].block.HasField("pinned_until"))
        fill(client)
        miss = miss_of(client, chain)
        assert miss.reason == pb.MISS_REASON_EXPIRED
        assert miss.event.kind == pb.EVENT_KIND_EVICTED
        assert miss.event.pin_ended_at == pin.pinned_until
        assert miss.event.at.ToNanoseconds() >= pin.pinned_until.ToNanoseconds()


def test_discarded(client: Client) -> None:
    chain = new_chain(SMALL)
    save(client, SMALL, chain)
    client.admin.discard(chain)
    miss = miss_of(client, chain)
    assert (miss.reason, miss.event.kind) == (pb.MISS_REASON_DISCARDED, pb.EVENT_KIND_DISCARDED)


def test_quarantined(daemon: DaemonProcess, client: Client) -> None:
    chain = new_chain(LARGE)
    save(client, LARGE, chain, Durability.SSD)
    client.evict(chain, Tier.DRAM)
    flip_data(ssd_file(daemon), LARGE, chain.keys[0], random.Random(1))
    with client.open_layout(LARGE).lookup(chain, request_id="damaged") as lease, pytest.raises(ChecksumMismatch):
        compare(lease, LARGE, chain)
    miss = miss_of(client, chain)
    assert miss.reason == pb.MISS_REASON_QUARANTINED
    assert (miss.event.kind, miss.event.tier) == (pb.EVENT_KIND_QUARANTINED, types_pb2.TIER_SSD)
    (lookup,) = client.admin.explain_request("damaged").lookups
    assert {load.outcome for load in lookup.loads} == {"checksum_mismatch"}


def test_lost_in_a_restart_that_replaced_the_arena(small_daemon: DaemonProcess) -> None:
    chain = new_chain(SMALL)
    with small_daemon.client() as client:
        save(client, SMALL, chain)
        small_daemon.kill()
        os.truncate(small_daemon.arena_folder / "arena", 1 * MIB)
        small_daemon.start()
        miss = miss_of(client, chain)
        assert miss.reason == pb.MISS_REASON_LOST_IN_RESTART
        assert (miss.event.kind, miss.event.tier) == (pb.EVENT_KIND_LOST, types_pb2.TIER_DRAM)
        assert f"it has {MIB} bytes" in miss.dram_emptied_because
        assert miss_of(client, new_chain(SMALL)).reason == pb.MISS_REASON_NEVER_STORED_OR_LOST


def test_lost_in_a_restart_that_found_its_record_damaged(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon, chain = new_daemon(), new_chain(SMALL)
    with daemon.client() as client:
        save(client, SMALL, chain, Durability.SSD)
        client.evict(chain, Tier.DRAM)
        daemon.kill()
        _flip_record(daemon.store / "index" / "data.mdb", chain.keys[0])
        daemon.start()
        miss = miss_of(client, chain)
        assert miss.reason == pb.MISS_REASON_LOST_IN_RESTART
        assert (miss.event.kind, miss.event.tier) == (pb.EVENT_KIND_LOST, types_pb2.TIER_SSD)


def _flip_record(index: Path, key: bytes) -> None:
    """In every page that has it, because LMDB keeps old pages."""
    data = bytearray(index.read_bytes())
    place = data.find(key)
    assert place >= 0
    while place >= 0:
        data[place + _RECORD_BEHIND_KEY] ^= 1
        place = data.find(key, place + 1)
    index.write_bytes(data)


def test_where_the_shared_memory_is_gone_it_is_said_that_this_may_be_why(small_daemon: DaemonProcess) -> None:
    chain = new_chain(SMALL)
    with small_daemon.client() as client:
        save(client, SMALL, chain)
        small_daemon.kill()
        # As after a restart of the host. The client removes its own file there meanwhile.
        shutil.rmtree(small_daemon.arena_folder, ignore_errors=True)
        small_daemon.start()
        miss = miss_of(client, chain)
        assert miss.reason == pb.MISS_REASON_NEVER_STORED_OR_LOST
        assert miss.dram_emptied_because == "there is no arena"
        assert miss.dram_emptied_at.seconds >= miss.remembers_since.seconds - 30


def test_a_restart_ends_what_is_remembered_and_says_so(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon, chain = new_daemon(), new_chain(SMALL)
    with daemon.client() as client:
        save(client, SMALL, chain)
        client.admin.discard(chain)
        discarded = miss_of(client, chain)
        daemon.kill()
        daemon.start()
        miss = miss_of(client, chain)
        assert miss.reason == pb.MISS_REASON_NEVER_STORED
        assert miss.remembers_since.ToNanoseconds() > discarded.event.at.ToNanoseconds()


def test_with_the_history_off_nothing_is_remembered(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(history__events_max=0, history__requests_max=0)
    with daemon.client() as client:
        chain = new_chain(SMALL)
        save(client, SMALL, chain)
        client.admin.discard(chain)
        assert miss_of(client, chain).reason == pb.MISS_REASON_NEVER_STORED
        client.open_layout(SMALL).lookup(chain, request_id="one").release()
        with pytest.raises(RequestNotFound):
            client.admin.explain_request("one")


# Stored blocks


def test_a_stored_block_tells_where_it_is_and_what_keeps_it(client: Client) -> None:
    chain = new_chain(SMALL, 2)
    save(client, SMALL, chain, Durability.SSD)
    client.evict(chain, Tier.DRAM)
    client.prefetch(chain, wait=True)
    pin = client.admin.pin(chain.keys[1:], 60)
    with client.open_layout(SMALL).lookup(chain):
        block = client.admin.explain_block(chain.keys[1])
    assert not block.HasField("miss")
    assert block.layout == SMALL.to_proto()
    (shard,) = block.shards
    assert shard.block.parent_key == chain.keys[0]
    assert (shard.block.leases, shard.block.pinned_until) == (1, pin.pinned_until)
    arrivals = {place.tier: place.arrival for place in shard.places}
    assert arrivals == {
        types_pb2.TIER_DRAM: pb.ARRIVAL_PROMOTED,
        types_pb2.TIER_SSD: pb.ARRIVAL_WRITTEN_BEHIND,
    }
    times = [shard.block.stored_at.ToNanoseconds(), *(place.since.ToNanoseconds() for place in shard.places)]
    assert min(times) == times[0]


# Requests


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_request_tells_what_was_reused_from_where_and_how_long_it_took(
    daemon: DaemonProcess, client: Client, transport: str
) -> None:
    chain = new_chain(SMALL, 4)
    save(client, SMALL, chain[:3], Durability.SSD)
    client.evict(chain.keys[:2], Tier.DRAM)
    request_id = f"conversation 7 by {transport}"
    with (
        daemon.client("engine", transport=transport) as engine,
        engine.open_layout(SMALL).lookup(chain, request_id=request_id) as lease,
    ):
        compare(lease, SMALL, chain)
        until(lambda: client.admin.explain_request(request_id).lookups[0].loads[0].outcome != "running")

    answer = client.admin.explain_request(request_id)
    (lookup,) = answer.lookups
    assert (lookup.client_name, lookup.layout) == ("engine", SMALL.to_proto())
    assert (lookup.asked_blocks, lookup.hit_blocks) == (4, 3)
    assert (lookup.hit_blocks_in_dram, lookup.hit_blocks_on_ssd) == (1, 2)
    assert (lookup.miss.key, lookup.miss.reason) == (chain.keys[3], pb.MISS_REASON_NEVER_STORED)
    (load,) = lookup.loads
    assert (load.outcome, load.blocks, load.layers) == ("done", 3, SMALL.layers)
    assert (load.blocks_from_dram, load.blocks_from_ssd) == (1, 2)
    in_place = transport == "shm"
    assert load.in_place == in_place
    assert load.sent_bytes == 0 if in_place else load.sent_bytes >= 3 * SMALL.block_tokens * SMALL.bytes_per_token
    assert load.took_ms > 0


def test_other_layout_names_the_fields_that_differ(client: Client) -> None:
    ours = replace(SMALL, model_id="two layouts")
    theirs = changed(ours, dtype="bfloat16", block_tokens=8)
    chain = new_chain(ours)
    save(client, ours, chain)
    asked = block_chain(theirs, list(range(theirs.block_tokens)))
    with client.open_layout(theirs).lookup(asked, request_id="wrong layout") as lease:
        assert lease.hit_blocks == 0
    (lookup,) = client.admin.explain_request("wrong layout").lookups
    assert lookup.miss.reason == pb.MISS_REASON_OTHER_LAYOUT
    (other,) = lookup.other_layouts
    assert other.layout_fingerprint == ours.fingerprint
    differences = {each.field: (each.stored, each.asked) for each in other.differences}
    assert differences == {"dtype": ("float16", "bfloat16"), "block_tokens": ("16", "8")}


def test_an_unknown_request_is_not_found(client: Client) -> None:
    with pytest.raises(RequestNotFound, match="'unknown'"):
        client.admin.explain_request("unknown")
