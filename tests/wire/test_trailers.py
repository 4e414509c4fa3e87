"""The trailer after a block's slices on disk."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from kvservice_api.image import Trailer, checksum
from kvservice_api.layout import Shard
from tests.wire.vectors import golden

TRAILERS = golden("trailers")


@pytest.mark.parametrize("vector", TRAILERS, ids=["one slice", "four slices"])
def test_trailers_are_the_golden_ones(vector: dict[str, Any]) -> None:
    key, sums = bytes.fromhex(vector["key"]), vector["checksums"]
    by_hand = b"KVTR" + struct.pack("<HH", 1, len(sums)) + key + struct.pack(">4H", *vector["shard"])
    by_hand += struct.pack(f"<{len(sums)}Q", *sums)
    trailer = Trailer(key, Shard(*vector["shard"]), np.array(sums, np.uint64))

    assert trailer.encode().hex() == by_hand.hex() == vector["encoded"]
    assert f"{checksum(trailer.encode()):016x}" == vector["xxh3_64"]


@pytest.mark.parametrize("vector", TRAILERS, ids=["one slice", "four slices"])
def test_a_trailer_is_read_back(vector: dict[str, Any]) -> None:
    trailer = Trailer.decode(memoryview(bytes.fromhex(vector["encoded"])))

    assert trailer.key.hex() == vector["key"]
    assert trailer.shard == Shard(*vector["shard"])
    assert trailer.checksums.tolist() == vector["checksums"]


@pytest.mark.parametrize("size", [0, 3, 47, 48, 79])
def test_a_cut_off_trailer_is_refused(size: int) -> None:
    encoded = bytes.fromhex(TRAILERS[1]["encoded"])

    with pytest.raises(ValueError, match="trailer"):
        Trailer.decode(encoded[:size])


@pytest.mark.parametrize("position", [0, 3, 4, 5, 6])
def test_a_trailer_of_another_kind_version_or_length_is_refused(position: int) -> None:
    encoded = bytearray.fromhex(TRAILERS[1]["encoded"])
    encoded[position] ^= 1

    with pytest.raises(ValueError, match="trailer"):
        Trailer.decode(bytes(encoded))


def test_a_slice_checksum_is_xxh3_64_with_seed_0() -> None:
    # From the published test vectors of XXH3.
    assert checksum(b"") == 0x2D06800538D394C2
