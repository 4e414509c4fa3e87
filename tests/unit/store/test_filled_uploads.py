"""Saves whose bytes the daemon's own threads write: their space is free once nothing writes there, and no sooner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvservice.store.leases import Client
from kvservice.store.transfers.filled_uploads import FilledUpload
from kvservice.store.transfers.save_request import Place
from kvservice_api.errors import Draining, IncompleteSave, InvalidRequest, TierFull, UploadCorrupted
from kvservice_api.image import block_geometry, checksum
from tests.stores import (
    CALLER,
    LAYOUT,
    WHOLE,
    OpenStore,
    caller_of,
    header_of,
    some_chain,
    some_images,
    until,
)

GEOMETRY = block_geometry(LAYOUT, WHOLE, LAYOUT.block_tokens)


@pytest.fixture
async def opened(open_store: Callable[..., Any]) -> OpenStore:
    store: OpenStore = await open_store()
    return store


def written(opened: OpenStore, places: Sequence[Place], images: Sequence[bytes]) -> np.ndarray[Any, Any]:
    """Write the slices to their places. Returns their checksums."""
    sums = np.zeros((len(places), LAYOUT.layers), np.uint64)
    for number, place in enumerate(places):
        view, image = opened.dram.view(place.extent), images[place.position]
        for layer in range(LAYOUT.layers):
            begin, end = GEOMETRY.slice_range(layer)
            view[begin:end] = image[layer * (end - begin) :][: end - begin]
            sums[number, layer] = checksum(view[begin:end])
    return sums.reshape(-1)


def fill(opened: OpenStore, client: Client, count: int = 3) -> tuple[FilledUpload, list[bytes]]:
    chain = some_chain(count)
    return opened.store.saves.fill(caller_of(client), header_of(chain), "cuda_ipc"), some_images(chain)


async def test_blocks_are_visible_and_count_as_verified_after_the_commit(opened: OpenStore, client: Client) -> None:
    upload, images = fill(opened, client)
    async with upload:
        assert [place.position for place in upload.places] == [0, 1, 2]
        sums = written(opened, upload.places, images)
        assert not opened.blocks.live_count

        outcome = await upload.commit(sums, on_ssd=False)

    assert (outcome.stored, outcome.refused) == ([0, 1, 2], {})
    assert opened.blocks.verified[: opened.blocks.row_end].all()
    assert not opened.claims.object_count


async def test_the_space_of_a_lost_client_is_free_once_nothing_writes_there(opened: OpenStore, client: Client) -> None:
    upload, images = fill(opened, client)
    async with upload:
        used = opened.dram.used_bytes
        assert used
        sums = written(opened, upload.places, images)

        opened.store.leases.detach(CALLER, client)

        assert opened.dram.used_bytes == used, "a copy may still run"
        assert not opened.claims.object_count, "others may store these blocks elsewhere"
        with pytest.raises(IncompleteSave):
            await upload.commit(sums, on_ssd=False)
    assert opened.dram.used_bytes == 0


async def test_a_save_that_is_left_without_a_commit_stores_nothing(opened: OpenStore, client: Client) -> None:
    upload, images = fill(opened, client)
    async with upload:
        written(opened, upload.places, images)

    assert (opened.dram.used_bytes, opened.blocks.live_count, opened.claims.object_count) == (0, 0, 0)


async def test_a_save_that_is_cancelled_while_it_waits_for_another_leaves_no_space(
    opened: OpenStore, client: Client
) -> None:
    first, _ = fill(opened, client, 2)
    second, _ = fill(opened, client, 3)
    async with first:
        used = opened.dram.used_bytes
        waiting = asyncio.create_task(second.__aenter__())
        await until(lambda: opened.dram.used_bytes > used)  # The third block is of the second save only.

        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

        assert opened.dram.used_bytes == used


async def test_checksums_of_another_number_of_slices_are_refused(opened: OpenStore, client: Client) -> None:
    upload, images = fill(opened, client)
    async with upload:
        sums = written(opened, upload.places, images)
        with pytest.raises(InvalidRequest, match="checksums"):
            await upload.commit(sums[1:], on_ssd=False)
        assert (await upload.commit(sums, on_ssd=False)).stored == [0, 1, 2]


async def test_blocks_with_other_checksums_than_the_client_expected_are_refused_alone(
    opened: OpenStore, client: Client
) -> None:
    upload, images = fill(opened, client)
    async with upload:
        sums = written(opened, upload.places, images)
        expected = sums.copy()
        expected[LAYOUT.layers] ^= np.uint64(1)  # Of the second block.
        outcome = await upload.commit(sums, on_ssd=False, expected=expected)
    assert outcome.stored == [0, 2]
    assert isinstance(outcome.refused[1], UploadCorrupted)
    assert opened.dram.used_bytes == 2 * GEOMETRY.image_bytes


async def test_a_draining_daemon_takes_none(opened: OpenStore, client: Client) -> None:
    opened.store.begin_stop()

    with pytest.raises(Draining):
        fill(opened, client)


async def test_blocks_without_space_are_refused_and_the_others_stored(
    open_store: Callable[..., Any], client: Client
) -> None:
    opened: OpenStore = await open_store(dram_bytes=40 * 1024, ssd_bytes=0)
    other = opened.store.leases.attach(CALLER, "test")
    upload, images = fill(opened, other, 4)
    async with upload:
        outcome = await upload.commit(written(opened, upload.places, images), on_ssd=False)

    assert outcome.stored
    assert all(isinstance(error, TierFull) for error in outcome.refused.values())
    assert len(outcome.stored) + len(outcome.refused) == 4
