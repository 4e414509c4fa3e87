"""The save path: frames in any order, everything or nothing, and what is refused."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import TierName
from kvservice.store.leases import Client
from kvservice.store.transfers import frame_writer
from kvservice.store.transfers.arrived_slices import ArrivedSlices
from kvservice.store.transfers.save_request import SaveOutcome
from kvservice.store.types import SaveChain
from kvservice_api.copying import copy_slices
from kvservice_api.errors import (
    Draining,
    IncompleteSave,
    InvalidFrame,
    InvalidRequest,
    KVError,
    StorageFailed,
    TierFull,
    UnknownClient,
    UnknownLayout,
    UploadCorrupted,
)
from kvservice_api.frames import Frame
from kvservice_api.image import BlockGeometry, block_geometry
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from tests.file_faults import FaultyCalls
from tests.stores import (
    CALLER,
    KIB,
    LAYOUT,
    MIB,
    PATIENT,
    WHOLE,
    OpenStore,
    caller_of,
    checksums_of,
    frames_of,
    header_of,
    layers_of,
    some_chain,
    some_images,
    until,
)

SLICE = block_geometry(LAYOUT, WHOLE, 16).slice_bytes(0)
BLOCK = 12 * KIB
HEADER = 4 * KIB


async def loaded(opened: OpenStore, client: Client, chain: BlockChain) -> list[bytes]:
    lease = opened.lookup(client, chain.keys)
    assert lease is not None and len(lease.rows) == len(chain)
    try:
        return await opened.load(lease)
    finally:
        opened.leases.begin_release(caller_of(client), lease.lease_id)


async def nothing_left(opened: OpenStore, used_before: int = 0) -> None:
    assert not opened.claims.object_count
    assert not opened.uploading()
    await until(lambda: opened.dram.used_bytes == used_before)


# Frames


@given(st.data())
def test_a_slice_is_complete_once_every_byte_has_arrived_in_any_order(data: st.DataObject) -> None:
    slices = ArrivedSlices(block_geometry(LAYOUT, WHOLE, 16))
    cuts = sorted({0, SLICE, *data.draw(st.lists(st.integers(1, SLICE - 1), max_size=12))})
    parts = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    arrived = np.zeros(SLICE, np.bool_)
    for number, (start, end) in enumerate(parts):
        complete = slices.add(1, start, end)
        arrived[start:end] = True
        assert complete == (number == len(parts) - 1)
        again = data.draw(st.integers(0, SLICE - 1))
        if arrived[again]:  # A frame that repeats a received byte is refused, and changes nothing.
            with pytest.raises(InvalidFrame):
                slices.add(1, data.draw(st.integers(0, again)), data.draw(st.integers(again + 1, SLICE)))
    assert slices.missing == 1


def test_a_slice_that_came_whole_leaves_no_object_behind() -> None:
    """A save may have tens of thousands, and freeing them in one iteration would block the event loop."""
    slices = ArrivedSlices(block_geometry(LAYOUT, WHOLE, 16))
    assert slices.add(0, 0, SLICE)
    assert not slices.add(1, 0, 100) and slices._partial
    assert slices.add(1, 100, SLICE)
    assert not slices._partial and not slices.missing
    with pytest.raises(InvalidFrame):
        slices.add(0, 0, SLICE)
    with pytest.raises(InvalidFrame):
        slices.add(1, 5, 6)


def test_a_slice_that_arrives_with_too_many_gaps_is_refused() -> None:
    """Otherwise each second byte of it would cost a hundred bytes of memory."""
    slices = ArrivedSlices(block_geometry(LAYOUT, WHOLE, 16))
    for start in range(0, 34, 2):
        slices.add(0, start, start + 1)
    with pytest.raises(InvalidFrame, match="gaps"):
        slices.add(0, 34, 35)
    assert not slices.add(0, 33, 34), "what fills a gap is welcome"


async def test_a_save_of_many_blocks_lets_the_event_loop_go_round_while_it_reserves(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * MIB)
    chain, turns = some_chain(250), 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    async with opened.begin_save(opened.store.leases.attach(CALLER, "test"), chain):
        counting.cancel()
    assert turns >= 2


async def test_many_blocks_become_visible_in_several_turns_and_all_of_them_if_the_save_is_cancelled_meanwhile(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=4 * MIB)
    blocks, client, chain = opened.blocks, opened.store.leases.attach(CALLER, "test"), some_chain(100)
    images, visible_after_a_turn = some_images(chain), list[int]()
    async with opened.begin_save(client, chain) as upload:
        for frame in frames_of(LAYOUT, WHOLE, chain, images):
            upload.write(frame)
        committing = asyncio.ensure_future(upload.commit(checksums_of(WHOLE, images), on_ssd=False))

        def note(row: int) -> None:
            if blocks.live[row] and not visible_after_a_turn and committing.cancel():
                asyncio.get_running_loop().call_soon(lambda: visible_after_a_turn.append(blocks.live_count))

        blocks.listeners.append(note)
        with pytest.raises(asyncio.CancelledError):
            await committing

    assert 0 < visible_after_a_turn[0] < 100
    assert blocks.live_count == 100, "records name the extents of all of them"
    assert await loaded(opened, client, chain) == layers_of(images)
    await opened.settle()
    assert len(opened.extents(TierName.SSD)) == 100, "they are copied as those of any other save"
    assert (opened.counters.save_blocks_stored, opened.counters.saves_abandoned) == (100, 0)


async def test_a_block_that_is_discarded_while_others_of_its_save_become_visible_leaves_its_row_once(
    open_store: Callable[..., Any],
) -> None:
    """The save waits for the SSD copies of all. A row that is free twice would get two blocks."""
    opened: OpenStore = await open_store(dram_bytes=4 * MIB)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(250)
    discarding: list[asyncio.Task[None]] = []

    def discard(row: int) -> None:
        if opened.blocks.live[row] and not discarding:
            discarding.append(asyncio.get_running_loop().create_task(opened.block_lifecycle.discard([row])))
        elif discarding:
            time.sleep(0.0003)  # The record is deleted before the last block is visible.

    opened.blocks.listeners.append(discard)
    outcome = await opened.save(client, chain, some_images(chain), on_ssd=True)
    opened.blocks.listeners.remove(discard)
    await discarding[0]
    assert list(outcome.refused) == [0]

    others = [(some_chain(1, seed=seed), seed) for seed in (1, 2)]
    for other, seed in others:
        await opened.save(client, other, some_images(other, seed=seed))
    for other, seed in others:
        assert await loaded(opened, client, other) == layers_of(some_images(other, seed=seed))


async def test_the_bytes_of_a_save_are_counted_by_the_sizes_of_its_blocks(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, 256 blocks of 128 layers would take six milliseconds of the event loop."""
    chain = some_chain(20, tail_tokens=3)
    images = some_images(chain)
    summed = list[BlockGeometry]()
    payload_bytes: Any = BlockGeometry.payload_bytes

    def counted(geometry: BlockGeometry) -> int:
        summed.append(geometry)
        return int(payload_bytes.fget(geometry))

    monkeypatch.setattr(BlockGeometry, "payload_bytes", property(counted))
    await opened.save(client, chain, images)
    assert opened.counters.save_bytes == sum(map(len, images))
    assert len(summed) == 2


