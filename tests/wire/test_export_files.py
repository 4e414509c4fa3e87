"""Export files: the bytes of each record, and what a reader refuses."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from kvservice_api.image import checksum
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import sessions_pb2
from kvservice_client.exports.export_file import (
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


@pytest.mark.parametrize(("kind", "size"), [(1, 2**27), (2, 112 + 144 + 1), (2, 2**39), (3, 2**27), (4, 33), (5, 1)])
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


def test_records_out_of_order_are_refused() -> None:
    stream = io.BytesIO()
    ExportWriter(stream).block(BLOCK, SLICES)
    stream.seek(0)
    with pytest.raises(DamagedFile, match="contradicts itself"):
        list(ExportReader(stream))
