"""Every RPC of AdminService, called over the wire: each test is named after one, and checks its effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvservice_api.errors import BlockNotFound, Draining, InvalidRequest, PinsFull, RequestNotFound
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import blocks_pb2, types_pb2
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain
from tests.integration.wire import Upload, Wire, refused

SERVICE = "AdminService"
DRAM, SSD = types_pb2.TIER_DRAM, types_pb2.TIER_SSD


@pytest.fixture
def wire(wire: Wire) -> Wire:
    """A client of a daemon that holds no block."""
    wire.admin.Discard(pb.DiscardRequest(everything=True))
    wire.called.clear()
    return wire


def saved(wire: Wire, blocks: int = 3, layout: Layout = SMALL) -> BlockChain:
    """A new chain in both tiers."""
    chain = new_chain(layout, blocks)
    assert wire.save(Upload.of(wire, layout, chain, types_pb2.DURABILITY_SSD).messages()).stored == blocks
    return chain


def evict_from_dram(wire: Wire, chain: BlockChain) -> None:
    wire.blocks.Evict(blocks_pb2.EvictRequest(keys=chain.packed_keys, tier=DRAM))


def test_Status_tells_what_is_held_and_what_was_done(wire: Wire) -> None:
    before = wire.status()
    chain = saved(wire)
    evict_from_dram(wire, chain[:1])
    wire.lookup(SMALL, chain)

    status = wire.status()
    assert status.state == "serving"
    assert (status.blocks, status.dram.blocks, status.ssd.blocks) == (3, 2, 3)
    assert (status.clients, status.leases, status.uploads) == (before.clients, before.leases + 1, 0)
    assert status.dram.used_bytes * 3 == status.ssd.used_bytes * 2 > 0
    assert status.dram.used_bytes < status.dram.capacity_bytes
    assert status.counters["save_blocks_stored"] == before.counters["save_blocks_stored"] + 3
    assert status.counters["lookup_blocks_hit"] == before.counters["lookup_blocks_hit"] + 3
    assert 0 < status.index.durable_used_bytes < status.index.durable_map_bytes
    assert status.started_at == before.started_at


def test_ListBlocks_goes_through_all_blocks_page_by_page(wire: Wire) -> None:
    other = Layout("listed", "int8", layers=2, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=4)
    wire.open_layout(other)
    chain, others = saved(wire, 5), saved(wire, 2, other)
    evict_from_dram(wire, chain[:2])

    def listed(**filters: Any) -> list[set[bytes]]:
        pages, request = [], pb.ListBlocksRequest(page_size=3, **filters)
        while True:
            page = wire.admin.ListBlocks(request)
            pages.append({block.key for block in page.blocks})
            request.page_token = page.next_page_token
            if not request.page_token:
                return pages

    pages = listed()
    assert [len(page) for page in pages] == [3, 3, 1]
    assert set.union(*pages) == {*chain, *others}
    assert listed(layout_fingerprint=other.fingerprint) == [set(others)]
    assert set.union(*listed(tier=DRAM)) == {*chain[2:], *others}
    assert set.union(*listed(tier=SSD)) == {*chain, *others}


def test_ListBlocks_finds_keys_by_their_first_digits(wire: Wire) -> None:
    chain = saved(wire, 3)
    wanted = chain.keys[2].hex()
    for digits in (wanted, wanted[:11], wanted[:12].upper()):
        answer = wire.admin.ListBlocks(pb.ListBlocksRequest(key_prefix=digits))
        assert [block.key.hex() for block in answer.blocks] == [wanted]
    for digits in ("0" * 64, "f" * 17, "0"):
        assert (
            not wire.admin.ListBlocks(pb.ListBlocksRequest(key_prefix=digits, page_size=1)).blocks or len(digits) == 1
        )
    for digits in ("x", "0" * 65, "12 34", "-1"):
        with refused(InvalidRequest, "is not 1 to 64 hexadecimal digits", field="key_prefix"):
            wire.admin.ListBlocks(pb.ListBlocksRequest(key_prefix=digits))


def test_Explain_finds_a_block_that_is_gone_by_the_first_digits_of_its_key(wire: Wire) -> None:
    chain = saved(wire, 20)
    wanted = chain.keys[2]
    with refused(BlockNotFound, "the history remembers no block"):
        wire.admin.Explain(pb.ExplainRequest(key_prefix=wanted.hex()[:12]))
    wire.admin.Discard(pb.DiscardRequest(keys=b"".join(chain.keys)))
    for digits in (wanted.hex()[:12], wanted.hex().upper()):
        found = wire.admin.Explain(pb.ExplainRequest(key_prefix=digits)).block
        assert (found.key, found.miss.reason) == (wanted, pb.MISS_REASON_DISCARDED)
    first_digits = [key.hex()[0] for key in chain.keys]
    several = next(digit for digit in first_digits if first_digits.count(digit) > 1)  # 20 keys have 16 first digits.
    with refused(InvalidRequest, "more than one key in the history begins with", field="key_prefix"):
        wire.admin.Explain(pb.ExplainRequest(key_prefix=several))


def test_ListLayouts_tells_what_is_stored_of_each_page_by_page(wire: Wire) -> None:
    saved(wire, 2)
    first = wire.admin.ListLayouts(pb.ListLayoutsRequest(page_size=1))
    listed = list(first.layouts)
    while first.next_page_token:
        first = wire.admin.ListLayouts(pb.ListLayoutsRequest(page_size=1, page_token=first.next_page_token))
        listed += first.layouts
    (ours,) = [each for each in listed if each.fingerprint == SMALL.fingerprint]
    assert (Layout.from_proto(ours.layout), ours.blocks) == (SMALL, 2)
    assert len(listed) == wire.status().layouts
    with refused(InvalidRequest, "no such page token"):
        wire.admin.ListLayouts(pb.ListLayoutsRequest(page_token="1.0"))
    with refused(InvalidRequest, "page_size is 1001"):
        wire.admin.ListLayouts(pb.ListLayoutsRequest(page_size=1001))


def test_ListClients_tells_of_each_client_page_by_page(wire: Wire) -> None:
    chain = saved(wire)
    wire.lookup(SMALL, chain)
    listed = list(wire.admin.ListClients(pb.ListClientsRequest()).clients)
    assert len(listed) == wire.status().clients
    assert [each.number for each in listed] == sorted(each.number for each in listed)
    assert sum(each.leased_blocks for each in listed) >= 3
    assert all(each.attached_at.seconds > 0 for each in listed)
    page = wire.admin.ListClients(pb.ListClientsRequest(page_size=1))
    assert [each.number for each in page.clients] == [listed[0].number]
    with refused(InvalidRequest, "no such page token"):
        wire.admin.ListClients(pb.ListClientsRequest(page_token="x"))


def test_ListSessions_goes_through_all_sessions_page_by_page(wire: Wire) -> None:
    other = Layout("listed", "int8", layers=2, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=4)
    wire.open_layout(other)
    for number in range(5):
        wire.append(f"listed-{number}", SMALL, new_chain(SMALL, 2))
    wire.append("listed-0", other, new_chain(other, 1))

    def listed(**filters: Any) -> list[list[str]]:
        pages, request = [], pb.ListSessionsRequest(page_size=3, **filters)
        while True:
            page = wire.admin.ListSessions(request)
            pages.append([session.session_id for session in page.sessions])
            assert not any(session.HasField("slices") for session in page.sessions)
            request.page_token = page.next_page_token
            if not request.page_token:
                return pages

    assert listed() == [["listed-0", "listed-1", "listed-2"], ["listed-3", "listed-4", "listed-0"]]
    assert listed(session_id="listed-0") == [["listed-0", "listed-0"]]
    assert listed(layout_fingerprint=other.fingerprint) == [["listed-0"]]
    assert listed(session_id="unknown") == [[]]
    assert wire.status().sessions == 6
    for wrong in ({"page_size": 1001}, {"page_token": "1.2"}, {"layout_fingerprint": b"short"}):
        with refused(InvalidRequest, "page|32 bytes"):
            wire.admin.ListSessions(pb.ListSessionsRequest(**wrong))


def test_SetPolicy_shows_and_switches(wire: Wire) -> None:
    assert wire.admin.SetPolicy(pb.SetPolicyRequest()).policy == "foresight"
    answer = wire.admin.SetPolicy(pb.SetPolicyRequest(policy="s3fifo", shadow="fifo"))
    assert (answer.policy, answer.configured, answer.shadow.policy) == ("s3fifo", "foresight", "fifo")
    for wrong in ({"policy": "none"}, {"shadow": "unknown"}, {"policy": "lru", "shadow": "?"}):
        with refused(InvalidRequest, "choose among"):
            wire.admin.SetPolicy(pb.SetPolicyRequest(**wrong))
    answer = wire.admin.SetPolicy(pb.SetPolicyRequest(shadow="none"))
    assert (answer.policy, answer.HasField("shadow")) == ("s3fifo", False)
    wire.admin.SetPolicy(pb.SetPolicyRequest(policy="foresight"))


def test_Inspect_tells_all_about_one_block(wire: Wire) -> None:
    chain = saved(wire)
    evict_from_dram(wire, chain[1:2])
    wire.lookup(SMALL, chain)

    answer = wire.admin.Inspect(pb.InspectRequest(key=chain.keys[1]))
    assert answer.layout == SMALL.to_proto()
    [shard] = answer.shards
    assert (shard.key, shard.parent_key) == (chain.keys[1], chain.keys[0])
    assert shard.layout_fingerprint == SMALL.fingerprint
    assert (shard.shard.layer_end, shard.shard.head_end) == (SMALL.layers, SMALL.kv_heads)
    assert (shard.in_dram, shard.on_ssd, shard.hits, shard.leases) == (False, True, 1, 1)
    assert shard.size_bytes == 16 * 1024
    assert wire.status().started_at.seconds <= shard.stored_at.seconds <= shard.used_at.seconds


def test_Discard_forgets_by_key_by_layout_and_everything(wire: Wire) -> None:
    other = Layout("discarded", "int8", layers=2, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=4)
    wire.open_layout(other)
    chain, more, others = saved(wire, 4), saved(wire, 2), saved(wire, 2, other)

    keys = chain[2:].packed_keys + new_chain(SMALL).packed_keys
    assert wire.admin.Discard(pb.DiscardRequest(keys=keys)) == pb.DiscardResponse(discarded=2, missing=1)
    assert wire.lookup(SMALL, chain, ttl_ms=0).hit_blocks == 2

    answer = wire.admin.Discard(pb.DiscardRequest(layout_fingerprint=other.fingerprint))
    assert answer.discarded == 2
    with refused(BlockNotFound, others.keys[0].hex()):
        wire.admin.Inspect(pb.InspectRequest(key=others.keys[0]))
    assert wire.has(SMALL, more)

    assert wire.admin.Discard(pb.DiscardRequest(everything=True)).discarded == 4
    state = wire.state()
    assert state["blocks"] == state["DRAM bytes"] == state["SSD bytes"] == 0


def test_Discard_leaves_the_bytes_of_a_leased_block_in_place_until_its_lease_ends(wire: Wire) -> None:
    chain = saved(wire)
    lease_id = wire.lookup(SMALL, chain).lease_id
    used = wire.state()["DRAM bytes"]

    assert wire.admin.Discard(pb.DiscardRequest(keys=chain.packed_keys)).discarded == 3
    assert wire.lookup(SMALL, chain).hit_blocks == 0
    assert wire.state()["DRAM bytes"] == used
    assert len(wire.load(lease_id)) == SMALL.layers

    wire.release(lease_id)
    assert wire.state()["DRAM bytes"] == 0


def test_Scrub_reads_every_copy_of_the_tiers_in_the_request(wire: Wire) -> None:
    chain = saved(wire, 4)
    evict_from_dram(wire, chain[:1])
    before = wire.status().counters["scrubbed_bytes"]

    def scrub(**how: Any) -> pb.ScrubResponse:
        *_, last = wire.admin.Scrub(pb.ScrubRequest(**how))
        assert isinstance(last, pb.ScrubResponse)
        return last

    both = scrub()
    assert (both.blocks_total, both.blocks_checked, both.damaged, both.done) == (7, 7, 0, True)
    assert scrub(tier=DRAM).blocks_checked == 3
    assert scrub(tier=SSD, bytes_per_second=2**30).blocks_checked == 4
    assert wire.status().counters["scrubbed_bytes"] == before + 2 * both.bytes_checked


def test_RecordTrace_tells_the_turns_that_end(wire: Wire) -> None:
    steps = iter(wire.admin.RecordTrace(pb.RecordTraceRequest(duration_ms=30_000)))
    assert not next(steps).turns
    assert wire.status().recordings == 1
    chain = saved(wire)

    step = next(each for each in steps if each.turns)
    assert step.layout.layout_fingerprint == SMALL.fingerprint
    assert (step.layout.block_tokens, step.layout.kv_bytes_per_token) == (SMALL.block_tokens, 1024)
    (turn,) = step.turns
    assert (turn.prompt_tokens, turn.answer_tokens) == (len(chain) * SMALL.block_tokens, 0)
    assert len(turn.hash_ids) == len(chain)
    steps.cancel()
    with refused(InvalidRequest, "duration_ms"):
        next(wire.admin.RecordTrace(pb.RecordTraceRequest()))


def test_Pin_keeps_blocks_from_leaving_and_says_until_when(wire: Wire) -> None:
    chain = saved(wire)
    keys = chain[:2].packed_keys + new_chain(SMALL).packed_keys
    answer = wire.admin.Pin(pb.PinRequest(keys=keys, ttl_ms=60_000))
    assert (answer.pinned, answer.missing) == (2, 1)
    assert answer.pinned_bytes == 2 * 16 * 1024 < answer.pinned_bytes_max
    shown = [wire.admin.Inspect(pb.InspectRequest(key=key)).shards[0] for key in chain]
    assert [shard.pinned_until == answer.pinned_until for shard in shown] == [True, True, False]
    assert 0 < answer.pinned_until.seconds - shown[0].stored_at.seconds <= 61

    evict = blocks_pb2.EvictRequest(keys=chain.packed_keys, tier=SSD)
    assert wire.blocks.Evict(evict) == blocks_pb2.EvictResponse(evicted=1, held=2)
    assert wire.has(SMALL, chain)


def test_Pin_refuses_what_makes_no_sense(wire: Wire) -> None:
    chain = saved(wire)
    before = wire.state()
    for ttl_ms in (0, 30 * 86_400_000 + 1, 2**64 - 1):
        with refused(InvalidRequest, "more than 0 s, and at most 2592000 s", field="ttl_ms"):
            wire.admin.Pin(pb.PinRequest(keys=chain.packed_keys, ttl_ms=ttl_ms))
    for keys, message in ((b"", "keys of 32"), (b"x" * 31, "keys of 32"), (bytes(32 * 4097), "4096")):
        with refused(InvalidRequest, message, field="keys"):
            wire.admin.Pin(pb.PinRequest(keys=keys, ttl_ms=1000))
    assert wire.state() == before
    assert not wire.admin.Inspect(pb.InspectRequest(key=chain.keys[0])).shards[0].HasField("pinned_until")


def test_Pin_refuses_more_than_the_share_of_pins(new_daemon: Callable[..., DaemonProcess], wire: Wire) -> None:
    wire.admin.Pin(pb.PinRequest(keys=saved(wire).packed_keys, ttl_ms=1000))
    with Wire(new_daemon(pins__fraction_max=0).address) as other:
        other.attach()
        other.open_layout(SMALL)
        with refused(PinsFull, "may take 0"):
            other.admin.Pin(pb.PinRequest(keys=saved(other).packed_keys, ttl_ms=1000))


def test_Unpin_ends_pins_and_counts_the_rest(wire: Wire) -> None:
    chain = saved(wire)
    wire.admin.Pin(pb.PinRequest(keys=chain[:2].packed_keys, ttl_ms=60_000))
    keys = chain[1:].packed_keys + new_chain(SMALL).packed_keys
    assert wire.admin.Unpin(pb.UnpinRequest(keys=keys)) == pb.UnpinResponse(unpinned=1, not_pinned=1, missing=1)
    assert wire.blocks.Evict(blocks_pb2.EvictRequest(keys=chain.packed_keys, tier=SSD)).held == 1
    with refused(InvalidRequest, "keys of 32", field="keys"):
        wire.admin.Unpin(pb.UnpinRequest(keys=b"x"))


def test_Explain_answers_what_it_is_asked(wire: Wire) -> None:
    chain = saved(wire)
    wire.blocks.LookupPrefix(
        blocks_pb2.LookupPrefixRequest(
            layout_fingerprint=SMALL.fingerprint, keys=chain.packed_keys, request_id="request"
        )
    )
    block = wire.admin.Explain(pb.ExplainRequest(key=chain.keys[0]))
    assert block.HasField("block")
    assert not block.HasField("request")
    assert [shard.block.key for shard in block.block.shards] == [chain.keys[0]]
    request = wire.admin.Explain(pb.ExplainRequest(request_id="request"))
    assert not request.HasField("block")
    assert [lookup.hit_blocks for lookup in request.request.lookups] == [3]
    assert request.request.lookups[0].client_name == ""

    with refused(InvalidRequest, "exactly one"):
        wire.admin.Explain(pb.ExplainRequest())
    with refused(InvalidRequest, "exactly one"):
        wire.admin.Explain(pb.ExplainRequest(key=chain.keys[0], request_id="request"))
    with refused(InvalidRequest, "32 bytes, not 31", field="key"):
        wire.admin.Explain(pb.ExplainRequest(key=bytes(31)))
    with refused(RequestNotFound, "'another'", request_id="another"):
        wire.admin.Explain(pb.ExplainRequest(request_id="another"))


def test_Drain_refuses_saves_until_it_is_undone_and_serves_loads_meanwhile(wire: Wire) -> None:
    chain = new_chain(SMALL, 3)
    assert wire.save(Upload.of(wire, SMALL, chain).messages()).stored == 3
    upload = Upload.of(wire, SMALL, new_chain(SMALL))
    *_, last = wire.admin.Drain(pb.DrainRequest(action=pb.DRAIN_ACTION_BEGIN))
    assert (last.done, last.blocks_only_in_dram, last.unwritten) == (True, 0, 0)
    assert wire.state()["blocks on SSD"] == 3
    assert wire.status().state == "draining"
    with refused(Draining, "draining"):
        wire.save(upload.messages())
    assert wire.has(SMALL, chain)

    assert len(list(wire.admin.Drain(pb.DrainRequest(action=pb.DRAIN_ACTION_UNDO)))) == 1
    assert wire.status().state == "serving"
    assert wire.save(upload.messages()).stored == 1
    with refused(InvalidRequest, "DRAIN_ACTION_BEGIN", field="action"):
        list(wire.admin.Drain(pb.DrainRequest()))
    assert wire.status().state == "serving"
