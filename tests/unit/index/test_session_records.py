"""The bytes of a session in the index, and how damage is found."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvservice.index.session_records import SLICE, Manifest, decode_manifest, encode_manifest, session_name

GOLDEN = (
    "010100000400000009000000000000000a000000000000000b000000000000000c0000000000000003000000020000000100000000000000"
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    "010101010101010101010101010101010101010101010101010101010101010101000000010000001000000000000000ffffffffffffffff"
    "0000000000000000000000000000000000000000000000000000000000000000000000000500000005000000ffffffff0100000000000000"
    "0700000000000000"
)


def some_manifest() -> Manifest:
    slices = np.zeros(2, SLICE)
    slices["key"] = np.frombuffer(bytes([1] * 32 + [0] * 32), "V32")
    slices["first_token"] = [1, 0]
    slices["token_count"] = [1, 5]
    slices["block_tokens"] = [16, 5]
    slices["positions_at"] = [0, -1]
    slices["stored_position"] = [-1, 1]
    return Manifest("chat/7", 4, 9, b"\xaa" * 32, slices, np.array([7], np.uint64), True, 3, 10, 11, 12)


def test_the_bytes_on_disk_are_the_golden_ones() -> None:
    value = encode_manifest(some_manifest())

    assert value[:-4].hex() == GOLDEN
    assert value[-4:].hex() == "0c09d116"


def test_a_manifest_comes_back_as_it_was() -> None:
    manifest = some_manifest()

    found = decode_manifest(manifest.name, encode_manifest(manifest))

    assert found is not None
    for field in dataclasses.fields(Manifest):
        before, after = getattr(manifest, field.name), getattr(found, field.name)
        assert before.tobytes() == after.tobytes() if isinstance(before, np.ndarray) else before == after, field.name


def test_a_flipped_bit_anywhere_is_found() -> None:
    manifest = some_manifest()
    value = bytearray(encode_manifest(manifest))
    for bit in range(len(value) * 8):
        value[bit // 8] ^= 1 << bit % 8
        assert decode_manifest(manifest.name, bytes(value)) is None, f"bit {bit}"
        value[bit // 8] ^= 1 << bit % 8


def test_a_record_under_another_name_or_of_another_length_is_not_trusted() -> None:
    manifest = some_manifest()
    value = encode_manifest(manifest)

    assert decode_manifest(session_name(4, "chat/8"), value) is None
    assert decode_manifest(session_name(5, "chat/7"), value) is None
    for wrong in (b"", value[:-1], value[:50], value + bytes(56)):
        assert decode_manifest(manifest.name, wrong) is None


def test_numbers_that_contradict_each_other_are_not_trusted() -> None:
    for column, number in (("token_count", 0), ("first_token", 1), ("block_tokens", 4), ("positions_at", 1)):
        manifest = some_manifest()
        manifest.slices[column][1] = number
        assert decode_manifest(manifest.name, encode_manifest(manifest)) is None, column
    nothing = dataclasses.replace(some_manifest(), slices=some_manifest().slices[:1])
    assert decode_manifest(nothing.name, encode_manifest(nothing)) is not None
