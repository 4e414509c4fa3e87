"""A client saves bytes that look like another client's block, and the index is lost: a rebuild takes none of them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvservice.index.descriptor_secret import SECRET_NAME, read_secret
from kvservice_api.image import (
    DESCRIPTOR_BYTES,
    PAGE_BYTES,
    Descriptor,
    Trailer,
    block_geometry,
    checksum,
    descriptor_offset,
    tenant_tag,
)
from kvservice_api.layout import Shard
from kvservice_client import BlockChain, Client, Durability, Layout
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import LARGE, SMALL, layers_of, new_chain, save, slice_bytes, slice_of, verify
from tests.integration.media import ssd_file
from tests.integration.test_rebuilt_index import lose_index, mark_of_earlier_version, rebuild

IMAGE = block_geometry(SMALL, Shard.whole(SMALL), SMALL.block_tokens)
PER_SLICE = slice_bytes(LARGE) // IMAGE.image_bytes  # Planted images in one slice of an outer block, on its pages.
OTHER_TAG = "with a tag that this store's secret does not give"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, dram__capacity_bytes=24 * MIB, ssd__capacity_bytes=64 * MIB) as process:
        yield process


# Per attack: the bytes before the trailer, and the trailer. Each gets the trailer of the planted slices, and the
# descriptor and the trailer of a genuine block in the arena.
Forge = Callable[[bytes, bytes], bytes]


def no_descriptor(trailer: bytes, genuine: bytes) -> bytes:
    return bytes(DESCRIPTOR_BYTES) + trailer


def descriptor_with_another_secret(trailer: bytes, genuine: bytes) -> bytes:
    made = Descriptor(SMALL.block_tokens, bytes(32), SMALL.fingerprint, tenant_tag("default"), 1, checksum(trailer))
    return made.encode(trailer, os.urandom(32)) + trailer


def descriptor_with_a_checksum_for_a_tag(trailer: bytes, genuine: bytes) -> bytes:
    body = descriptor_with_another_secret(trailer, genuine)[: DESCRIPTOR_BYTES - 8]
    return body + checksum(body).to_bytes(8, "little") + trailer


def genuine_descriptor_and_own_trailer(trailer: bytes, genuine: bytes) -> bytes:
    """The descriptor names its trailer by a checksum, which the attacker replaces."""
    tag = genuine[DESCRIPTOR_BYTES - 8 : DESCRIPTOR_BYTES]
    return genuine[: DESCRIPTOR_BYTES - 16] + checksum(trailer).to_bytes(8, "little") + tag + trailer


def genuine_descriptor_and_trailer(trailer: bytes, genuine: bytes) -> bytes:
    return genuine


FORGERIES: list[Forge] = [
    no_descriptor,
    descriptor_with_another_secret,
    descriptor_with_a_checksum_for_a_tag,
    genuine_descriptor_and_own_trailer,
    genuine_descriptor_and_trailer,
]


def read_in_arena(daemon: DaemonProcess, key: bytes) -> bytes:
    """Descriptor and trailer of a block, as every client reads them that maps the arena."""
    data = (daemon.arena_folder / "arena").read_bytes()
    place = data.index(b"KVTR\x01\x00" + SMALL.layers.to_bytes(2, "little") + key)
    return data[place - DESCRIPTOR_BYTES : place + Trailer.size_bytes(SMALL.layers)]


def planted_image(key: bytes, genuine: bytes, forge: Forge) -> bytes:
    slices = [random.Random(layer).randbytes(slice_bytes(SMALL)) for layer in range(SMALL.layers)]
    trailer = Trailer(key, Shard.whole(SMALL), np.array(list(map(checksum, slices)), np.uint64)).encode()
    image = bytearray(IMAGE.image_bytes)
    for (start, end, *_), data in zip(IMAGE.slices, slices, strict=True):
        image[start:end] = data
    last = forge(trailer, genuine)
    image[len(image) - len(last) :] = last
    return bytes(image)


def plant(client: Client, daemon: DaemonProcess, images: list[bytes]) -> None:
    """Save the images inside of a block, discard it, and have its first bytes overwritten."""
    chain = new_chain(LARGE)
    layers = [[each.copy() for each in layer] for layer in layers_of(LARGE, chain)]
    for number, image in enumerate(images):
        layer, place = 1 + number // PER_SLICE, number % PER_SLICE * len(image)
        layers[layer][0][place : place + len(image)] = np.frombuffer(image, np.uint8)
    assert client.open_layout(LARGE).save(chain, layers, Durability.SSD).is_complete
    start = ssd_file(daemon).find(slice_of(chain.keys[0], 0, slice_bytes(LARGE)).tobytes())
    client.admin.discard(chain)
    over = new_chain(SMALL, 2)
    assert save(client, SMALL, over, Durability.SSD).is_complete
    assert ssd_file(daemon).find(slice_of(over.keys[0], 0, slice_bytes(SMALL)).tobytes()) == start
    for image in images:
        assert (ssd_file(daemon).find(image) - start) % PAGE_BYTES == 0, "the planted images are whole"


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_no_planted_image_is_taken_for_a_block(daemon: DaemonProcess, transport: str) -> None:
    genuine, absent = new_chain(SMALL, 3), [new_chain(SMALL) for _ in FORGERIES]
    with daemon.client(transport=transport) as client:
        assert save(client, SMALL, genuine, Durability.SSD).is_complete
        seen = read_in_arena(daemon, genuine.keys[0])
        images = [planted_image(chain.keys[0], seen, forge) for chain, forge in zip(absent, FORGERIES, strict=True)]
        images += [planted_image(genuine.keys[0], seen, forge) for forge in FORGERIES[1:4]]  # Of a key that is stored.
        plant(client, daemon, images)
    daemon.stop()
    lose_index(daemon)

    report = rebuild(daemon)
    assert (report["problems"], report["tiers"]["ssd"]["blocks"]) == ([], 5), report["notes"]
    assert "no record for 1 trailers without a descriptor that this store wrote" in report["notes"]
    assert f"no record for 6 trailers {OTHER_TAG}" in report["notes"]
    daemon.start()
    with daemon.client() as client:
        verify(client, SMALL, genuine)
        for chain in absent:
            assert client.open_layout(SMALL).contains(chain) == 0


def test_an_image_planted_without_a_descriptor_is_taken_in_a_store_of_an_earlier_version_alone(
    daemon: DaemonProcess,
) -> None:
    """The blocks of such a store have no tags either, so a rebuild accepts the images above as blocks."""
    absent = new_chain(SMALL)
    with daemon.client() as client:
        genuine = new_chain(SMALL)
        assert save(client, SMALL, genuine, Durability.SSD).is_complete
        seen = read_in_arena(daemon, genuine.keys[0])
        plant(client, daemon, [planted_image(absent.keys[0], seen, no_descriptor)])
    daemon.stop()
    mark_of_earlier_version(daemon)
    lose_index(daemon)
    assert rebuild(daemon)["tiers"]["ssd"]["blocks"] == 4


def test_blocks_whose_image_has_no_room_for_a_descriptor_are_found(daemon: DaemonProcess) -> None:
    tight = Layout("tight", "float16", layers=1, kv_heads=1, k_head_dim=101, v_head_dim=101, block_tokens=10)
    assert descriptor_offset(block_geometry(tight, Shard.whole(tight), 10)) is None
    chain = new_chain(tight, 3)
    with daemon.client() as client:
        assert save(client, tight, chain, Durability.SSD).is_complete
    daemon.stop()
    lose_index(daemon)
    report = rebuild(daemon)
    assert (report["problems"], report["tiers"]["ssd"]["blocks"]) == ([], 3)
    daemon.start()
    with daemon.client() as client:
        verify(client, tight, chain)


def gone(path: Path) -> None:
    path.unlink()


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("lose", [gone, short, flipped])
def test_a_lost_secret_stops_no_daemon_and_a_rebuild_counts_what_it_cannot_check(
    daemon: DaemonProcess, lose: Callable[[Path], None]
) -> None:
    before, after = new_chain(SMALL, 4), new_chain(LARGE, 3)
    path = daemon.store / SECRET_NAME
    with daemon.client() as client:
        assert save(client, SMALL, before, Durability.SSD).is_complete
    daemon.stop()
    first = read_secret(daemon.store)
    lose(path)
    daemon.start()
    [line] = [line["event"] for line in daemon.log if str(path) in line["event"]]
    assert "a new one was made" in line
    with daemon.client() as client:
        verify(client, SMALL, before)
        assert save(client, LARGE, after, Durability.SSD).is_complete
    daemon.stop()
    second = read_secret(daemon.store)
    assert first is not None and second is not None and first.key != second.key and second.every_block
    lose_index(daemon)

    report = rebuild(daemon)
    assert f"no record for 4 trailers {OTHER_TAG}" in report["notes"]
    assert report["tiers"]["ssd"]["blocks"] == 3
    daemon.start()
    assert not any(str(path) in line["event"] for line in daemon.log)
    with daemon.client() as client:
        verify(client, LARGE, after)
        assert contains(client, before) == 0


def contains(client: Client, chain: BlockChain) -> int:
    return client.open_layout(SMALL).contains(chain)


def test_a_rebuild_without_a_secret_says_so_and_takes_no_block(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        assert save(client, SMALL, new_chain(SMALL, 4), Durability.SSD).is_complete
    daemon.stop()
    (daemon.store / SECRET_NAME).unlink()
    lose_index(daemon)
    report = rebuild(daemon)
    assert report["tiers"]["ssd"]["blocks"] == 0
    assert f"no record for 4 trailers {OTHER_TAG}" in report["notes"]
    assert any(f"{daemon.store / SECRET_NAME} is gone or damaged" in note for note in report["notes"])
    assert not (daemon.store / SECRET_NAME).exists(), "a check makes none"


def test_the_secret_is_the_daemons_alone(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        assert save(client, SMALL, new_chain(SMALL, 4), Durability.SSD).is_complete
    path = daemon.store / SECRET_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    secret = read_secret(daemon.store)
    assert secret is not None and len(secret.key) == 32
    assert secret.key.hex() not in repr(secret) and repr(secret.key) not in repr(secret)
    files = [*daemon.shared_memory.rglob("*"), *daemon.store.rglob("*")]
    for file in files:
        assert file == path or not file.is_file() or secret.key not in file.read_bytes(), file
    daemon.stop()
    lose_index(daemon)
    done = daemon.check("--rebuild", "--json")
    said = done.stdout + done.stderr + "".join(daemon.lines)
    assert secret.key.hex() not in said and repr(secret.key)[2:-1] not in said
