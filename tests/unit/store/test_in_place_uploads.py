"""Saves in place: reservations, commits and abandons, and the release of their space."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from kvservice.blocks import Extent, TierName
from kvservice.store.leases import Client
from kvservice.store.operations.explain import Miss
from kvservice.store.transfers import verification
from kvservice.store.transfers.save_request import Place, SaveOutcome
from kvservice.tiers.writers import Writer
from kvservice_api.errors import (
    InvalidRequest,
    NotShared,
    NoWriterLock,
    Overloaded,
    ReservationEnded,
    ReservationNotYours,
    StorageFailed,
    TierFull,
)
from kvservice_api.image import block_geometry
from kvservice_api.keys import BlockChain
from kvservice_client.arena_map import WriterLock
from tests.clock import FakeClock
from tests.stores import (
    CALLER,
    LAYOUT,
    MIB,
    WHOLE,
    OpenStore,
    StoreFiles,
    caller_of,
    checksums_of,
    header_of,
    layers_of,
    some_chain,
    some_images,
    until,
)

GEOMETRY = block_geometry(LAYOUT, WHOLE, LAYOUT.block_tokens)


@pytest.fixture
async def opened(open_store: Callable[..., Any]) -> OpenStore:
    store: OpenStore = await open_store(share=True)
    return store


@pytest.fixture
def lock(opened: OpenStore, client: Client) -> Iterator[WriterLock]:
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    yield lock
    lock.release()


async def reserve(opened: OpenStore, client: Client, chain: BlockChain, number: int = 1) -> list[Place]:
    places, _ = await opened.store.saves.reserve(caller_of(client), number, header_of(chain), on_ssd=False)
    return places


def write(opened: OpenStore, places: list[Place], images: list[bytes]) -> None:
    for place in places:
        view, image = opened.dram.view(place.extent), images[place.position]
        for layer in range(LAYOUT.layers):
            begin, end = GEOMETRY.slice_range(layer)
            view[begin:end] = image[layer * (end - begin) :][: end - begin]


async def commit(
    opened: OpenStore, client: Client, places: list[Place], images: list[bytes], number: int = 1
) -> SaveOutcome:
    sums = checksums_of(WHOLE, [images[place.position] for place in places])
    return await opened.store.saves.commit(caller_of(client), number, sums)


async def loaded(opened: OpenStore, client: Client, chain: BlockChain) -> list[bytes]:
    lease = opened.lookup(client, chain.keys)
    assert lease is not None and len(lease.rows) == len(chain)
    return await opened.load(lease)


async def test_what_is_written_in_place_is_loaded_once_it_is_committed(
    opened: OpenStore, client: Client, lock: WriterLock
) -> None:
    chain = some_chain(3)
    images = some_images(chain)
    await opened.save(client, chain[:1], images[:1])
    places = await reserve(opened, client, chain)
    assert [place.position for place in places] == [1, 2]
    write(opened, places, images)
    assert opened.hits(chain.keys) == 1

    outcome = await commit(opened, client, places, images)

    assert (outcome.stored, outcome.already_stored) == ([1, 2], [0])
    assert await loaded(opened, client, chain) == layers_of(images)
    await opened.settle()


async def test_nothing_is_reserved_for_who_holds_no_lock(opened: OpenStore, client: Client) -> None:
    with pytest.raises(NoWriterLock):
        await reserve(opened, client, some_chain(1))
    assert opened.dram.used_bytes == 0


async def test_an_arena_that_is_not_shared_is_not_written(open_store: Callable[..., Any]) -> None:
    opened = await open_store()
    with pytest.raises(NotShared):
        await reserve(opened, opened.store.leases.attach(CALLER, "test"), some_chain(1))


async def test_a_reservation_is_its_clients_alone(opened: OpenStore, client: Client, lock: WriterLock) -> None:
    chain = some_chain(1)
    images = some_images(chain)
    places = await reserve(opened, client, chain)
    stranger = opened.store.leases.attach(CALLER, "stranger")
    with pytest.raises(ReservationNotYours):
        await commit(opened, stranger, places, images)
    with pytest.raises(ReservationNotYours):
        opened.in_place_uploads.abandon(CALLER, 1, stranger)
    write(opened, places, images)
    assert (await commit(opened, client, places, images)).stored == [0]


async def test_what_was_abandoned_or_committed_cannot_be_committed(
    opened: OpenStore, client: Client, lock: WriterLock
) -> None:
    chain = some_chain(2)
    images = some_images(chain)
    for number in (1, 2):
        places = await reserve(opened, client, chain, number)
        write(opened, places, images)
        if number == 1:
            opened.in_place_uploads.abandon(CALLER, 1, client)
            assert opened.dram.used_bytes == 0
        else:
            await commit(opened, client, places, images, number)
        with pytest.raises(ReservationEnded):
            await commit(opened, client, places, images, number)
        opened.in_place_uploads.abandon(CALLER, number, client)
    assert await loaded(opened, client, chain) == layers_of(images)


async def test_a_wrong_number_of_checksums_changes_nothing(opened: OpenStore, client: Client, lock: WriterLock) -> None:
    chain = some_chain(2)
    images = some_images(chain)
    places = await reserve(opened, client, chain)
    write(opened, places, images)
    for wrong in (0, 3, 5):
        with pytest.raises(InvalidRequest):
            await opened.in_place_uploads.commit(CALLER, 1, client, np.zeros(wrong, np.uint64))
    assert (await commit(opened, client, places, images)).stored == [0, 1]


async def test_a_reservation_number_in_use_is_refused_and_reservations_are_bounded(
    opened: OpenStore, client: Client, lock: WriterLock
) -> None:
    await reserve(opened, client, some_chain(1, seed=1))
    for number in (0, 1):
        with pytest.raises(InvalidRequest, match="choose another"):
            await reserve(opened, client, some_chain(1, seed=2), number)
    for number in range(2, 65):
        await reserve(opened, client, some_chain(1, seed=number), number)
    refused = some_chain(1, seed=99)
    with pytest.raises(Overloaded):
        await reserve(opened, client, refused, 99)
    assert opened.explain.missing(CALLER, refused.keys[0]).why is Miss.DROPPED_AT_SAVE


async def test_a_reserved_block_is_not_uploaded_by_another_client(
    opened: OpenStore, client: Client, lock: WriterLock
) -> None:
    chain = some_chain(2)
    images = some_images(chain)
    places = await reserve(opened, client, chain)
    other = asyncio.create_task(opened.save(opened.store.leases.attach(CALLER, "other"), chain, images))
    await asyncio.sleep(0)
    write(opened, places, images)
    await commit(opened, client, places, images)
    assert (await other).already_stored == [0, 1]


async def test_who_waits_for_an_abandoned_reservation_takes_over(
    opened: OpenStore, client: Client, lock: WriterLock
) -> None:
    chain = some_chain(2)
    images = some_images(chain)
    await reserve(opened, client, chain)
    other = asyncio.create_task(opened.save(opened.store.leases.attach(CALLER, "other"), chain, images))
    await asyncio.sleep(0)
    opened.in_place_uploads.abandon(CALLER, 1, client)
    assert (await other).stored == [0, 1]


async def test_a_block_that_could_never_fit_is_refused_before_it_is_written(
    open_store: Callable[..., Any],
) -> None:
    opened = await open_store(share=True, dram_bytes=24 * 1024)
    client = opened.store.leases.attach(CALLER, "test")
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    chain = some_chain(3)
    places, refused = await opened.store.saves.reserve(caller_of(client), 1, header_of(chain), on_ssd=False)
    assert len(places) == 1
    assert {position: type(error) for position, error in refused.items()} == {1: TierFull, 2: TierFull}
    lock.release()


async def test_space_that_a_lost_client_may_be_writing_comes_back_with_its_lock_and_no_sooner(
    opened: OpenStore, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    places = await reserve(opened, client, some_chain(2))
    used, looks, look = opened.dram.used_bytes, 0, Writer.remove_if_unlocked

    def counted(writer: Writer) -> bool:
        nonlocal looks
        looks += 1
        return look(writer)

    monkeypatch.setattr(Writer, "remove_if_unlocked", counted)
    opened.store.leases.detach(CALLER, client)
    opened.files.clock.advance(seconds=10_000)
    await until(lambda: looks == 3)
    assert opened.dram.used_bytes == used
    assert not opened.claims.object_count, "others may store these blocks elsewhere"
    assert not opened.in_place_uploads._open
    offsets = np.array([place.extent.offset_bytes for place in places])
    before = opened.dram.generations(offsets)

    lock.release()
    await until(lambda: opened.dram.used_bytes == 0)
    assert opened.dram.generations(offsets) == [each + 1 for each in before]
    assert not list((opened.dram.arena.directory / "writers").iterdir())


async def test_much_space_of_a_lost_client_comes_back_in_short_turns(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = await open_store(share=True, dram_bytes=4 * MIB)
    client = opened.store.leases.attach(CALLER, "test")
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    await reserve(opened, client, some_chain(200))
    release, turn, released = opened.dram.release, 0, Counter[int]()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    def counted(extent: Extent) -> None:
        released[turn] += 1
        release(extent)

    monkeypatch.setattr(opened.dram, "release", counted)
    counting = asyncio.create_task(count_turns())
    opened.store.leases.detach(CALLER, client)
    lock.release()
    await until(lambda: opened.dram.used_bytes == 0)
    counting.cancel()
    assert (sum(released.values()), max(released.values())) == (200, 64)


async def test_what_was_committed_stays_where_it_is_when_its_writer_ends(opened: OpenStore, client: Client) -> None:
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    chain = some_chain(2)
    images = some_images(chain)
    places = await reserve(opened, client, chain)
    write(opened, places, images)
    await commit(opened, client, places, images)
    used = opened.dram.used_bytes

    opened.store.leases.detach(CALLER, client)
    lock.release()
    await until(lambda: not any("writer" in task.get_name() for task in opened.tasks._running))
    assert opened.dram.used_bytes == used
    assert await loaded(opened, opened.store.leases.attach(CALLER, "other"), chain) == layers_of(images)


async def test_a_client_that_ends_while_its_blocks_are_committed_costs_none_of_them(
    open_store: Callable[..., Any],
) -> None:
    """A commit of many blocks takes several turns of the event loop."""
    opened: OpenStore = await open_store(share=True, dram_bytes=4 * MIB, ssd_bytes=0)
    client = opened.store.leases.attach(CALLER, "test")
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    chain = some_chain(40)
    images = some_images(chain)
    places = await reserve(opened, client, chain)
    write(opened, places, images)
    budget = opened.store._loop_budget
    for _ in range(2):
        await budget._places.acquire()  # As other work does.
    committing = asyncio.create_task(commit(opened, client, places, images))
    await until(lambda: bool(opened.blocks.row_end))
    opened.store.leases.detach(CALLER, client)
    lock.release()
    for _ in range(20):
        await asyncio.sleep(0)
    budget._places.release()
    budget._places.release()

    assert len((await committing).stored) == 40

    await until(lambda: not opened.in_place_uploads.set_aside)
    await opened.settle()
    assert await loaded(opened, opened.store.leases.attach(CALLER, "other"), chain) == layers_of(images)
    assert not list((opened.dram.arena.directory / "writers").iterdir())


async def test_an_index_that_refuses_the_record_costs_the_save_and_no_space(
    opened: OpenStore, client: Client, lock: WriterLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = some_chain(2)
    images = some_images(chain)
    places = await reserve(opened, client, chain)
    write(opened, places, images)

    async def refuse(*arguments: object) -> None:
        raise StorageFailed("the index is broken")

    monkeypatch.setattr(opened.index, "put", refuse)
    outcome = await commit(opened, client, places, images)
    assert {type(error) for error in outcome.refused.values()} == {StorageFailed}
    await until(lambda: opened.dram.used_bytes == 0)
    assert opened.hits(chain.keys) == 0


async def test_the_daemon_after_this_one_sets_aside_what_a_living_client_may_be_writing(
    store_files: Callable[..., StoreFiles],
) -> None:
    files = store_files(share=True)
    opened = files.open()
    await opened.store.layouts.open(CALLER, LAYOUT)
    client = opened.store.leases.attach(CALLER, "writer")
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    places = [await reserve(opened, client, some_chain(2, seed=seed), seed) for seed in (1, 2, 3)]
    committed, abandoned, open_still = places
    images = some_images(some_chain(2, seed=1))
    write(opened, committed, images)
    await commit(opened, client, committed, images, 1)
    opened.in_place_uploads.abandon(CALLER, 2, client)
    await opened.kill()

    opened = files.open()
    try:
        taken = opened.dram.used_bytes - sum(extent.size_bytes for extent in opened.extents(TierName.DRAM).values())
        assert taken == sum(place.extent.size_bytes for place in open_still)
        aside = {place.extent for place in open_still}
        reserved: set[Extent] = set()
        with contextlib.suppress(TierFull):
            while True:
                reserved.add(opened.dram.reserve(GEOMETRY.image_bytes))
        assert not reserved & aside
        assert {place.extent for place in abandoned} <= reserved
        for extent in reserved:
            opened.dram.release(extent)
        lock.release()
        await until(lambda: opened.dram.used_bytes == sum(place.extent.size_bytes for place in committed))
    finally:
        await opened.close()


async def test_a_block_written_in_place_counts_as_verified_after_its_first_read(
    open_store: Callable[..., Any],
) -> None:
    opened = await open_store(share=True, ssd_bytes=0, dram_bytes=MIB)
    client = opened.store.leases.attach(CALLER, "test")
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    chain = some_chain(2)
    images = some_images(chain)
    places = await reserve(opened, client, chain)
    write(opened, places, images)
    await commit(opened, client, places, images)
    lease = opened.lookup(client, chain.keys)
    assert lease is not None
    assert not opened.blocks.verified[lease.rows].any()
    steps = opened.locate(client, lease, verify=True)
    await anext(steps)
    await steps.aclose()
    assert opened.blocks.verified[lease.rows].all()
    lock.release()


class PausesNoted(FakeClock):
    """Notes the pauses of the verification ahead of views, after each of which it checks whether a client is active."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        if seconds in [verification._PAUSE_S * 2**times for times in range(5)]:
            self.pauses.append(seconds)
        await super().sleep(seconds)