async def test_each_block_of_a_save_is_compared_with_its_own_checksums(opened: OpenStore, client: Client) -> None:
    chain = some_chain(5)
    images = some_images(chain)
    checksums = checksums_of(WHOLE, images)
    checksums[[2 * 1 + 1, 2 * 3]] += np.uint64(1)  # Layer 1 of block 1, and layer 0 of block 3.
    async with opened.begin_save(client, chain) as upload:
        for frame in frames_of(LAYOUT, WHOLE, chain, images):
            upload.write(frame)
        outcome = await upload.commit(checksums, on_ssd=False)
    assert outcome.stored == [0, 2, 4]
    assert {block: error.details["layer"] for block, error in outcome.refused.items()} == {1: "1", 3: "0"}


async def test_a_save_may_come_in_any_order_and_in_frames_of_any_size(opened: OpenStore, client: Client) -> None:
    for seed, frame_bytes in enumerate((1, 700, 4096, 5000, 1 << 20)):
        chain = some_chain(2 if frame_bytes == 1 else 5, seed=seed, tail_tokens=3)
        images = some_images(chain, seed=seed)
        frames = frames_of(LAYOUT, WHOLE, chain, images, frame_bytes=frame_bytes)
        if frame_bytes > 1:  # Single bytes would have too many gaps.
            np.random.default_rng(seed).shuffle(frames)
        async with opened.begin_save(client, chain) as upload:
            for frame in frames:
                upload.write(frame)
            outcome = await upload.commit(checksums_of(WHOLE, images), on_ssd=False)
        assert outcome.stored == list(range(len(chain)))
        assert await loaded(opened, client, chain) == layers_of(images)


