"""The bytes of an export file: sessions and blocks for another daemon.

A head, then records, then an end record. Numbers are little-endian. A file can be written to a pipe and read from one::

    head     | "KVEXPORT" | version u32 | 0 u32 | xxh3-64 of the 16 bytes before, u64 |
    record   | kind u32 | 0 u32 | payload size u64 | xxh3-64 of the 16 bytes before, u64 |
             | payload | xxh3-64 of the payload, u64 |

    layout   fingerprint 32 | key generation u64 | Layout of types.proto
    block    key 32 | parent key 32 | fingerprint 32 | shard 4 u16: layers from, to, heads from, to | tokens u32 | 0 u32
             | the slices, layer after layer, each [K, V][head][token][dim]
    session  Session of sessions.proto, with slices, without times of use
    end      layouts u64 | sessions u64 | blocks u64 | blocks that were missing u64

A layout comes before its blocks and sessions, and the blocks of a session before the session. A file without an end
record was cut off. It has no tenant: blocks belong to the caller that imports them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from os import SEEK_CUR
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import xxhash
from google.protobuf.message import DecodeError

from kvservice_api.errors import KVError
from kvservice_api.image import checksum
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import sessions_pb2, types_pb2
from kvservice_client.buffers import Bytes

VERSION = 1
_MAGIC = b"KVEXPORT"
_HEAD = struct.Struct("<8sII")
_RECORD = struct.Struct("<IIQ")
_SUM = struct.Struct("<Q")
_LAYOUT = struct.Struct("<32sQ")
_BLOCK = struct.Struct("<32s32s32s4HII")
_END = struct.Struct("<4Q")
assert (_HEAD.size, _RECORD.size, _LAYOUT.size, _BLOCK.size, _END.size) == (16, 16, 40, 112, 32)  # The format.

HEAD_BYTES = _HEAD.size + _SUM.size
_RECORD_BYTES_MIN = _RECORD.size + 2 * _SUM.size
_MESSAGE_BYTES_MAX = 64 * 2**20  # Of a layout or session.
_READ_BYTES = 64 * 2**20
_SKIPPED_NAMED_MAX = 1000  # A file of a few bytes per damaged record must not take all memory.


class UnusableFile(Exception):
    """The file cannot be imported or continued; the message says why and where."""

    what_helps = "Name another file."


class DamagedFile(UnusableFile):
    """Bytes are not those that were written, or are missing, from the record at `offset` on."""

    what_helps = "If its export was interrupted, continue it with `kvctl export --resume`; else export again."

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"the record at byte {offset} {what}")
        self.offset = offset


class DamagedRecord(DamagedFile):
    """The record, of this kind, cannot be used. The next one begins at `end`."""

    def __init__(self, offset: int, what: str, kind: int, end: int) -> None:
        super().__init__(offset, what)
        self.kind, self.end = kind, end


class LayoutLeftOut(DamagedRecord):
    """The record may be whole, and has no meaning without a layout whose record is damaged."""

    def __init__(self, offset: int, kind: int, end: int) -> None:
        super().__init__(
            offset, f"({_Kind(kind).name.lower()}) cannot be used: the record of its layout is damaged", kind, end
        )


class SkippedRecord(NamedTuple):
    """In place of an exception, whose traceback keeps the record's bytes in memory."""

    offset: int
    why: str
    lacks_layout: bool


class _NoLayout(ValueError):
    """A record names a layout that was not read."""


class _Kind(IntEnum):
    LAYOUT = 1
    BLOCK = 2
    SESSION = 3
    END = 4


class LayoutRecord(NamedTuple):
    layout: Layout
    generation: int  # The layout's key generation in the daemon of the export; 0 if none was begun.


class BlockName(NamedTuple):
    """What a block is called, and of which tokens it is. One block of several shards has several names."""

    key: bytes
    parent_key: bytes
    fingerprint: bytes
    shard: Shard
    token_count: int


class BlockRecord(NamedTuple):
    name: BlockName
    slices: Bytes  # One after another.


class EndRecord(NamedTuple):
    layouts: int = 0
    sessions: int = 0
    blocks: int = 0
    missing: int = 0


