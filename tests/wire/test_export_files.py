"""Export files: the bytes of each record, and what a reader refuses."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest

from kvservice_api.image import checksum
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import sessions_pb2
from kvservice_client.exports.export_file import (
    HEAD_BYTES,
    BlockName,
    BlockRecord,
    DamagedFile,
    EndRecord,
    ExportReader,
    ExportWriter,
    LayoutRecord,
    ResumedFile,
    UnusableFile,
)
from tests.wire.vectors import golden

LAYOUT = Layout("golden", "float16", layers=3, kv_heads=2, k_head_dim=2, v_head_dim=1, block_tokens=4)
BLOCK = BlockName(bytes(range(32)), bytes(range(32, 64)), LAYOUT.fingerprint, Shard(1, 3, 0, 1), 3)
SLICES = [np.arange(18, dtype=np.uint8), np.arange(100, 118, dtype=np.uint8)]
GOLDEN = bytes.fromhex("".join(golden("export_file")))


def session() -> sessions_pb2.Session:
    made = sessions_pb2.Session(session_id="chat", layout_fingerprint=LAYOUT.fingerprint, revision=7, tip=bytes(32))
    made.slices.keys = BLOCK.key
    made.slices.positions.add(slice=0, positions=[5, 9, 11])
    made.created_at.FromMilliseconds(1_700_000_000_123)
    made.used_at.FromMilliseconds(1_800_000_000_000)
    return made


def written() -> bytes:
    stream = io.BytesIO()
    writer = ExportWriter(stream)
    writer.layout(LayoutRecord(LAYOUT, 0x0123456789ABCDEF))
    writer.block(BLOCK, SLICES)
    writer.session(session())
    writer.end(missing=2)
    assert writer.bytes_written == len(stream.getvalue())
    return stream.getvalue()


def test_a_file_is_the_golden_one() -> None:
    assert written().hex() == GOLDEN.hex()


def test_a_reader_returns_what_was_written() -> None:
    layout, block, found, end = ExportReader(io.BytesIO(GOLDEN))
    assert layout == LayoutRecord(LAYOUT, 0x0123456789ABCDEF)
    assert isinstance(block, BlockRecord)
    assert block.name == BLOCK
    assert np.array_equal(block.slices, np.concatenate(SLICES))
    without_times = session()
    without_times.ClearField("used_at")
    assert found == without_times
    assert end == EndRecord(layouts=1, sessions=1, blocks=1, missing=2)


def test_every_changed_bit_and_every_cut_is_noticed() -> None:
    for position in range(len(GOLDEN)):
        for bit in range(8):
            damaged = bytearray(GOLDEN)
            damaged[position] ^= 1 << bit
            with pytest.raises(UnusableFile):
                list(ExportReader(io.BytesIO(damaged)))
        with pytest.raises(UnusableFile):
            list(ExportReader(io.BytesIO(GOLDEN[:position])))


def test_a_file_that_was_cut_anywhere_continues_after_its_last_whole_record() -> None:
    for end in range(len(GOLDEN)):
        resumed = ResumedFile.read(io.BytesIO(GOLDEN[:end]), end)
        assert not resumed.is_complete
        assert resumed.offset + resumed.dropped_bytes == end
        stream = io.BytesIO(GOLDEN[: resumed.offset])
        stream.seek(resumed.offset)
        writer = ExportWriter(stream, resumed.contents)
        if LAYOUT.fingerprint not in writer.contents.layouts:
            writer.layout(LayoutRecord(LAYOUT, 0x0123456789ABCDEF))
        if not writer.contents.blocks:
            writer.block(BLOCK, SLICES)
        if not writer.contents.sessions:
            writer.session(session())
        writer.end(missing=2)
        assert stream.getvalue() == GOLDEN
    assert ResumedFile.read(io.BytesIO(GOLDEN), len(GOLDEN)).is_complete


def test_a_damaged_record_is_named_by_its_offset() -> None:
    damaged = bytearray(GOLDEN)
    damaged[-1] ^= 1
    offset = len(GOLDEN) - 32 - 32
    with pytest.raises(DamagedFile, match=f"the record at byte {offset} is damaged") as caught:
        list(ExportReader(io.BytesIO(damaged)))
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("kind", "size"), [(1, 2**27), (2, 112 + 144 + 1), (2, 2**39), (3, 2**27), (4, 33), (5, 1), (99, 0)]
)
def test_a_record_that_promises_more_than_its_kind_has_is_refused_before_it_is_read(kind: int, size: int) -> None:
    stream = io.BytesIO()
    ExportWriter(stream).layout(LayoutRecord(LAYOUT, 0))
    offset = len(stream.getvalue())
    head = struct.pack("<IIQ", kind, 0, size)
    stream.write(head + struct.pack("<Q", checksum(head)))
    end = stream.tell()
    stream.write(bytes(100))
    stream.seek(0)

    with pytest.raises(DamagedFile, match=f"the record at byte {offset} contradicts itself: .* {size} bytes"):
        list(ExportReader(stream))
    assert stream.tell() == end


def records_at(data: bytes) -> list[tuple[int, int]]:
    """Begin and end of each record."""
    places, begin = [], HEAD_BYTES
    while begin < len(data):
        end = begin + 16 + 8 + int.from_bytes(data[begin + 8 : begin + 16], "little") + 8
        places.append((begin, end))
        begin = end
    return places


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("has_size", [True, False])
def test_a_damaged_record_is_skipped_and_the_others_are_read(number: int, has_size: bool) -> None:
    begin, end = records_at(GOLDEN)[number]
    for position in range(begin + 24, end):
        damaged = bytearray(GOLDEN)
        damaged[position] ^= 1
        reader = ExportReader(io.BytesIO(damaged), len(GOLDEN) if has_size else None, skips_damaged=True)
        found = iter(reader)
        kinds = []
        if number == 3:
            kinds += [type(next(found)) for _ in range(3)]
            with pytest.raises(DamagedFile, match="is missing: the file was cut off"):
                next(found)
        else:
            kinds += [type(each) for each in found]
        whole = [LayoutRecord, BlockRecord, sessions_pb2.Session, EndRecord]
        # Without their layout, blocks and sessions have no meaning.
        assert kinds == ([EndRecord] if number == 0 else whole[:number] + whole[number + 1 :])
        assert reader.skipped[0].offset == begin
        assert reader.skipped_count == len(reader.skipped) == (3 if number == 0 else 1)
        assert [each.lacks_layout for each in reader.skipped[1:]] == [True] * reader.without_layout
        assert reader.without_layout == (2 if number == 0 else 0)


@pytest.mark.parametrize("has_size", [True, False])
def test_a_record_of_an_unknown_kind_is_skipped(has_size: bool) -> None:
    head = struct.pack("<IIQ", 99, 0, 0)
    begin, _ = records_at(GOLDEN)[1]
    data = GOLDEN[:begin] + head + struct.pack("<Q", checksum(head)) + bytes(8) + GOLDEN[begin:]
    reader = ExportReader(io.BytesIO(data), len(data) if has_size else None, skips_damaged=True)
    assert [type(each) for each in reader] == [LayoutRecord, BlockRecord, sessions_pb2.Session, EndRecord]
    assert "no record of kind 99 has 0 bytes" in reader.skipped[0].why


def test_the_blocks_of_a_damaged_layout_are_not_called_damaged() -> None:
    """Beside another layout, whose blocks are smaller or larger."""
    for other_tokens in (1, 64):
        other = Layout("other", "float16", 1, 1, 1, 1, block_tokens=other_tokens)
        stream = io.BytesIO()
        writer = ExportWriter(stream)
        writer.layout(LayoutRecord(other, 0))
        damaged = stream.tell() + 30
        writer.layout(LayoutRecord(LAYOUT, 0))
        writer.block(BLOCK, SLICES)
        writer.end(0)
        data = bytearray(stream.getvalue())
        data[damaged] ^= 1
        reader = ExportReader(io.BytesIO(data), block_bytes_max=2**20, skips_damaged=True)
        assert [type(each) for each in reader] == [LayoutRecord, EndRecord]
        assert [each.why.split(f"{each.offset} ")[1] for each in reader.skipped] == [
            "is damaged (layout)",
            "(block) cannot be used: the record of its layout is damaged",
        ]


def test_damaged_blocks_are_not_kept_in_memory() -> None:
    size_bytes, blocks = 2**20, 24
    layout = Layout("large", "float16", layers=1, kv_heads=1, k_head_dim=1024, v_head_dim=1024, block_tokens=256)
    stream = io.BytesIO()
    writer = ExportWriter(stream)
    writer.layout(LayoutRecord(layout, 0))
    for number in range(blocks):
        name = BlockName(bytes([number] * 32), BLOCK.parent_key, layout.fingerprint, Shard(0, 1, 0, 1), 256)
        writer.block(name, [np.zeros(size_bytes, np.uint8)])
        stream.getbuffer()[-100] ^= 1
    writer.end(0)
    stream.seek(0)

    tracemalloc.start()
    reader = ExportReader(stream, skips_damaged=True)
    assert [type(each) for each in reader] == [LayoutRecord, EndRecord]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reader.skipped_count == blocks
    assert peak_bytes < 6 * size_bytes


def test_what_follows_a_damaged_head_is_not_guessed() -> None:
    begin, _ = records_at(GOLDEN)[1]
    for position in range(begin, begin + 24):
        damaged = bytearray(GOLDEN)
        damaged[position] ^= 1
        with pytest.raises(DamagedFile, match=f"the record at byte {begin} is damaged in its head"):
            list(ExportReader(io.BytesIO(damaged), skips_damaged=True))


@pytest.mark.parametrize("has_size", [True, False])
def test_a_block_larger_than_the_reader_takes_is_skipped_unread(has_size: bool) -> None:
    class Watched(io.BytesIO):
        largest_read = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.largest_read = max(self.largest_read, size or 0)
            return super().read(size)

    large = Layout("large", "float16", layers=1, kv_heads=1, k_head_dim=2**16, v_head_dim=2**16, block_tokens=256)
    stream = Watched()
    writer = ExportWriter(stream)
    writer.layout(LayoutRecord(large, 0))
    name = BlockName(BLOCK.key, BLOCK.parent_key, large.fingerprint, Shard(0, 1, 0, 1), 256)
    writer.block(name, [np.zeros(large.block_tokens * 2**18, np.uint8)])
    writer.end(0)
    size = stream.tell()
    stream.seek(0)

    reader = ExportReader(stream, size if has_size else None, block_bytes_max=2**20, skips_damaged=True)
    assert [type(each) for each in reader] == [LayoutRecord, EndRecord]
    assert "bytes here" in reader.skipped[0].why
    assert stream.largest_read <= (2**20 if has_size else 2**26)


def test_what_a_record_promises_beyond_the_end_of_the_file_is_not_read() -> None:
    """A disk cannot have what the reader would set aside for it."""

    class Refusing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size < 1000
            return super().read(size)

    large = Layout("large", "float16", layers=64, kv_heads=8, k_head_dim=128, v_head_dim=128, block_tokens=256)
    stream = Refusing()
    ExportWriter(stream).layout(LayoutRecord(large, 0))
    start = stream.tell()
    head = struct.pack("<IIQ", 2, 0, 2**20)
    stream.write(head + struct.pack("<Q", checksum(head)))
    size = stream.tell()
    stream.seek(0)
    with pytest.raises(DamagedFile, match=f"byte {start} is cut off"):
        list(ExportReader(stream, size))


def test_records_out_of_order_are_refused() -> None:
    stream = io.BytesIO()
    ExportWriter(stream).block(BLOCK, SLICES)
    stream.seek(0)
    with pytest.raises(DamagedFile, match="contradicts itself"):
        list(ExportReader(stream))