async def test_after_the_first_view_blocks_written_in_place_are_verified_ahead_of_views_while_no_client_is_active(
    open_store: Callable[..., Any],
) -> None:
    clock = PausesNoted()
    opened = await open_store(share=True, ssd_bytes=0, dram_bytes=MIB, clock=clock)
    client = opened.store.leases.attach(CALLER, "test")
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    verified = opened.blocks.verified
    chains = [some_chain(2, seed=seed) for seed in range(3)]

    async def stored(chain: BlockChain, *, is_damaged: bool = False) -> list[int]:
        images = some_images(chain)
        places = await reserve(opened, client, chain)
        write(opened, places, images)
        if is_damaged:
            opened.dram.view(places[1].extent)[0] ^= 1
        await commit(opened, client, places, images)
        return [opened.blocks.row_of(key, WHOLE) for key in chain.keys]

    await stored(chains[0])
    lease = opened.lookup(client, chains[0].keys)
    assert lease is not None
    steps = opened.locate(client, lease, verify=True)
    await anext(steps)
    await steps.aclose()
    assert not clock.pauses, "without a view none is expected"

    rows = await stored(chains[1])
    await until(lambda: len(clock.pauses) > 2)
    assert not verified[rows].any(), "a client has a lease, and may be reading"
    assert clock.pauses[:3] == [0.02, 0.04, 0.08], "it may have the lease for hours"
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    await until(lambda: bool(verified[rows].all()))
    assert opened.counters.verified_ahead_bytes == 2 * GEOMETRY.image_bytes

    await stored(chains[2], is_damaged=True)
    await until(lambda: opened.counters.quarantined_blocks == 1)
    assert opened.hits(chains[2].keys) == 1
    lock.release()


