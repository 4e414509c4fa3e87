"""The descriptor in front of a block's trailer on disk: a copy of the index record."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest

from kvservice_api.image import (
    DESCRIPTOR_BYTES,
    Descriptor,
    TagMismatch,
    block_geometry,
    checksum,
    descriptor_offset,
    tenant_tag,
)
from kvservice_api.layout import Layout, Shard
from tests.wire.vectors import golden

DESCRIPTORS = golden("descriptors")
SECRET = bytes(range(32))


def descriptor_of(vector: dict[str, Any]) -> Descriptor:
    return Descriptor(
        vector["token_count"],
        bytes.fromhex(vector["parent_key"]),
        bytes.fromhex(vector["layout_fingerprint"]),
        tenant_tag(vector["tenant"]),
        vector["stored_at_ms"],
        checksum(bytes.fromhex(vector["trailer"])),
    )


@pytest.mark.parametrize("vector", DESCRIPTORS, ids=["first block", "continued"])
def test_descriptors_are_the_golden_ones(vector: dict[str, Any]) -> None:
    trailer, secret = bytes.fromhex(vector["trailer"]), bytes.fromhex(vector["secret"])
    by_hand = b"KVBD" + struct.pack("<HHII", 1, 0, vector["token_count"], 0)
    by_hand += bytes.fromhex(vector["parent_key"]) + bytes.fromhex(vector["layout_fingerprint"])
    by_hand += hashlib.sha256(vector["tenant"].encode()).digest()[:16]
    by_hand += struct.pack("<QQ", vector["stored_at_ms"], checksum(trailer))
    by_hand += hashlib.blake2b(by_hand + trailer, digest_size=8, key=secret, person=b"kvservice/block").digest()

    assert descriptor_of(vector).encode(trailer, secret).hex() == by_hand.hex() == vector["encoded"]
    assert len(by_hand) == DESCRIPTOR_BYTES == 120
    assert Descriptor.decode(by_hand, trailer, secret) == descriptor_of(vector)


def decode(descriptor: bytes, trailer: bytes, secret: bytes = SECRET) -> Descriptor:
    return Descriptor.decode(descriptor, trailer, secret)


ENCODED, TRAILER = bytes.fromhex(DESCRIPTORS[1]["encoded"]), bytes.fromhex(DESCRIPTORS[1]["trailer"])


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


@pytest.mark.parametrize("position", [*range(6), *range(8, 12), *range(16, DESCRIPTOR_BYTES)])
def test_a_descriptor_with_a_flipped_bit_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match="descriptor"):
        decode(flipped(ENCODED, position), TRAILER)


@pytest.mark.parametrize("position", [6, 7, *range(12, 16)])
def test_the_bytes_that_are_always_zero_are_under_the_tag_too(position: int) -> None:
    with pytest.raises(TagMismatch):
        decode(flipped(ENCODED, position), TRAILER)


@pytest.mark.parametrize("position", range(len(TRAILER)))
def test_every_byte_of_the_trailer_is_under_the_tag(position: int) -> None:
    """Also if the descriptor has the other trailer's checksum, which any client can compute."""
    other = flipped(TRAILER, position)
    with pytest.raises(ValueError, match="another trailer"):
        decode(ENCODED, other)
    with pytest.raises(TagMismatch):
        decode(ENCODED[:104] + checksum(other).to_bytes(8, "little") + ENCODED[112:], other)


def test_a_descriptor_of_another_store_is_distinguished_from_no_descriptor() -> None:
    with pytest.raises(TagMismatch):
        decode(ENCODED, TRAILER, secret=flipped(SECRET, 31))
    with pytest.raises(ValueError, match="descriptor") as raised:
        decode(bytes(DESCRIPTOR_BYTES), TRAILER)
    assert not isinstance(raised.value, TagMismatch)


@pytest.mark.parametrize("size", [0, DESCRIPTOR_BYTES - 1, DESCRIPTOR_BYTES + 1])
def test_a_descriptor_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="descriptor"):
        decode(bytes(size), TRAILER)


@pytest.mark.parametrize("token_count", range(1, 65))
@pytest.mark.parametrize(("layers", "head_dim"), [(1, 4), (3, 12), (8, 64), (600, 2)])
def test_a_descriptor_takes_free_bytes_of_the_image_and_none_of_its_own(
    layers: int, head_dim: int, token_count: int
) -> None:
    layout = Layout("m", "float16", layers, kv_heads=1, k_head_dim=head_dim, v_head_dim=head_dim, block_tokens=64)
    geometry = block_geometry(layout, Shard.whole(layout), token_count)
    end = geometry.slices[-1].end
    free = geometry.trailer_offset - end
    assert geometry.image_bytes == -(-(end + 48 + 8 * layers) // 4096) * 4096, "the image is as large as ever"
    offset = descriptor_offset(geometry)
    assert (offset is None) == (free < DESCRIPTOR_BYTES)
    assert offset is None or end <= offset == geometry.trailer_offset - DESCRIPTOR_BYTES
