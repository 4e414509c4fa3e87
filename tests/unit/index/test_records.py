"""Index records: the bytes of the disk format, and how damage is found."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from kvservice.index.records import RECORD, Records, decode_records, encode_records, new_records
from kvservice.store.caller import DEFAULT_TENANT
from tests.unit.index_samples import some_keys, some_records

GOLDEN_KEY = bytes(range(40))
GOLDEN_VALUE = (
    "0100030004030201010000000500000000100000000000000020000000000000"
    "efcdab89674523010a000000000000000b000000000000000c00000000000000"
    "ff00000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000"
)


# Of a version without pins, the version of GOLDEN_VALUE: zeros instead of the end of a pin.
PINNED_AT = 96
TENANT_AT = 104  # Likewise, of a version without tenants.


def golden_record() -> Records:
    record = new_records(1)
    for name, value in {
        "segment": 3,
        "layout_id": 0x01020304,
        "token_count": 1,
        "hits": 5,
        "offset_bytes": 4096,
        "size_bytes": 8192,
        "trailer_checksum": 0x0123456789ABCDEF,
        "stored_at_ms": 10,
        "used_at_ms": 11,
        "access_seq": 12,
        "parent_key": np.void(b"\xff" + bytes(31)),
    }.items():
        record[name] = value
    return record


def test_the_bytes_on_disk_are_the_golden_ones() -> None:
    [value] = encode_records([GOLDEN_KEY], golden_record())

    assert len(value) == 120
    assert value[:-4].hex() == GOLDEN_VALUE
    assert value[-4:].hex() == "4052a2ba"


def test_the_end_of_a_pin_stands_where_older_versions_had_zeros() -> None:
    pinned = golden_record()
    pinned["pinned_until_ms"] = 0x0102030405060708

    [value] = encode_records([GOLDEN_KEY], pinned)

    assert value[PINNED_AT : PINNED_AT + 8].hex() == "0807060504030201"
    assert value[:PINNED_AT].hex() + bytes(8).hex() + value[PINNED_AT + 8 : -4].hex() == GOLDEN_VALUE


def test_the_tenant_stands_where_older_versions_had_zeros_and_is_the_default_one_in_their_records() -> None:
    record = golden_record()
    record["tenant"] = 0x01020304

    [value] = encode_records([GOLDEN_KEY], record)

    assert value[TENANT_AT : TENANT_AT + 4].hex() == "04030201"
    assert value[:TENANT_AT].hex() + bytes(4).hex() + value[TENANT_AT + 4 : -4].hex() == GOLDEN_VALUE
    [old] = encode_records([GOLDEN_KEY], golden_record())
    sound, records = decode_records([GOLDEN_KEY, GOLDEN_KEY], [value, old])
    assert sound.all()
    assert records["tenant"].tolist() == [0x01020304, DEFAULT_TENANT.number]


def test_a_record_of_before_there_were_pins_is_read_as_unpinned() -> None:
    old = bytes.fromhex(GOLDEN_VALUE) + bytes.fromhex("4052a2ba")

    sound, records = decode_records([GOLDEN_KEY], [old])

    assert sound.all()
    assert records["pinned_until_ms"].tolist() == [0]
    assert records["trailer_checksum"].tolist() == [0x0123456789ABCDEF]


def test_records_come_back_as_they_were() -> None:
    keys, records = some_keys(100), some_records(100)
    records["access_seq"] = records["pinned_until_ms"] = 2**64 - 1
    records["parent_key"][5] = np.void(b"ends in zeros" + bytes(19))

    sound, decoded = decode_records(keys, encode_records(keys, records))

    assert sound.all()
    for name in RECORD.names or ():
        if name != "crc":
            assert (decoded[name] == records[name]).all(), name
    assert bytes(decoded["parent_key"][5]) == b"ends in zeros" + bytes(19)


def test_encoding_changes_no_record_of_the_caller() -> None:
    records = some_records(3)
    before = records.tobytes()

    encode_records(some_keys(3), records)

    assert records.tobytes() == before


def test_records_taken_by_stride_are_encoded_like_copies() -> None:
    keys, records = some_keys(8), some_records(8)

    assert encode_records(keys[::2], records[::2]) == encode_records(keys, records)[::2]


def test_a_flipped_bit_anywhere_in_key_or_record_is_found() -> None:
    [key], [value] = some_keys(1), encode_records(some_keys(1), some_records(1))
    whole = bytearray(key + value)
    for bit in range(len(whole) * 8):
        whole[bit // 8] ^= 1 << bit % 8
        sound, _ = decode_records([bytes(whole[:40])], [bytes(whole[40:])])
        whole[bit // 8] ^= 1 << bit % 8
        assert not sound[0], f"bit {bit}"


def test_a_record_under_another_key_is_found() -> None:
    keys = some_keys(2)
    values = encode_records(keys, some_records(2))

    sound, _ = decode_records(keys, values[::-1])

    assert not sound.any()


def test_values_and_keys_of_a_wrong_length_do_not_hide_their_neighbours() -> None:
    keys, values = some_keys(5), encode_records(some_keys(5), some_records(5))
    values[1] = values[1][:-1]
    values[2] = b""
    values[3] += values[3]
    keys.append(b"short")
    values.append(values[0])

    sound, records = decode_records(keys, values)

    assert sound.tolist() == [True, False, False, False, True, False]
    assert records["offset_bytes"].tolist()[4] == 4 * 4096


def test_a_record_that_says_nothing_or_speaks_of_another_version_is_not_sound() -> None:
    keys, records = some_keys(3), some_records(3)
    values = encode_records(keys, records)
    for row, field in enumerate(("version", "size_bytes", "token_count")):
        wrong = records[row : row + 1].copy()
        wrong[field] = 0 if field != "version" else 2
        body = wrong.tobytes()[:-4]  # The crc is right each time: only the content is wrong.
        values[row] = body + crc32(keys[row] + body).to_bytes(4, "little")

    sound, _ = decode_records(keys, values)

    assert not sound.any()
