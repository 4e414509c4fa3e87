"""Every RPC of BlockService, called over the wire: each test is named after one, and checks its effect."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice_api.arena import HEADER_BYTES, ArenaHeader
from kvservice_api.errors import (
    BlockNotFound,
    InvalidRequest,
    LeaseExpired,
    LeaseNotYours,
    ReservationEnded,
    TicketForged,
    TicketLayoutMismatch,
    TicketSpent,
    UnknownClient,
    UnknownLayout,
)
from kvservice_api.frames import HEAD_BYTES_MAX
from kvservice_api.image import Trailer, block_geometry, checksum
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import admin_pb2, types_pb2
from kvservice_api.v1 import blocks_pb2 as pb
from tests.daemon import DaemonProcess, until
from tests.integration.bulk_wire import BulkSocket, Received, checksums_of, open_load, open_save, read_load
from tests.integration.by_hand import InPlaceWriter
from tests.integration.known_blocks import SMALL, layers_of, new_chain, slice_bytes, slice_of
from tests.integration.wire import Upload, Wire, refused

SERVICE = "BlockService"
DRAM, SSD = types_pb2.TIER_DRAM, types_pb2.TIER_SSD


def saved(wire: Wire, blocks: int = 3) -> BlockChain:
    """A new chain in both tiers."""
    chain = new_chain(SMALL, blocks)
    assert wire.save(Upload.of(wire, SMALL, chain, types_pb2.DURABILITY_SSD).messages()).stored == blocks
    return chain


def evict(wire: Wire, chain: BlockChain, tier: types_pb2.Tier) -> pb.EvictResponse:
    answer: pb.EvictResponse = wire.blocks.Evict(pb.EvictRequest(keys=chain.packed_keys, tier=tier))
    return answer


def residency(wire: Wire, chain: BlockChain) -> list[tuple[int, bool, bool]]:
    """Runs of blocks: how many, in DRAM, on SSD."""
    return [(run.count, run.dram, run.ssd) for run in wire.lookup(SMALL, chain, ttl_ms=0).runs]


def test_GetCapabilities_tells_identity_and_the_limits_that_hold(wire: Wire) -> None:
    answer, status = wire.capabilities(), wire.status()

    assert (answer.version, answer.boot_epoch, answer.store_id) == (status.version, status.boot_epoch, status.store_id)
    assert answer.max_frame_bytes == 2 * 2**20 + HEAD_BYTES_MAX
    assert (answer.max_lease_ttl_ms, list(answer.transports)) == (300_000, ["shm", "bulk", "grpc"])
    assert wire.renew(wire.lookup(SMALL, saved(wire)).lease_id, ttl_ms=2**32 - 1).ttl_ms == answer.max_lease_ttl_ms
    header = ArenaHeader.decode((Path(answer.arena_directory) / "arena").read_bytes()[:HEADER_BYTES])
    assert (header.arena_id, header.store_id) == (answer.arena_id, answer.store_id)
    assert (header.capacity_bytes, answer.arena_writable) == (answer.arena_capacity_bytes, True)


def test_OpenLayout_makes_a_layout_known_once(wire: Wire) -> None:
    layout = Layout("opened", "uint8", layers=1, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=4)
    known = wire.status().layouts

    assert wire.open_layout(layout).created
    assert not wire.open_layout(layout).created
    assert wire.status().layouts == known + 1
    chain = new_chain(layout)
    assert wire.save(Upload.of(wire, layout, chain).messages()).stored == 1
    assert wire.has(layout, chain)


def test_Attach_names_the_client_until_its_stream_ends(wire: Wire, daemon: DaemonProcess) -> None:
    chain, before = saved(wire), wire.state()

    with Wire(daemon.address) as other:
        answer = other.attach("another")
        assert len(answer.client_id) == 16
        assert answer.client_id != wire.client_id
        assert answer.boot_epoch == wire.status().boot_epoch
        other.lookup(SMALL, chain)
        assert wire.status().clients == before["clients"] + 1
        assert wire.status().leases == before["leases"] + 1

    until(lambda: wire.state() == before)
    wire.attach()  # For the fixture's check: the other connection has ended.


def test_LookupPrefix_counts_the_unbroken_prefix_and_leases_it(wire: Wire) -> None:
    chain = saved(wire, 5)
    evict(wire, chain[:2], DRAM)
    evict(wire, chain[2:3], SSD)
    evict(wire, chain[4:], DRAM)
    evict(wire, chain[4:], SSD)

    answer = wire.lookup(SMALL, chain, ttl_ms=20_000)
    assert answer.hit_blocks == 4
    assert [(run.count, run.dram, run.ssd) for run in answer.runs] == [
        (2, False, True), (1, True, False), (1, True, True)
    ]  # fmt: skip
    assert answer.lease_id
    assert answer.lease_ttl_ms == 20_000
    assert evict(wire, chain, DRAM).held == 2
    assert wire.lookup(SMALL, new_chain(SMALL)) == pb.LookupPrefixResponse()


def test_LookupPrefix_lists_the_tails_of_its_last_hit_if_the_request_names_the_parent(wire: Wire) -> None:
    chain = saved(wire, 2)
    tail = block_chain(SMALL, range(5), with_partial=True, parent=chain.keys[-1])
    wire.save(Upload.of(wire, SMALL, tail).messages())

    request = pb.LookupPrefixRequest(layout_fingerprint=SMALL.fingerprint, keys=chain.packed_keys)
    assert not wire.blocks.LookupPrefix(request).tails
    request.parent_key = chain.parent
    answer = wire.blocks.LookupPrefix(request)
    assert (answer.hit_blocks, list(answer.tails)) == (2, [pb.Tail(key=tail.keys[0], token_count=5)])
    request = pb.LookupPrefixRequest(layout_fingerprint=SMALL.fingerprint, parent_key=chain.keys[-1])
    assert wire.blocks.LookupPrefix(request) == pb.LookupPrefixResponse(tails=answer.tails)
    assert wire.capabilities().max_tails == 4
    request.parent_key = chain.parent[:31]
    with refused(InvalidRequest, "parent_key has 31 bytes, not 32", field="parent_key"):
        wire.blocks.LookupPrefix(request)


def test_LoadBlocks_streams_the_leased_bytes_layer_by_layer(wire: Wire) -> None:
    chain = saved(wire, 4)
    evict(wire, chain[1:2], DRAM)
    lease_id = wire.lookup(SMALL, chain).lease_id
    expected = [np.concatenate(slices).tobytes() for slices in layers_of(SMALL, chain)]

    frames = wire.load(lease_id)
    assert [frame.layer for frame in frames] == sorted(frame.layer for frame in frames)
    for layer, data in enumerate(expected):
        mine = [frame for frame in frames if frame.layer == layer]
        assert b"".join(frame.payload for frame in mine) == data
        assert (mine[0].first_block, mine[0].first_offset_bytes) == (0, 0)

    size = slice_bytes(SMALL)
    part = wire.load(lease_id, first_block=1, block_count=2, first_layer=3, layer_count=1)
    assert {frame.layer for frame in part} == {3}
    assert b"".join(frame.payload for frame in part) == expected[3][size : 3 * size]


def test_SaveBlocks_stores_what_is_new_as_durably_as_was_asked(wire: Wire) -> None:
    chain = new_chain(SMALL, 3)

    upload = Upload.of(wire, SMALL, chain[:2], types_pb2.DURABILITY_SSD)
    assert wire.save(upload.messages()) == pb.SaveBlocksResponse(stored=2, stored_blocks=range(2))
    assert residency(wire, chain) == [(2, True, True)]

    assert wire.save(Upload.of(wire, SMALL, chain).messages()) == pb.SaveBlocksResponse(
        stored=1, already_stored=2, stored_blocks=[2]
    )
    assert wire.has(SMALL, chain)
    shard = wire.admin.Inspect(admin_pb2.InspectRequest(key=chain.keys[2])).shards[0]
    assert (shard.parent_key, shard.token_count) == (chain.keys[1], SMALL.block_tokens)


def locate(wire: Wire, lease_id: int, **request: Any) -> list[pb.LocateBlocksResponse]:
    """All answers; ends the call when the last layer is ready."""
    call = wire.blocks.LocateBlocks(pb.LocateBlocksRequest(client_id=wire.client_id, lease_id=lease_id, **request))
    answers = []
    for answer in call:
        answers.append(answer)
        if answer.layers_ready == SMALL.layers:
            call.cancel()
            break
    return answers


def test_OpenTransfer_gives_tickets_for_a_load_or_a_save(wire: Wire) -> None:
    chain = new_chain(SMALL, 3)
    opened = open_save(wire, SMALL, chain, connections=2)
    assert list(opened.blocks) == [0, 1, 2] and len(set(opened.tickets)) == 2 and opened.ttl_ms == 5_000
    with BulkSocket(wire) as connection:
        connection.hello(opened.tickets[0])
        for layer, slices in enumerate(layers_of(SMALL, chain)):
            connection.put(layer, 0, np.concatenate(slices).tobytes())
        connection.commit(checksums_of(SMALL, chain, opened.blocks))
        assert connection.result().stored == 3
        received = Received(SMALL, chain)
        read_load(connection.hello(*open_load(wire, SMALL, chain)), received)
    assert received.is_right()


def test_LocateBlocks_tells_where_leased_blocks_lie_and_keeps_them_there(wire: Wire) -> None:
    chain = saved(wire, 4)
    evict(wire, chain[1:2], DRAM)
    lease_id = wire.lookup(SMALL, chain).lease_id
    arena = InPlaceWriter(wire, locked=False).arena

    first, *others = locate(wire, lease_id)
    ready = [answer.layers_ready for answer in [first, *others]]
    assert (ready[0], ready[-1]) == (0, SMALL.layers) and ready == sorted(ready)
    geometry = block_geometry(SMALL, Shard.whole(SMALL), SMALL.block_tokens)
    for block, (key, offset) in enumerate(zip(chain, first.offsets, strict=True)):
        for layer in range(SMALL.layers):
            begin, end = geometry.slice_range(layer)
            assert np.array_equal(arena.data[offset + begin : offset + end], slice_of(key, layer, slice_bytes(SMALL)))
        trailer = arena.data[offset + geometry.trailer_offset : offset + geometry.image_bytes].tobytes()
        assert (checksum(trailer), Trailer.decode(trailer).key) == (first.trailer_checksums[block], key)
    assert arena.generations(np.array(first.offsets, np.int64)).tolist() == list(first.generations)
    assert (list(first.token_counts), first.shards) == ([16] * 4, Shard.whole(SMALL).encode() * 4)

    until(lambda: residency(wire, chain) == [(4, True, True)])
    [part] = locate(wire, lease_id, first_block=1, block_count=2, verify=True)
    assert (list(part.offsets), part.layers_ready) == (list(first.offsets)[1:3], SMALL.layers)

    call = wire.blocks.LocateBlocks(pb.LocateBlocksRequest(client_id=wire.client_id, lease_id=lease_id))
    next(call)
    wire.release(lease_id)
    assert evict(wire, chain, DRAM).held == 4, "the open call holds them"
    call.cancel()
    until(lambda: evict(wire, chain, DRAM).held == 0)
    assert (arena.generations(np.array(first.offsets, np.int64)) != first.generations).all(), "they have left"


def test_LookupPrefix_names_the_places_of_leased_blocks_in_memory_if_it_is_asked(wire: Wire) -> None:
    chain = saved(wire, 3)
    request = pb.LookupPrefixRequest(
        client_id=wire.client_id,
        layout_fingerprint=SMALL.fingerprint,
        keys=chain.packed_keys,
        lease_ttl_ms=30_000,
        request_id="located",
        locate=True,
    )

    answer = wire.blocks.LookupPrefix(request)
    [expected] = locate(wire, answer.lease_id)
    assert (answer.located, answer.located_verified) == (expected, True)
    plain = wire.lookup(SMALL, chain)
    assert not plain.HasField("located")
    wire.release(plain.lease_id)

    report = pb.InPlaceLoad(first_block=1, block_count=2, took_us=1500)
    release = pb.ReleaseLeaseRequest(client_id=wire.client_id, lease_id=answer.lease_id, loads=[report])
    wire.blocks.ReleaseLease(release)
    *_, load = wire.admin.Explain(admin_pb2.ExplainRequest(request_id="located")).request.lookups[0].loads
    assert (load.blocks, load.outcome) == (2, "done")
    wire.blocks.ReleaseLease(release)  # The lease has ended: nothing is counted.

    until(lambda: evict(wire, chain[1:2], DRAM).held == 0)
    cold = wire.blocks.LookupPrefix(request)
    assert (cold.hit_blocks, cold.HasField("located")) == (3, False)

    assert evict(wire, chain, DRAM).held == 2
    for wrong in ([pb.InPlaceLoad(first_block=3)], [report] * 65):
        lease_id = wire.lookup(SMALL, chain).lease_id
        with refused(InvalidRequest, "are not in the lease|are reported"):
            wire.blocks.ReleaseLease(pb.ReleaseLeaseRequest(client_id=wire.client_id, lease_id=lease_id, loads=wrong))
    wire.release(cold.lease_id)
    assert evict(wire, chain, DRAM).held == 0, "refused reports have ended their leases"


@pytest.fixture(scope="module")
def daemon_without_ssd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("without_ssd"), ssd__capacity_bytes=0) as process:
        yield process


@pytest.fixture
def dram_only(daemon_without_ssd: DaemonProcess) -> Iterator[Wire]:
    """A client for what is in use: no promotion that another test has caused changes it meanwhile."""
    with Wire(daemon_without_ssd.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        yield wire


def test_ReserveBlocks_sets_space_aside_for_what_is_not_stored(dram_only: Wire) -> None:
    chain = new_chain(SMALL, 3)
    assert dram_only.save(Upload.of(dram_only, SMALL, chain[:1]).messages()).stored == 1
    used = dram_only.status().dram.used_bytes
    writer = InPlaceWriter(dram_only)

    reserved = writer.reserve(chain)

    assert list(reserved.answer.blocks) == [1, 2]
    assert not reserved.answer.refused
    assert dram_only.status().dram.used_bytes == used + 2 * block_geometry(SMALL, Shard.whole(SMALL), 16).image_bytes
    assert dram_only.lookup(SMALL, chain).hit_blocks == 1
    with refused(InvalidRequest, "in use", field="reservation_id"):
        writer.reserve(new_chain(SMALL), reserved.number)
    reserved.abandon()


def test_CommitBlocks_makes_visible_what_was_written_in_place(wire: Wire) -> None:
    chain = new_chain(SMALL, 3)
    reserved = InPlaceWriter(wire).reserve(chain, durability=types_pb2.DURABILITY_SSD)
    reserved.write()
    assert wire.lookup(SMALL, chain).hit_blocks == 0

    assert reserved.commit() == pb.SaveBlocksResponse(stored=3, stored_blocks=range(3))

    assert residency(wire, chain) == [(3, True, True)]
    assert wire.has(SMALL, chain)
    with refused(ReservationEnded, "reserve again"):
        reserved.commit()


def test_AbandonBlocks_gives_the_space_back_and_may_come_twice(dram_only: Wire) -> None:
    chain, used = new_chain(SMALL, 3), dram_only.status().dram.used_bytes
    reserved = InPlaceWriter(dram_only).reserve(chain)
    reserved.write()

    reserved.abandon()
    assert dram_only.status().dram.used_bytes == used
    assert dram_only.lookup(SMALL, chain).hit_blocks == 0
    with refused(ReservationEnded, "no such reservation"):
        reserved.commit()
    reserved.abandon()


def heads_of(key: bytes, layer: int, first: int, end: int) -> bytes:
    """The bytes that a load returns for these heads of a slice."""
    halves = slice_of(key, layer, slice_bytes(SMALL)).reshape(2, SMALL.kv_heads, -1)
    return np.ascontiguousarray(halves[:, first:end]).tobytes()


def test_LoadBlocks_loads_a_shard_within_the_leases(wire: Wire) -> None:
    chain = saved(wire, 2)
    lease_id = wire.lookup(SMALL, chain).lease_id
    for shard in (Shard(1, 4, 1, 3), Shard(0, 5, 2, 3), Shard(4, 5, 0, 1)):
        got = {frame.layer: frame.payload for frame in wire.load(lease_id, shard=shard.to_proto())}
        layers = range(shard.layer_begin, shard.layer_end)
        heads = shard.head_begin, shard.head_end
        assert list(got.values()) == [b"".join(heads_of(key, layer, *heads) for key in chain) for layer in layers]
        assert list(got) == list(range(len(layers)))
        (last,) = wire.load(lease_id, shard=shard.to_proto(), first_layer=len(layers) - 1)
        assert last.payload == got[len(layers) - 1]
        with refused(InvalidRequest, "are not in the lease's", field="first_layer"):
            wire.load(lease_id, shard=shard.to_proto(), first_layer=len(layers))
    for outside in (
        Shard(0, 6, 0, 3),
        Shard(0, 5, 0, 4),
        Shard(2, 2, 0, 1),
        Shard(1, 0, 0, 1),
        Shard(0, 2**32 - 1, 0, 1),
    ):
        with refused(InvalidRequest, "shard", field="shard"):
            wire.load(lease_id, shard=outside.to_proto())
        with refused(InvalidRequest, "shard", field="shard"):
            locate(wire, lease_id, shard=outside.to_proto())


def test_LocateBlocks_counts_the_layers_of_a_shard_within_the_leases(wire: Wire) -> None:
    chain = saved(wire, 2)
    evict(wire, chain, DRAM)
    lease_id = wire.lookup(SMALL, chain).lease_id
    request = pb.LocateBlocksRequest(
        client_id=wire.client_id, lease_id=lease_id, shard=Shard(1, 3, 0, 1).to_proto(), verify=True
    )
    call = wire.blocks.LocateBlocks(request)
    first = next(call)
    ready = [first.layers_ready]
    while ready[-1] < 2:
        ready.append(next(call).layers_ready)
    call.cancel()
    assert ready[-1] == 2
    assert first.shards == Shard.whole(SMALL).encode() * 2, "what is stored, which contains the shard"


def test_ExportLease_makes_a_ticket_that_holds_the_blocks_by_itself(wire: Wire) -> None:
    chain = saved(wire)
    lease_id = wire.lookup(SMALL, chain).lease_id
    request = pb.ExportLeaseRequest(client_id=wire.client_id, lease_id=lease_id, ttl_ms=2**32 - 1, adoptions=1)
    answer = wire.blocks.ExportLease(request)
    assert answer.ttl_ms == wire.capabilities().max_lease_ttl_ms
    assert 0 < len(answer.ticket) <= 256
    wire.release(lease_id)
    assert evict(wire, chain, DRAM) == pb.EvictResponse(held=3)
    adopted = adopt(wire, answer.ticket)
    wire.release(adopted.lease_id)
    assert evict(wire, chain, DRAM) == pb.EvictResponse(evicted=3)
    changes: list[dict[str, int]] = [{"ttl_ms": 0}, {"adoptions": 0}, {"adoptions": 4097}]
    for change in changes:
        wrong: dict[str, Any] = {
            "client_id": wire.client_id,
            "lease_id": lease_id,
            "ttl_ms": 1000,
            "adoptions": 1,
            **change,
        }
        (field,) = change
        with refused(InvalidRequest, field, field=field):
            wire.blocks.ExportLease(pb.ExportLeaseRequest(**wrong))
    with refused(LeaseExpired, "look the prefix up again"):
        wire.blocks.ExportLease(request)


def adopt(wire: Wire, ticket: bytes, **fields: Any) -> pb.AdoptLeaseResponse:
    given: dict[str, Any] = {"client_id": wire.client_id, "layout_fingerprint": SMALL.fingerprint}
    given |= {"lease_ttl_ms": 20_000, **fields}
    answer: pb.AdoptLeaseResponse = wire.blocks.AdoptLease(pb.AdoptLeaseRequest(ticket=ticket, **given))
    return answer


def test_AdoptLease_gives_another_client_a_lease_on_the_same_blocks(wire: Wire, daemon: DaemonProcess) -> None:
    chain = saved(wire, 3)
    evict(wire, chain[1:2], DRAM)
    promoted = wire.status().counters["promoted_blocks"]
    with Wire(daemon.address) as scheduler:
        scheduler.attach("scheduler")
        lease_id = scheduler.lookup(SMALL, chain).lease_id
        export = pb.ExportLeaseRequest(client_id=scheduler.client_id, lease_id=lease_id, ttl_ms=20_000, adoptions=2)
        ticket = scheduler.blocks.ExportLease(export).ticket
        with refused(LeaseNotYours, "another client"):
            wire.load(lease_id)
    with refused(InvalidRequest, "lease_ttl_ms", field="lease_ttl_ms"):
        adopt(wire, ticket, lease_ttl_ms=0)
    with refused(InvalidRequest, "is not within", field="shard"):
        adopt(wire, ticket, shard=Shard(0, 9, 0, 1).to_proto())
    with refused(TicketForged, "no lease ticket"):
        adopt(wire, ticket[:-1])
    with refused(TicketLayoutMismatch, "is for the layout"):
        adopt(wire, ticket, layout_fingerprint=bytes(32))
    with refused(UnknownClient, "attach"):
        adopt(wire, ticket, client_id=b"unknown")
    whole = adopt(wire, ticket)
    part = adopt(wire, ticket, shard=Shard(2, 4, 1, 2).to_proto(), lease_ttl_ms=2**32 - 1)
    assert (list(whole.token_counts), whole.lease_ttl_ms) == ([SMALL.block_tokens] * 3, 20_000)
    assert part.lease_ttl_ms == wire.capabilities().max_lease_ttl_ms
    assert sum(run.count for run in whole.runs) == 3
    assert all(run.ssd for run in whole.runs)
    until(lambda: wire.status().counters["promoted_blocks"] > promoted)  # Since the export, before any load.
    assert [frame.payload for frame in wire.load(part.lease_id)] == [
        b"".join(heads_of(key, layer, 1, 2) for key in chain) for layer in (2, 3)
    ]
    with refused(TicketSpent, "as often as"):
        adopt(wire, ticket)


def test_RenewLease_keeps_a_lease_that_would_have_ended(wire: Wire) -> None:
    chain = saved(wire)
    renewed, left = (wire.lookup(SMALL, chain, ttl_ms=300).lease_id for _ in range(2))
    leases = wire.status().leases

    assert wire.renew(renewed, ttl_ms=20_000).ttl_ms == 20_000
    until(lambda: wire.status().leases < leases)
    assert len(wire.load(renewed)) == SMALL.layers
    with refused(LeaseExpired, "look the prefix up again"):
        wire.load(left)


def test_ReleaseLease_lets_blocks_go_and_may_come_twice(wire: Wire) -> None:
    chain = saved(wire)
    lease_id = wire.lookup(SMALL, chain).lease_id
    assert evict(wire, chain, DRAM) == pb.EvictResponse(held=3)

    wire.release(lease_id)
    assert evict(wire, chain, DRAM) == pb.EvictResponse(evicted=3)
    with refused(LeaseExpired, "the lease has ended"):
        wire.load(lease_id)
    wire.release(lease_id)


def test_Prefetch_brings_blocks_up_to_DRAM(wire: Wire) -> None:
    chain, stranger = saved(wire), new_chain(SMALL)
    evict(wire, chain[1:], DRAM)

    request = pb.PrefetchRequest(keys=chain.packed_keys + stranger.packed_keys, wait=True)
    assert wire.blocks.Prefetch(request) == pb.PrefetchResponse(missing=1, in_dram=1, promoted=2)
    assert residency(wire, chain) == [(3, True, True)]

    evict(wire, chain, DRAM)
    request = pb.PrefetchRequest(keys=chain.packed_keys, deadline_ms=100)
    assert wire.blocks.Prefetch(request) == pb.PrefetchResponse(promoted=3)
    until(lambda: residency(wire, chain) == [(3, True, True)])
    assert wire.has(SMALL, chain)


def test_Evict_drops_copies_from_one_tier_only(wire: Wire) -> None:
    chain = saved(wire)

    assert evict(wire, chain[:2], DRAM) == pb.EvictResponse(evicted=2)
    assert evict(wire, chain, DRAM) == pb.EvictResponse(evicted=1, missing=2)
    assert residency(wire, chain) == [(3, False, True)]
    assert wire.has(SMALL, chain)

    until(lambda: residency(wire, chain) == [(3, True, True)])
    assert evict(wire, chain, SSD) == pb.EvictResponse(evicted=3)
    assert wire.has(SMALL, chain)
    assert evict(wire, chain[2:], DRAM) == pb.EvictResponse(evicted=1)
    assert wire.lookup(SMALL, chain).hit_blocks == 2
    with refused(BlockNotFound, "nothing is stored under"):
        wire.admin.Inspect(admin_pb2.InspectRequest(key=chain.keys[2]))


def test_Prefetch_and_Evict_take_sessions_beside_keys(wire: Wire) -> None:
    chain, more = saved(wire), saved(wire)
    wire.append("moved", SMALL, chain)

    def named(*session_ids: str) -> list[types_pb2.SessionName]:
        return [types_pb2.SessionName(session_id=each, layout_fingerprint=SMALL.fingerprint) for each in session_ids]

    request = pb.EvictRequest(sessions=named("moved", "unknown"), keys=more.packed_keys, tier=DRAM)
    assert wire.blocks.Evict(request) == pb.EvictResponse(evicted=6, missing_sessions=1)
    wanted = pb.PrefetchRequest(sessions=named("moved"), wait=True)
    assert wire.blocks.Prefetch(wanted) == pb.PrefetchResponse(promoted=3)
    assert residency(wire, chain) == [(3, True, True)]
    assert residency(wire, more) == [(3, False, True)]

    other_layout = [types_pb2.SessionName(session_id="moved", layout_fingerprint=bytes(32))]
    assert wire.blocks.Prefetch(pb.PrefetchRequest(sessions=other_layout)) == pb.PrefetchResponse(missing_sessions=1)
    for request_of in (pb.PrefetchRequest, partial(pb.EvictRequest, tier=DRAM)):
        call = wire.blocks.Prefetch if request_of is pb.PrefetchRequest else wire.blocks.Evict
        with refused(InvalidRequest, "65 sessions are named; at most 64", field="sessions"):
            call(request_of(sessions=named("moved") * 65))
        with refused(InvalidRequest, "is not a session id", field="session_id"):
            call(request_of(sessions=named("not valid")))
        with refused(InvalidRequest, "keys has 0 bytes", field="keys"):
            call(request_of())


def test_SaveBlocks_takes_frames_in_any_order_and_of_any_size(wire: Wire) -> None:
    chain, size = new_chain(SMALL, 2), slice_bytes(SMALL)
    upload = Upload.of(wire, SMALL, chain)
    upload.frames = []
    for layer in range(SMALL.layers):
        whole = b"".join(slice_of(key, layer, size).tobytes() for key in chain)
        for start in range(0, len(whole), 1000):  # Also across the boundary between the blocks.
            block, offset = divmod(start, size)
            payload = whole[start : start + 1000]
            upload.frames.append(
                pb.SaveBlocksRequest(layer=layer, first_block=block, first_offset_bytes=offset, payload=payload)
            )
    upload.frames.reverse()

    assert wire.save(upload.messages()).stored == 2
    assert wire.has(SMALL, chain)


def test_ReportRequest_appears_in_Explain_once_with_or_without_a_lookup(wire: Wire) -> None:
    report = pb.RequestReport(
        report_id=7,
        request_id="reported",
        client_name="engine",
        ago_ms=5000,
        plan=pb.REQUEST_PLAN_MIXED,
        plan_reason="both at once",
        outcome=pb.REQUEST_OUTCOME_FAILED_OVER,
        outcome_reason="DEADLINE_EXCEEDED",
        history_tokens=1000,
        new_tokens=40,
        loaded_tokens=488,
        computed_tokens=512,
        loaded_bytes=2**20,
        tier="ssd",
        transport="shm",
        estimates=pb.PlanEstimates(load_ms=900, mixed_ms=0),
        times=pb.RequestTimes(lookup_ms=0.5, first_token_ms=700),
    )
    for _ in range(2):
        wire.blocks.ReportRequest(pb.ReportRequestRequest(report=report))
    answer = wire.admin.Explain(admin_pb2.ExplainRequest(request_id="reported")).request
    (explained,) = answer.reports
    report.ago_ms = 0
    assert explained.report == report
    assert 4 <= time.time() - explained.at.seconds <= 60
    assert not answer.lookups
    assert not explained.report.estimates.HasField("recompute_ms"), "an unknown estimate is not 0"


def test_GetGeneration_returns_the_layouts_number(wire: Wire) -> None:
    request = pb.GetGenerationRequest(layout_fingerprint=SMALL.fingerprint)
    begun = wire.blocks.BeginGeneration(pb.BeginGenerationRequest(layout_fingerprint=SMALL.fingerprint)).generation
    assert wire.blocks.GetGeneration(request).generation == begun
    assert wire.capabilities().keeps_generations
    with refused(UnknownLayout, "was opened here"):
        wire.blocks.GetGeneration(pb.GetGenerationRequest(layout_fingerprint=bytes(32)))


def test_BeginGeneration_returns_a_number_that_was_never_used(wire: Wire) -> None:
    request = pb.BeginGenerationRequest(layout_fingerprint=SMALL.fingerprint)
    assert len({0, *(wire.blocks.BeginGeneration(request).generation for _ in range(5))}) == 6
    with refused(UnknownLayout, "was opened here"):
        wire.blocks.BeginGeneration(pb.BeginGenerationRequest(layout_fingerprint=bytes(32)))
