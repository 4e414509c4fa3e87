"""The residency directory's bytes, which daemons and clients of different versions share."""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from kvservice_api.layout import Shard
from kvservice_api.residency_directory import (
    EMPTY_SLOT,
    SLOT,
    WITHDRAWN_SLOT,
    DirectoryState,
    Header,
    encode_slot,
    home_slot,
    home_slots,
    layout_mark,
    seal_slots,
)
from tests.wire.vectors import golden

DIRECTORY = golden("residency_directory")


def header_of(vector: dict[str, Any]) -> Header:
    ids = bytes.fromhex(vector["store_id"]), bytes.fromhex(vector["arena_id"])
    state = DirectoryState(vector["state"])
    return Header(*ids, vector["boot_epoch"], vector["slot_count"], state, vector["contents"])


@pytest.mark.parametrize("vector", DIRECTORY["headers"], ids=["building", "live", "with tails"])
def test_headers_are_the_golden_ones(vector: dict[str, Any]) -> None:
    header = header_of(vector)
    by_hand = b"KVRESDIR" + struct.pack("<II", 1, vector["state"]) + header.store_id + header.arena_id
    by_hand += struct.pack("<QQI", vector["boot_epoch"], vector["slot_count"], vector["contents"])

    assert header.encode().hex() == by_hand.hex() == vector["encoded"]
    assert Header.decode(by_hand) == header
    assert header.file_bytes == 4096 + 64 * vector["slot_count"]


@pytest.mark.parametrize("vector", DIRECTORY["slots"], ids=["in DRAM", "in both"])
def test_slots_are_the_golden_ones(vector: dict[str, Any]) -> None:
    key, mark = bytes.fromhex(vector["key"]), bytes.fromhex(vector["layout"])
    covered = struct.pack("<II", vector["flags"], vector["token_count"]) + mark
    covered += struct.pack(">4H", *vector["shard"]) + key
    by_hand = struct.pack("<I", crc32(covered)) + covered
    encoded = encode_slot(vector["flags"], vector["token_count"], mark, Shard(*vector["shard"]).encode(), key)

    assert encoded.hex() == by_hand.hex() == vector["encoded"]
    assert home_slot(key, 1 << 20) == vector["home_of_2_20"]
    assert home_slots(np.frombuffer(key, "<u8").reshape(1, 4), 1 << 20).tolist() == [vector["home_of_2_20"]]


def test_many_slots_at_once_are_the_same_as_one_by_one() -> None:
    slots = np.zeros(len(DIRECTORY["slots"]), SLOT)
    for slot, vector in zip(slots, DIRECTORY["slots"], strict=True):
        slot["flags"], slot["token_count"] = vector["flags"], vector["token_count"]
        slot["layout"], slot["key"] = bytes.fromhex(vector["layout"]), bytes.fromhex(vector["key"])
        slot["shard"] = Shard(*vector["shard"]).encode()
    seal_slots(slots)

    assert [slot.tobytes()[4:].hex() for slot in slots] == [vector["encoded"] for vector in DIRECTORY["slots"]]


def test_an_empty_slot_has_no_flags_and_a_withdrawn_one_no_tier() -> None:
    assert EMPTY_SLOT[4:] == bytes(56)
    assert WITHDRAWN_SLOT[4:] == struct.pack("<I", 4) + bytes(52)


def test_a_layout_is_identified_by_the_first_8_bytes_of_its_fingerprint() -> None:
    assert layout_mark(bytes(range(32))) == bytes(range(8))


@pytest.mark.parametrize("position", [0, 7, 8, 12, 56])
def test_a_header_of_another_kind_version_state_or_size_is_refused(position: int) -> None:
    encoded = bytearray.fromhex(DIRECTORY["headers"][0]["encoded"])
    encoded[position] ^= 0x41

    with pytest.raises(ValueError, match=r"."):
        Header.decode(bytes(encoded))


@pytest.mark.parametrize("size", [0, 8, 63])
def test_a_cut_off_header_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cut off"):
        Header.decode(bytes.fromhex(DIRECTORY["headers"][0]["encoded"])[:size])