def frame(layer: int, block: int, offset: int, size: int) -> Frame:
    return Frame(layer, block, offset, memoryview(bytes(size)))


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([frame(2, 0, 0, 10)], "outside the save"),
        ([frame(0, 3, 0, 10)], "outside the save"),
        ([frame(2**32 - 1, 0, 0, 10)], "outside the save"),
        ([frame(0, 0, SLICE, 10)], "starts after"),
        ([frame(0, 0, 2**63, 10)], "starts after"),
        ([frame(0, 0, 0, 0)], "empty"),
        ([frame(0, 2, SLICE - 9, 10)], "beyond the last block"),
        ([frame(0, 0, 0, 3 * SLICE + 1)], "beyond the last block"),
        ([frame(0, 0, 0, 10), frame(0, 0, 0, 10)], "arrived before"),
        ([frame(0, 0, 0, 10), frame(0, 0, 9, 10)], "arrived before"),
        ([frame(0, 0, 50, 10), frame(0, 0, 45, 10)], "arrived before"),
        ([frame(0, 0, 50, 10), frame(0, 0, 0, 100)], "arrived before"),
        ([frame(0, 1, 0, SLICE), frame(0, 0, SLICE - 1, 2)], "arrived before"),
    ],
)
async def test_a_frame_that_is_out_of_range_or_overlaps_ends_the_save_and_nothing_is_kept(
    opened: OpenStore, client: Client, frames: list[Frame], reason: str
) -> None:
    chain = some_chain(3)

    async def save() -> None:
        async with opened.begin_save(client, chain) as upload:
            for each in frames:
                upload.write(each)

    with pytest.raises(InvalidFrame, match=reason):
        await save()
    await nothing_left(opened)
    assert opened.hits(chain.keys) == 0
    assert opened.counters.saves_abandoned == 1


async def test_a_block_of_another_layout_under_the_same_key_does_not_count_as_stored(
    opened: OpenStore, client: Client
) -> None:
    """Keys contain their layout's fingerprint, except keys that a client made in another way."""
    chain, images, other = some_chain(2), some_images(some_chain(2)), replace(LAYOUT, model_revision="other")
    await opened.store.layouts.open(CALLER, other)
    await opened.save(client, chain, images)

    outcome = await opened.save(client, chain, images, layout=other)
    assert (outcome.stored, outcome.already_stored) == ([], [])
    assert [(type(error), error.details["field"]) for error in outcome.refused.values()] == [
        (InvalidRequest, "keys")
    ] * 2
    assert opened.hits(chain.keys, layout=other) == 0
    assert await loaded(opened, client, chain) == layers_of(images)

    part = Shard(0, 1, 0, LAYOUT.kv_heads)  # The first save's blocks have its layers and heads, of their own layout.
    first_layers = some_images(chain, shard=part, layout=other)
    outcome = await opened.save(client, chain, first_layers, shard=part, layout=other)
    assert (outcome.stored, outcome.already_stored) == ([0, 1], [])
    assert opened.hits(chain.keys, layout=other, shard=part) == 2
    assert await loaded(opened, client, chain) == layers_of(images)


