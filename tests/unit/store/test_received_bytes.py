"""The bytes of a save as they come from sockets: in any messages, in any order, each byte once."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from kvservice.store.leases import Client
from kvservice.store.transfers.filled_uploads import FilledUpload
from kvservice.store.transfers.received_bytes import ReceivedBytes
from kvservice_api.errors import InvalidFrame
from kvservice_api.image import checksum
from kvservice_api.layout import Shard
from tests.stores import LAYOUT, OpenStore, caller_of, header_of, some_chain, some_images

WHOLE = Shard.whole(LAYOUT)
SLICE = 4096
BLOCKS = 5


async def upload_of(opened: OpenStore, client: Client, stored: tuple[int, ...] = ()) -> FilledUpload:
    """A save of blocks of which some are stored already."""
    chain = some_chain(BLOCKS)
    for block in stored:
        one = chain[: block + 1]
        await opened.save(client, one, some_images(one))
    return opened.store.saves.fill(caller_of(client), header_of(chain), "bulk")


@pytest.mark.parametrize("seed", range(20))
async def test_bytes_that_come_in_any_messages_have_the_checksums_of_their_slices(
    opened: OpenStore, client: Client, seed: int
) -> None:
    choose = random.Random(seed)
    async with await upload_of(opened, client, stored=(0,)) as upload:
        received = ReceivedBytes(upload)
        wanted = [place.position for place in upload.places]
        assert wanted == [1, 2, 3, 4]
        size_bytes = received.missing_bytes
        assert size_bytes == LAYOUT.layers * len(wanted) * SLICE
        data = choose.randbytes(size_bytes)
        cuts = {0, size_bytes, *(choose.randrange(1, size_bytes) for _ in range(choose.randrange(9)))}
        cuts |= {SLICE * choose.randrange(1, size_bytes // SLICE) for _ in range(choose.randrange(4))}
        messages = list(itertools.pairwise(sorted(cuts)))
        choose.shuffle(messages)
        for begin, end in messages:
            number, offset = divmod(begin, SLICE)
            layer, block = divmod(number, len(wanted))
            claimed = received.claim(layer, wanted[block], offset, end - begin)
            with pytest.raises(InvalidFrame, match="arrived before"):
                received.claim(layer, wanted[block], offset, 1)
            rest = data[begin:end]
            for piece in claimed.memory:
                piece[:], rest = rest[: len(piece)], rest[len(piece) :]
            assert not rest
            received.arrived(claimed, [checksum(piece) for piece in claimed.memory])
        assert not received.missing_bytes
        slices = [data[at : at + SLICE] for at in range(0, size_bytes, SLICE)]
        expected = np.array([checksum(each) for each in slices], np.uint64).reshape(LAYOUT.layers, len(wanted))
        assert np.array_equal(received.checksums, expected.T.reshape(-1))
        for place, sums in zip(upload.places, expected.T, strict=True):
            image = upload.memory(place)
            assert [checksum(image[layer * SLICE : (layer + 1) * SLICE]) for layer in range(LAYOUT.layers)] == list(
                sums
            )


async def test_bytes_outside_of_the_wanted_blocks_are_refused(opened: OpenStore, client: Client) -> None:
    async with await upload_of(opened, client, stored=(0, 1)) as upload:
        received = ReceivedBytes(upload)
        for layer, block, offset, size in (
            (0, 0, 0, 1),
            (0, BLOCKS, 0, 1),
            (LAYOUT.layers, 2, 0, 1),
            (0, 2, SLICE, 1),
            (0, 2, 2**64 - 1, 1),
            (0, 2, 0, 0),
            (LAYOUT.layers - 1, BLOCKS - 1, 1, SLICE),
            (0, 2, 0, received.missing_bytes + 1),
            (0, 2, 0, 2**64 - 1),
        ):
            with pytest.raises(InvalidFrame):
                received.claim(layer, block, offset, size)
        received.claim(0, 2, 0, received.missing_bytes)


async def test_bytes_that_arrive_with_too_many_gaps_are_refused(opened: OpenStore, client: Client) -> None:
    """Otherwise each second byte of a save would cost a hundred bytes of memory."""
    async with await upload_of(opened, client) as upload:
        received = ReceivedBytes(upload)
        gaps = 16 + received.slice_count + received.missing_bytes // 4096
        for offset in range(0, 2 * gaps, 2):
            received.claim(0, 0, offset, 1)
        with pytest.raises(InvalidFrame, match="gaps"):
            received.claim(0, 0, 2 * gaps, 1)
        received.claim(0, 0, 1, 1)  # What fills a gap is welcome.
