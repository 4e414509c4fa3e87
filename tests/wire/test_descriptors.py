"""What stands in front of a block's trailer on disk: what the index knows of it."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest

from kvservice_api.image import DESCRIPTOR_BYTES, Descriptor, block_geometry, checksum, descriptor_offset, tenant_tag
from kvservice_api.layout import Layout, Shard
from tests.wire.vectors import golden

DESCRIPTORS = golden("descriptors")


def descriptor_of(vector: dict[str, Any]) -> Descriptor:
    return Descriptor(
        vector["token_count"],
        bytes.fromhex(vector["parent_key"]),
        bytes.fromhex(vector["layout_fingerprint"]),
        tenant_tag(vector["tenant"]),
        vector["stored_at_ms"],
        vector["trailer_checksum"],
    )


@pytest.mark.parametrize("vector", DESCRIPTORS, ids=["first block", "continued"])
def test_descriptors_are_the_golden_ones(vector: dict[str, Any]) -> None:
    by_hand = b"KVBD" + struct.pack("<HHII", 1, 0, vector["token_count"], 0)
    by_hand += bytes.fromhex(vector["parent_key"]) + bytes.fromhex(vector["layout_fingerprint"])
    by_hand += hashlib.sha256(vector["tenant"].encode()).digest()[:16]
    by_hand += struct.pack("<QQ", vector["stored_at_ms"], vector["trailer_checksum"])
    by_hand += struct.pack("<Q", checksum(by_hand))

    assert descriptor_of(vector).encode().hex() == by_hand.hex() == vector["encoded"]
    assert Descriptor.decode(bytes.fromhex(vector["encoded"])) == descriptor_of(vector)


@pytest.mark.parametrize("position", range(DESCRIPTOR_BYTES))
def test_a_descriptor_with_a_flipped_bit_is_refused(position: int) -> None:
    data = bytearray.fromhex(DESCRIPTORS[1]["encoded"])
    data[position] ^= 0x10
    with pytest.raises(ValueError, match="descriptor"):
        Descriptor.decode(bytes(data))


@pytest.mark.parametrize("size", [0, DESCRIPTOR_BYTES - 1, DESCRIPTOR_BYTES + 1])
def test_a_descriptor_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="descriptor"):
        Descriptor.decode(bytes(size))


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