async def test_a_save_that_waited_for_one_of_another_layout_is_refused(opened: OpenStore, client: Client) -> None:
    chain, images, other = some_chain(1), some_images(some_chain(1)), replace(LAYOUT, model_revision="other")
    await opened.store.layouts.open(CALLER, other)
    async with opened.begin_save(client, chain) as first:
        second = asyncio.create_task(opened.save(client, chain, images, layout=other))
        await until(lambda: opened.claims.waiting_for(chain.keys[0]) == 2)
        for frame in frames_of(LAYOUT, WHOLE, chain, images):
            first.write(frame)
        await first.commit(checksums_of(WHOLE, images), on_ssd=False)
    outcome = await second
    assert not outcome.already_stored and isinstance(outcome.refused[0], InvalidRequest)
    await nothing_left(opened, used_before=BLOCK)


async def test_bytes_of_blocks_that_are_stored_already_are_not_looked_at(opened: OpenStore, client: Client) -> None:
    chain, images = some_chain(3), some_images(some_chain(3))
    await opened.save(client, chain[:2], images[:2])
    outcome = await opened.save(client, chain, [b"x" * len(image) for image in images[:2]] + images[2:])
    assert (outcome.stored, outcome.already_stored) == ([2], [0, 1])
    assert await loaded(opened, client, chain) == layers_of(images)


# Commits


async def commit(
    opened: OpenStore, client: Client, chain: BlockChain, frames: list[Frame], checksums: np.ndarray[Any, Any]
) -> SaveOutcome:
    async with opened.begin_save(client, chain) as upload:
        for each in frames:
            upload.write(each)
        return await upload.commit(checksums, on_ssd=False)


async def test_a_commit_before_all_bytes_came_stores_nothing(opened: OpenStore, client: Client) -> None:
    chain, images = some_chain(2), some_images(some_chain(2))
    frames, checksums = frames_of(LAYOUT, WHOLE, chain, images), checksums_of(WHOLE, images)
    for some in ([], frames[:-1], frames[1:], frames[:1]):
        with pytest.raises(IncompleteSave):
            await commit(opened, client, chain, some, checksums)
        await nothing_left(opened)
    assert opened.hits(chain.keys) == 0


async def test_a_commit_with_too_few_or_too_many_checksums_stores_nothing(opened: OpenStore, client: Client) -> None:
    chain, images = some_chain(2), some_images(some_chain(2))
    checksums = checksums_of(WHOLE, images)
    for wrong in (checksums[:-1], np.append(checksums, checksums[:1]), checksums[:0]):
        with pytest.raises(InvalidRequest, match="checksums"):
            await commit(opened, client, chain, frames_of(LAYOUT, WHOLE, chain, images), wrong)
    await nothing_left(opened)


async def test_a_block_that_does_not_match_its_checksums_is_refused_and_the_others_are_stored(
    opened: OpenStore, client: Client
) -> None:
    chain, images = some_chain(3), some_images(some_chain(3))
    checksums = checksums_of(WHOLE, images)
    checksums[3] ^= np.uint64(1)  # Layer 1 of block 1.
    outcome = await commit(opened, client, chain, frames_of(LAYOUT, WHOLE, chain, images), checksums)
    assert outcome.stored == [0, 2]
    assert isinstance(outcome.refused[1], UploadCorrupted) and "layer 1 of block 1" in outcome.refused[1].message
    assert opened.hits(chain.keys) == 1
    await nothing_left(opened, 2 * BLOCK)


async def test_a_second_commit_is_refused_while_the_first_one_runs_and_after_it(
    opened: OpenStore, client: Client
) -> None:
    chain, images = some_chain(1), some_images(some_chain(1))
    checksums = checksums_of(WHOLE, images)
    async with opened.begin_save(client, chain) as upload:
        for each in frames_of(LAYOUT, WHOLE, chain, images):
            upload.write(each)
        with opened.commits_held(TierName.DRAM):
            first = asyncio.create_task(upload.commit(checksums, on_ssd=False))
            await asyncio.sleep(0)
            with pytest.raises(IncompleteSave):
                await upload.commit(checksums, on_ssd=False)
        assert (await first).stored == [0]
        with pytest.raises(IncompleteSave):
            await upload.commit(checksums, on_ssd=False)
    assert opened.hits(chain.keys) == 1
    await opened.settle()


