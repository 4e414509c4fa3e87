"""Stores the sessions and blocks of an export file in a daemon.

Blocks are saved as an engine saves them: the daemon compares their checksums before they are visible. Blocks that it
has already are not sent, so an import that was interrupted is repeated. Two groups of blocks are in memory at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from kvservice_api.errors import InvalidRequest, KVError, SessionChanged, SessionNotFound
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import sessions_pb2
from kvservice_client.block_cache import BlockCache
from kvservice_client.buffers import Bytes
from kvservice_client.client import Client
from kvservice_client.exports.export_file import (
    BlockRecord,
    DamagedFile,
    EndRecord,
    ExportReader,
    LayoutRecord,
    Record,
    slice_sizes,
)
from kvservice_client.exports.exporter import generation_of
from kvservice_client.transports.base import Durability

_GROUP_BYTES_MAX = 32 * 2**20  # Of one save, or a single larger block.
_GROUP_DRAM_SHARE = 1 / 8  # A save needs space for all of its blocks at once.
_GROUP_BLOCKS = 64


class OtherGeneration(Exception):
    """Engines of the target would not find the blocks of a layout: their keys are of another key generation."""


class BlockRefused(Exception):
    """The target did not store a block. Those before it are stored."""

    def __init__(self, key: bytes, error: KVError) -> None:
        super().__init__(f"block {key.hex()} was refused: {error.message}")
        self.error = error


@dataclass(slots=True)
class Imported:
    """Counts; `conflicts` are sessions that exist in the target with other content, `refused` those that the target
    does not take, `incomplete` those of which blocks are missing in the target after the import: fingerprint of the
    layout, and session id -> why.
    """

    layouts: int = 0
    blocks: int = 0
    already_stored: int = 0
    sessions: int = 0
    missing: int = 0  # In the daemon of the export.
    conflicts: dict[tuple[bytes, str], str] = field(default_factory=dict)
    refused: dict[tuple[bytes, str], str] = field(default_factory=dict)
    incomplete: dict[tuple[bytes, str], str] = field(default_factory=dict)


class Importer:
    """One import."""

    def __init__(
        self,
        client: Client,
        *,
        any_generation: bool = False,
        replace: bool = False,
        on_record: Callable[[int], None] = lambda offset: None,
    ) -> None:
        """`any_generation` also stores blocks of another key generation. `replace` replaces sessions that exist with
        other content. `on_record` is called with the offset in the file after each record.
        """
        self._client = client
        self._any_generation = any_generation
        self._replace = replace
        self._on_record = on_record
        status = client.admin.status()
        self._durability = Durability.SSD if status.ssd.configured_bytes else Durability.DRAM
        self._group_bytes = min(_GROUP_BYTES_MAX, int(status.dram.configured_bytes * _GROUP_DRAM_SHARE))
        self.block_bytes_max = status.dram.configured_bytes  # A larger block cannot be stored.
        self._layouts: dict[bytes, Layout] = {}
        self._caches: dict[tuple[bytes, Shard], BlockCache] = {}
        self._group: list[BlockRecord] = []
        self._sessions: list[tuple[bytes, str]] = []
        self.imported = Imported()

    def run(self, reader: ExportReader) -> Imported:
        """Store all of it. Raises DamagedFile, OtherGeneration, BlockRefused, KVError, OSError; what came before is
        stored, and counted in `imported`.
        """
        try:
            for record in reader:
                self._take(record)
                self._on_record(reader.offset)
        except (DamagedFile, OSError):
            self._end()
            raise
        self._end()
        return self.imported

    def _take(self, record: Record) -> None:
        if isinstance(record, BlockRecord):
            self._add(record)
            return
        self._save_group()
        if isinstance(record, LayoutRecord):
            self._open(record)
        elif isinstance(record, EndRecord):
            self.imported.missing = record.missing
        else:
            self._restore(record)

    def _end(self) -> None:
        self._save_group()
        for name in self._sessions:
            self._check_session(*name)

    def _open(self, record: LayoutRecord) -> None:
        cache = self._client.open_layout(record.layout)
        here = generation_of(cache)
        if here != record.generation and not self._any_generation:
            raise OtherGeneration(
                f"the layout {record.layout.fingerprint.hex()} has the key generation {here} here, and "
                f"{record.generation} in the file"
            )
        self._layouts[record.layout.fingerprint] = record.layout
        self.imported.layouts += 1

    def _add(self, record: BlockRecord) -> None:
        group = self._group
        if group and (
            (group[0].name.fingerprint, group[0].name.shard) != (record.name.fingerprint, record.name.shard)
            or len(group) == _GROUP_BLOCKS
            or sum(len(each.slices) for each in group) + len(record.slices) > self._group_bytes
        ):
            self._save_group()
        self._group.append(record)

    def _save_group(self) -> None:
        group, self._group = self._group, []
        if not group:
            return
        name = group[0].name
        layout = self._layouts[name.fingerprint]
        cache = self._caches.setdefault((name.fingerprint, name.shard), self._client.open_layout(layout, name.shard))
        new = self._not_stored(cache, group)
        saves: list[tuple[BlockChain, list[Bytes]]] = []
        for each in new:
            chain = BlockChain(each.name.parent_key, (each.name.key,), (each.name.token_count,))
            ends = accumulate(slice_sizes(layout, each.name), initial=0)
            saves.append((chain, [each.slices[begin:end] for begin, end in pairwise(ends)]))
        for each, result in zip(new, cache.save_many(saves, self._durability), strict=True):
            for _, error in result.refused:
                raise BlockRefused(each.name.key, error)
            self.imported.blocks += result.stored
            self.imported.already_stored += result.already_stored
        self.imported.already_stored += len(group) - len(new)

    @staticmethod
    def _not_stored(cache: BlockCache, group: list[BlockRecord]) -> list[BlockRecord]:
        new: list[BlockRecord] = []
        while group:
            keys, counts = tuple(each.name.key for each in group), tuple(each.name.token_count for each in group)
            stored = cache.contains(BlockChain(group[0].name.parent_key, keys, counts))
            new += group[stored : stored + 1]
            group = group[stored + 1 :]
        return new

    def _restore(self, session: sessions_pb2.Session) -> None:
        admin, name = self._client.admin, (session.layout_fingerprint, session.session_id)
        try:
            try:
                admin.restore_session(session)
            except SessionChanged as error:
                if not self._replace:
                    self.imported.conflicts[name] = error.message
                    return
                now = admin.get_session(session.session_id, session.layout_fingerprint).session
                admin.restore_session(session, now.revision)
        except InvalidRequest as error:  # It contradicts itself, under right checksums.
            self.imported.refused[name] = error.message
            return
        self.imported.sessions += 1
        self._sessions.append(name)

    def _check_session(self, fingerprint: bytes, session_id: str) -> None:
        """Whether the target has all blocks of a session: it may be too small, or the export may have lacked some."""
        try:
            found = self._client.admin.get_session(session_id, fingerprint)
        except SessionNotFound as error:
            self.imported.incomplete[fingerprint, session_id] = error.message
            return
        if found.stored_slices < found.session.slice_count:
            tokens = f"{found.stored_tokens} of {found.session.token_count} tokens"
            self.imported.incomplete[fingerprint, session_id] = f"its first {tokens} are stored"