async def test_many_blocks_are_looked_up_in_several_turns_ahead_of_views_also_if_they_are_gone(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_PART_ROWS", 2)
    opened = await open_store(share=True, ssd_bytes=0, dram_bytes=MIB)
    client = opened.store.leases.attach(CALLER, "test")
    lock = WriterLock(opened.dram.arena.directory, client.client_id)
    viewed, gone, kept = (some_chain(count, seed=seed) for seed, count in enumerate([1, 5, 3]))
    lease = None
    for chain in (viewed, gone, kept):
        images = some_images(chain)
        places = await reserve(opened, client, chain)
        write(opened, places, images)
        await commit(opened, client, places, images)
        if lease is None:
            lease = opened.lookup(client, chain.keys)
            assert lease is not None
            steps = opened.locate(client, lease, verify=True)
            await anext(steps)
            await steps.aclose()
    await opened.store.operators.discard(CALLER, gone.keys)
    turns, hold = list[int](), opened.block_lifecycle.hold

    def noted(rows: Sequence[int]) -> None:
        turns.append(len(rows))
        hold(rows)

    monkeypatch.setattr(opened.block_lifecycle, "hold", noted)
    assert lease is not None
    opened.leases.begin_release(caller_of(client), lease.lease_id)
    rows = [opened.blocks.row_of(key, WHOLE) for key in kept.keys]
    await until(lambda: bool(opened.blocks.verified[rows].all()))
    assert turns == [0, 0, 1, 2], "two of the blocks that wait in each turn"
    lock.release()