async def test_slices_too_large_to_be_hashed_at_once_are_hashed_on_threads(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(dram_bytes=8 * MIB, ssd_bytes=16 * MIB)
    client = opened.store.leases.attach(CALLER, "test")
    layout = Layout(
        model_id="large", dtype="float32", layers=2, kv_heads=1, k_head_dim=8192, v_head_dim=8192, block_tokens=17
    )
    await opened.store.layouts.open(CALLER, layout)
    chain, shard = some_chain(1, layout=layout), Shard.whole(layout)
    images = some_images(chain, shard=shard, layout=layout)
    assert len(images[0]) > 2 * MIB
    checksums = checksums_of(shard, images)
    for wrong, stored in ((1, []), (0, [0])):
        async with opened.begin_save(client, chain, shard=shard, layout=layout) as upload:
            for each in frames_of(layout, shard, chain, images, frame_bytes=1 << 20):
                upload.write(each)
            outcome = await upload.commit(checksums ^ np.uint64(wrong), on_ssd=False)
        assert outcome.stored == stored


async def test_only_the_blocks_of_a_large_save_are_written_past_the_processors_caches(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed: list[bool] = []

    def noting(*arguments: Any, **options: Any) -> Any:
        streamed.append(options["streamed"])
        return copy_slices(*arguments, **options)

    monkeypatch.setattr(frame_writer, "copy_slices", noting)
    opened: OpenStore = await open_store(dram_bytes=32 * MIB, ssd_bytes=64 * MIB)
    client = opened.store.leases.attach(CALLER, "test")
    layout = Layout(
        model_id="wide", dtype="uint8", layers=4, kv_heads=1, k_head_dim=8192, v_head_dim=8192, block_tokens=16
    )
    await opened.store.layouts.open(CALLER, layout)
    shard = Shard.whole(layout)
    for blocks, is_large in ((1, False), (9, True)):
        chain = some_chain(blocks, seed=blocks, layout=layout)
        images = some_images(chain, shard=shard, layout=layout)
        async with opened.begin_save(client, chain, shard=shard, layout=layout) as upload:
            for each in frames_of(layout, shard, chain, images, frame_bytes=1 << 20):
                upload.write(each)
            outcome = await upload.commit(checksums_of(shard, images), on_ssd=False)
        assert outcome.stored == list(range(len(chain)))
        assert set(streamed) == {is_large}
        streamed.clear()


# Space and durability


async def test_blocks_that_find_no_room_are_refused_and_those_before_them_stored(
    open_store: Callable[..., Any],
) -> None:
    opened: OpenStore = await open_store(dram_bytes=3 * BLOCK + HEADER, limits=PATIENT)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(5)
    outcome = await asyncio.wait_for(opened.save(client, chain, some_images(chain)), 30)
    assert outcome.stored == [0, 1, 2]
    assert [type(error) for error in outcome.refused.values()] == [TierFull, TierFull]
    assert opened.hits(chain.keys) == 3


async def test_an_acknowledgement_from_ssd_holds_for_blocks_that_others_had_stored_in_dram(
    open_store: Callable[..., Any],
) -> None:
    calls = FaultyCalls()
    opened: OpenStore = await open_store(calls=calls)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
    images = some_images(chain)
    with calls.held("pwritev"):
        await opened.save(client, chain, images)
        durable = asyncio.create_task(opened.save(client, chain, images, on_ssd=True))
        await until(lambda: opened.write_behind is not None and opened.write_behind._awaited == 2)
        assert not durable.done()
    assert (await durable).already_stored == [0, 1]
    assert opened.residency(chain.keys[0]) == {TierName.DRAM, TierName.SSD}


async def test_where_the_ssd_refuses_a_durable_save_says_so_and_dram_has_the_block(
    open_store: Callable[..., Any],
) -> None:
    calls = FaultyCalls()
    opened: OpenStore = await open_store(calls=calls)
    client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
    calls.failing["pwritev"] = 28
    outcome = await opened.save(client, chain, some_images(chain), on_ssd=True)
    assert not outcome.stored
    assert [type(error) for error in outcome.refused.values()] == [StorageFailed, StorageFailed]
    assert opened.hits(chain.keys) == 2
    calls.failing.clear()


async def test_without_an_ssd_tier_a_durable_save_is_refused(open_store: Callable[..., Any]) -> None:
    opened: OpenStore = await open_store(ssd_bytes=0)
    chain = some_chain(1)
    outcome = await opened.save(opened.store.leases.attach(CALLER, "test"), chain, some_images(chain), on_ssd=True)
    assert isinstance(outcome.refused[0], TierFull) and not outcome.stored


# Saves that are refused before they begin


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"client": b"unknown"}, UnknownClient),
        ({"fingerprint": bytes(32)}, UnknownLayout),
        ({"fingerprint": b""}, UnknownLayout),
        ({"shard": Shard(0, 3, 0, 2)}, InvalidRequest),
        ({"shard": Shard(1, 1, 0, 2)}, InvalidRequest),
        ({"parent_key": bytes(31)}, InvalidRequest),
        ({"last_block_tokens": 17}, InvalidRequest),
        ({"keys": [bytes(32), bytes(32)]}, InvalidRequest),
    ],
)
async def test_a_save_of_what_cannot_be_is_refused(
    opened: OpenStore, client: Client, change: dict[str, Any], error: type[KVError]
) -> None:
    header = header_of(some_chain(2))
    asked = dict(change)
    caller = replace(CALLER, client=asked.pop("client", client.client_id))
    of_chain = {name: asked.pop(name) for name in SaveChain._fields if name in asked}
    header = header._replace(chains=[header.chains[0]._replace(**of_chain)], **asked)
    with pytest.raises(error):
        opened.store.saves.save(caller, header)
    assert not opened.claims.object_count and not client.on_detach


