"""The files beside the arena have the same bytes in every release, because containers may have different releases."""

from __future__ import annotations

import pytest

from kvservice_api import arena
from kvservice_api.arena import ArenaHeader

ARENA, STORE = bytes(range(16)), bytes(range(100, 116))
HEADERS = {
    False: "4b564152454e4132000102030405060708090a0b0c0d0e0f6465666768696a6b"
    "6c6d6e6f7071727300f0ff00000000000000000000000000d52eba31ce7696f0",
    True: "4b564152454e4132000102030405060708090a0b0c0d0e0f6465666768696a6b"
    "6c6d6e6f7071727300f0ff000000000001000000000000006997d2ce7336686f",
}


@pytest.mark.parametrize("has_generations", [False, True])
def test_the_header_is_the_golden_one(has_generations: bool) -> None:
    header = ArenaHeader(ARENA, STORE, 0xFFF000, has_generations)
    assert header.encode().hex() == HEADERS[has_generations]
    assert ArenaHeader.decode(header.encode() + b"more") == header


def test_no_header_with_a_flipped_bit_is_taken_for_one() -> None:
    whole = ArenaHeader(ARENA, STORE, 1 << 40, True).encode()
    assert len(whole) == arena.HEADER_BYTES == 64
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"header is damaged|not an arena of this version"):
            ArenaHeader.decode(bytes(damaged))
    with pytest.raises(ValueError, match="cut off"):
        ArenaHeader.decode(whole[:-1])


def test_generations_are_one_word_per_page_after_a_header_of_one_page() -> None:
    assert arena.encode_generations_header(ARENA).hex() == "4b5647454e455231" + ARENA.hex()
    assert arena.are_generations_of(arena.encode_generations_header(ARENA) + bytes(4072), ARENA)
    assert not arena.are_generations_of(arena.encode_generations_header(STORE), ARENA)
    assert [arena.generations_file_bytes(pages * 4096) for pages in (1, 1024, 1025)] == [8192, 8192, 12288]
    assert arena.generation_index(3 * 4096) == 3


def test_a_writers_file_has_a_place_of_16_bytes_for_each_extent() -> None:
    head = arena.encode_writer_header(ARENA)
    assert head.hex() == "4b56575249544531" + ARENA.hex() + 8 * "00"
    notes = [(4096, 8192), (0, 0), (1 << 40, 4096)]
    data = head + b"".join(arena.WRITER_NOTE.pack(*note) for note in notes) + b"half of one"
    assert data[32:48].hex() == "0010000000000000" + "0020000000000000"
    assert arena.writer_notes(data, ARENA) == [(32, 4096, 8192), (64, 1 << 40, 4096)]
    assert arena.writer_notes(data, STORE) == arena.writer_notes(b"", ARENA) == []