Record = LayoutRecord | BlockRecord | sessions_pb2.Session | EndRecord


@dataclass(slots=True)
class Contents:
    """What is in a file so far. Names only: some 100 bytes per block."""

    layouts: set[bytes] = field(default_factory=set)
    sessions: set[tuple[bytes, str]] = field(default_factory=set)  # Fingerprint and id.
    blocks: set[tuple[bytes, Shard]] = field(default_factory=set)

    def add(self, record: LayoutRecord | BlockName | sessions_pb2.Session) -> None:
        if isinstance(record, LayoutRecord):
            self.layouts.add(record.layout.fingerprint)
        elif isinstance(record, BlockName):
            self.blocks.add((record.key, record.shard))
        else:
            self.sessions.add((record.layout_fingerprint, record.session_id))


class ExportWriter:
    """Appends records to a file or pipe. Raises OSError."""

    def __init__(self, stream: BinaryIO, contents: Contents | None = None) -> None:
        """Begins the file, unless `contents` are in it already."""
        self._stream = stream
        self.contents = contents or Contents()
        self.bytes_written = 0
        if contents is None:
            head = _HEAD.pack(_MAGIC, VERSION, 0)
            self._put(head, _SUM.pack(checksum(head)))

    def layout(self, record: LayoutRecord) -> None:
        head = _LAYOUT.pack(record.layout.fingerprint, record.generation)
        self._record(_Kind.LAYOUT, head, record.layout.to_proto().SerializeToString(deterministic=True))
        self.contents.add(record)

    def block(self, name: BlockName, slices: Sequence[Bytes]) -> None:
        """`slices` has one array of bytes per layer of the shard."""
        shard = (name.shard.layer_begin, name.shard.layer_end, name.shard.head_begin, name.shard.head_end)
        head = _BLOCK.pack(name.key, name.parent_key, name.fingerprint, *shard, name.token_count, 0)
        self._record(_Kind.BLOCK, head, *(each.data for each in slices))
        self.contents.add(name)

    def session(self, session: sessions_pb2.Session) -> None:
        kept = sessions_pb2.Session()
        kept.CopyFrom(session)
        kept.ClearField("used_at")
        kept.ClearField("expires_at")
        self._record(_Kind.SESSION, kept.SerializeToString(deterministic=True))
        self.contents.add(kept)

    def end(self, missing: int) -> None:
        """No record follows."""
        counts = (len(self.contents.layouts), len(self.contents.sessions), len(self.contents.blocks), missing)
        self._record(_Kind.END, _END.pack(*counts))
        self._stream.flush()

    def _record(self, kind: _Kind, *payload: bytes | memoryview) -> None:
        digest = xxhash.xxh3_64()
        for part in payload:
            digest.update(part)
        head = _RECORD.pack(kind, 0, sum(len(part) for part in payload))
        self._put(head, _SUM.pack(checksum(head)), *payload, _SUM.pack(digest.intdigest()))

    def _put(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self._stream.write(part)
            self.bytes_written += len(part)


class ExportReader:
    """Reads records, and verifies each before it returns it. Holds one record in memory at a time."""

    def __init__(
        self,
        stream: BinaryIO,
        size_bytes: int | None = None,
        *,
        block_bytes_max: int | None = None,
        skips_damaged: bool = False,
    ) -> None:
        """Reads the head. Raises UnusableFile, OSError.

        `size_bytes` is the size of the file, if it has one: nothing that a record promises beyond it is read. Blocks
        larger than `block_bytes_max` are not read. `skips_damaged` continues after records that cannot be used.
        """
        self._stream = stream
        self._size_bytes = size_bytes
        self._block_record_bytes_max = math.inf if block_bytes_max is None else _BLOCK.size + block_bytes_max
        self._skips_damaged = skips_damaged
        self.skipped: list[SkippedRecord] = []  # The first thousand.
        self.skipped_count = 0
        self.without_layout = 0  # Of them: records that may be whole, of layouts that were skipped.
        self._skipped_layouts = 0
        self.offset = 0  # Where the next record begins; all before it is whole, except for what was skipped.
        self.contents = Contents()
        self._layouts: dict[bytes, Layout] = {}
        self._payload_bytes_max: dict[int, float] = {
            _Kind.LAYOUT: _MESSAGE_BYTES_MAX,
            _Kind.BLOCK: 0,  # Until a layout says how large its blocks are.
            _Kind.SESSION: _MESSAGE_BYTES_MAX,
            _Kind.END: _END.size,
        }
        head = self._read(HEAD_BYTES)
        if head[: len(_MAGIC)] != _MAGIC[: len(head)] or not len(head):
            raise UnusableFile("it is not a file of `kvctl export`")
        if len(head) < HEAD_BYTES or checksum(head[: _HEAD.size]) != _SUM.unpack_from(head, _HEAD.size)[0]:
            raise DamagedFile(0, "is damaged or cut off")
        _, version, _ = _HEAD.unpack_from(head)
        if version != VERSION:
            raise UnusableFile(
                f"it has version {version} of the format, and this kvctl knows {VERSION}: use a newer one"
            )
        self.offset = HEAD_BYTES

    def __iter__(self) -> Iterator[Record]:
        """All records; the last one is the end record. Raises DamagedFile, OSError."""
        while True:
            try:
                record = self._next()
            except DamagedRecord as error:
                if not self._skips_damaged:
                    raise
                self.offset = error.end
                self.skipped_count += 1
                self.without_layout += isinstance(error, LayoutLeftOut)
                self._skipped_layouts += error.kind == _Kind.LAYOUT
                if len(self.skipped) < _SKIPPED_NAMED_MAX:
                    self.skipped.append(SkippedRecord(error.offset, str(error), isinstance(error, LayoutLeftOut)))
                continue
            yield record
            if isinstance(record, EndRecord):
                return

    def _next(self) -> Record:
        """The next record. Raises DamagedFile, OSError."""
        start = self.offset
        kind, size = self._record_head()
        end = start + _RECORD_BYTES_MIN + size
        if self._size_bytes is not None and end > self._size_bytes:
            raise DamagedFile(start, "is cut off")
        if size > self._payload_bytes_max.get(kind, -1):
            if self._skips_damaged:
                self._skip(start, size + _SUM.size)
            if kind == _Kind.BLOCK and self._skipped_layouts and size <= self._block_record_bytes_max:
                raise LayoutLeftOut(start, kind, end)
            raise DamagedRecord(start, f"contradicts itself: no record of kind {kind} has {size} bytes here", kind, end)
        body = self._read(size + _SUM.size)
        if len(body) < size + _SUM.size:
            raise DamagedFile(start, "is cut off")
        payload = body[:size]
        if checksum(payload) != _SUM.unpack_from(body, size)[0]:
            raise DamagedRecord(start, f"is damaged ({_Kind(kind).name.lower()})", kind, end)
        try:
            record = self._decoded(kind, payload)
        except _NoLayout as error:
            if self._skipped_layouts:
                raise LayoutLeftOut(start, kind, end) from None
            raise DamagedRecord(start, f"contradicts itself: {error}", kind, end) from None
        except (KVError, DecodeError, struct.error, ValueError, KeyError) as error:
            raise DamagedRecord(start, f"contradicts itself: {error}", kind, end) from error
        self.offset = end
        return record

    def _record_head(self) -> tuple[int, int]:
        """Kind and payload size of the next record.

        If it is damaged, the place of the next record is not known: bytes in a block may look like a record.
        """
        head = self._read(_RECORD.size + _SUM.size)
        if not len(head):
            raise DamagedFile(self.offset, "is missing: the file was cut off, or its export has not ended")
        if len(head) < _RECORD.size + _SUM.size:
            raise DamagedFile(self.offset, "is cut off")
        if checksum(head[: _RECORD.size]) != _SUM.unpack_from(head, _RECORD.size)[0]:
            raise DamagedFile(self.offset, "is damaged in its head: what follows cannot be read")
        kind, _, size = _RECORD.unpack_from(head)
        return kind, size

    def _decoded(self, kind: int, payload: memoryview) -> Record:
        record: Record
        if kind == _Kind.LAYOUT:
            fingerprint, generation = _LAYOUT.unpack_from(payload)
            message = types_pb2.Layout.FromString(bytes(payload[_LAYOUT.size :]))
            record = LayoutRecord(Layout.from_proto(message, fingerprint), generation)
            self._layouts[fingerprint] = record.layout
            block_bytes = min(_BLOCK.size + _largest_block_bytes(record.layout), self._block_record_bytes_max)
            self._payload_bytes_max[_Kind.BLOCK] = max(self._payload_bytes_max[_Kind.BLOCK], block_bytes)
            self.contents.add(record)
        elif kind == _Kind.BLOCK:
            record = self._block(payload)
            self.contents.add(record.name)
        elif kind == _Kind.SESSION:
            record = sessions_pb2.Session.FromString(bytes(payload))
            self._layout(record.layout_fingerprint)
            self.contents.add(record)
        else:
            record = EndRecord(*_END.unpack(payload))
            found = (len(self.contents.layouts), len(self.contents.sessions), len(self.contents.blocks))
            if found != record[:3] and not self.skipped_count:
                raise ValueError(f"the file has {found} layouts, sessions and blocks; the end record says {record[:3]}")
        return record

    def _block(self, payload: memoryview) -> BlockRecord:
        key, parent, fingerprint, *shard, tokens, _ = _BLOCK.unpack_from(payload)
        layout = self._layout(fingerprint)
        if not 1 <= tokens <= layout.block_tokens:
            raise ValueError(f"a block of {tokens} tokens")
        name = BlockName(key, parent, fingerprint, Shard(*shard).check(layout), tokens)
        slices = np.frombuffer(payload[_BLOCK.size :], np.uint8)
        size = sum(slice_sizes(layout, name))
        if len(slices) != size:
            raise ValueError(f"{len(slices)} bytes for slices of {size}")
        return BlockRecord(name, slices)

    def _layout(self, fingerprint: bytes) -> Layout:
        if fingerprint not in self._layouts:
            raise _NoLayout(f"the layout {fingerprint.hex()} is not before it")
        return self._layouts[fingerprint]

    def _read(self, size: int) -> memoryview:
        """So many bytes, or fewer at the end of the file. Memory grows with what arrives, not with what is promised."""
        data = bytearray()
        while len(data) < size and (part := self._stream.read(min(size - len(data), _READ_BYTES))):
            data += part
        return memoryview(data)

    def _skip(self, start: int, size: int) -> None:
        """Pass over so many bytes of the record at `start`."""
        if self._size_bytes is not None:
            self._stream.seek(size, SEEK_CUR)
            return
        while size:
            part = self._stream.read(min(size, _READ_BYTES))
            if not part:
                raise DamagedFile(start, "is cut off")
            size -= len(part)


def slice_sizes(layout: Layout, name: BlockName) -> list[int]:
    """The bytes of each layer's slice of a block."""
    first, end = name.shard.layer_begin, name.shard.layer_end
    return [layout.shard_slice_bytes(name.shard, layer, name.token_count) for layer in range(first, end)]


def _largest_block_bytes(layout: Layout) -> int:
    return sum(group.layers * group.slice_bytes(group.kv_heads, layout.block_tokens) for group in layout.groups)


class ResumedFile(NamedTuple):
    """A file that an export continues: what it has, where its last whole record ends, and what follows that."""

    contents: Contents | None  # None: not even a head.
    offset: int
    dropped_bytes: int
    is_complete: bool

    @classmethod
    def read(cls, stream: BinaryIO, size: int) -> Self:
        """Verifies the file up to its first record that is not whole. Raises UnusableFile if it is another's file."""
        try:
            reader = ExportReader(stream, size)
        except UnusableFile as error:
            if size and not (isinstance(error, DamagedFile) and size < HEAD_BYTES):
                raise
            return cls(None, 0, size, is_complete=False)
        try:
            for record in reader:
                if isinstance(record, EndRecord):
                    return cls(reader.contents, reader.offset, size - reader.offset, is_complete=True)
        except DamagedFile:
            pass
        return cls(reader.contents, reader.offset, size - reader.offset, is_complete=False)