async def test_a_daemon_that_stops_takes_no_new_saves(opened: OpenStore, client: Client) -> None:
    opened.drain.begin(CALLER)
    with pytest.raises(Draining):
        opened.begin_save(client, some_chain(1))


async def test_a_save_of_many_chains_is_a_use_of_the_earlier_blocks_of_each(opened: OpenStore, client: Client) -> None:
    chains = [some_chain(3, seed=seed) for seed in (1, 2)]
    for chain in chains:
        await opened.save(client, chain[:2], some_images(chain[:2]))
    used = opened.blocks.next_access_seq
    tails = [chain[2:] for chain in chains]
    both = BlockChain(bytes(32), tails[0].keys + tails[1].keys, tails[0].token_counts + tails[1].token_counts)
    images = some_images(both)

    async with opened.store.saves.save(caller_of(client), header_of(*tails)) as upload:
        for frame in frames_of(LAYOUT, WHOLE, both, images):
            upload.write(frame)
        outcome = await upload.commit(checksums_of(WHOLE, images), on_ssd=False)

    assert outcome.stored == [0, 1]
    for chain in chains:
        first, second, third = (opened.blocks.access_seq[opened.blocks.row_of(key, WHOLE)] for key in chain)
        assert first > second > third >= used, "a suffix is worth less than its prefix"
    await opened.settle()


async def test_a_block_of_two_chains_is_stored_or_refused_for_both(open_store: Callable[..., Any]) -> None:
    for ssd_bytes, refused in ((0, {0, 1, 2}), (MIB, set[int]())):  # Without SSD no block is as durable as requested.
        opened: OpenStore = await open_store(ssd_bytes=ssd_bytes)
        client, chain = opened.store.leases.attach(CALLER, "test"), some_chain(2)
        images = some_images(chain)
        async with opened.store.saves.save(caller_of(client), header_of(chain[:1], chain)) as upload:
            assert [place.position for place in upload.places] == [0, 2]
            for position, image in ((0, images[0]), (2, images[1])):
                for layer, data in enumerate(layers_of([image])):
                    upload.write(Frame(layer, position, 0, memoryview(data)))
            upload.write(Frame(0, 1, 0, memoryview(layers_of(images[:1])[0])))  # Ignored.
            sums = checksums_of(WHOLE, [images[0], images[0], images[1]])
            outcome = await upload.commit(sums, on_ssd=True)
        assert set(outcome.refused) == refused
        assert (outcome.stored, outcome.already_stored) == (([], []) if refused else ([0, 2], [1]))
        assert await loaded(opened, client, chain) == layers_of(images)
        await opened.settle()
