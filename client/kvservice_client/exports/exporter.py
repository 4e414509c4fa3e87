"""Writes sessions and blocks of a daemon to an export file.

Blocks are loaded under a lease, as an engine loads them: the daemon verifies each, and it counts as a use. Blocks that
are gone when their turn comes are listed, and left out. The bytes of a group of blocks are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from kvservice_api.errors import BlockNotFound, ChecksumMismatch, DaemonTooOld, LeaseExpired
from kvservice_api.image import layer_starts
from kvservice_api.keys import BlockChain, split_keys
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import admin_pb2, sessions_pb2
from kvservice_client.block_cache import BlockCache
from kvservice_client.client import Client
from kvservice_client.exports.export_file import BlockName, ExportWriter, LayoutRecord, slice_sizes

_GROUP_BYTES = 32 * 2**20  # Blocks that are taken together, or a single larger one.
_GROUP_BLOCKS = 64
_SLICES_MAX = 2**20
_ATTEMPTS = 3


class CyclicChain(Exception):
    """Each of these blocks continues another of them, so none is the first. No hash makes such keys."""


class Exporter:
    """One export. What `writer` has already is left out, so an export can be continued."""

    def __init__(self, client: Client, writer: ExportWriter, on_block: Callable[[], None] = lambda: None) -> None:
        """`on_block` is called for each block that was written, left out, or missing."""
        self._client = client
        self._writer = writer
        self._on_block = on_block
        self._caches: dict[tuple[bytes, Shard], BlockCache] = {}
        self._layouts = {each.fingerprint: Layout.from_proto(each.layout) for each in client.admin.list_layouts()}
        self._keys_before = {key for key, _ in writer.contents.blocks}
        self.missing: dict[bytes, str] = {}  # Key -> the session that names it, if there is one.

    def session(self, session_id: str, fingerprint: bytes) -> None:
        """The blocks of a session, then its manifest. Raises SessionNotFound."""
        if (fingerprint, session_id) in self._writer.contents.sessions:
            return
        session = self._client.admin.get_session(session_id, fingerprint).session
        keys = dict.fromkeys(split_keys(session.slices.keys, field="slices", count_max=_SLICES_MAX))
        self._blocks(self._shards_of(keys, session_id), session_id)
        self._write_session(session)

    def chain(self, key: bytes) -> None:
        """A block, and before it the stored blocks that it continues. Raises BlockNotFound, CyclicChain."""
        keys: dict[bytes, None] = {}
        shards = self._client.admin.inspect(key).shards
        while shards:
            if shards[0].key in keys:
                raise CyclicChain(f"block {shards[0].key.hex()} continues itself, over {len(keys)} blocks")
            keys[shards[0].key] = None
            try:
                shards = self._client.admin.inspect(shards[0].parent_key).shards
            except BlockNotFound:  # The root, or a block that is gone.
                break
        self._blocks(self._shards_of(reversed(keys)))

    def layout(self, fingerprint: bytes) -> None:
        """All sessions and blocks of a layout."""
        for session in self._client.admin.list_sessions(layout_fingerprint=fingerprint):
            self.session(session.session_id, fingerprint)
        self._blocks(self._client.admin.list_blocks(layout_fingerprint=fingerprint))

    def end(self) -> None:
        self._writer.end(len(self.missing))

    def _write_session(self, session: sessions_pb2.Session) -> None:
        self._layout(session.layout_fingerprint)
        self._writer.session(session)

    def _shards_of(self, keys: Iterable[bytes], session_id: str = "") -> Iterator[admin_pb2.StoredBlock]:
        for key in keys:
            try:
                yield from self._client.admin.inspect(key).shards
            except BlockNotFound:
                if key not in self._keys_before:
                    self._miss(key, session_id)

    def _miss(self, key: bytes, session_id: str) -> None:
        self.missing.setdefault(key, session_id)
        self._on_block()

    def _blocks(self, blocks: Iterable[admin_pb2.StoredBlock], session_id: str = "") -> None:
        """Write those that are not in the file yet, some at a time: those of one shard by one load.

        Which blocks are taken together does not depend on what the file has, so that their order in it does not.
        """
        taken: list[BlockName] = []
        size_bytes = 0
        for each in blocks:
            shard = Shard.from_proto(each.shard)
            name = BlockName(each.key, each.parent_key, each.layout_fingerprint, shard, each.token_count)
            more_bytes = sum(slice_sizes(self._layouts[name.fingerprint], name))
            if taken and (size_bytes + more_bytes > _GROUP_BYTES or len(taken) == _GROUP_BLOCKS):
                self._by_shard(taken, session_id)
                taken, size_bytes = [], 0
            taken.append(name)
            size_bytes += more_bytes
        self._by_shard(taken, session_id)

    def _by_shard(self, names: list[BlockName], session_id: str) -> None:
        groups: dict[tuple[bytes, Shard], list[BlockName]] = {}
        for name in names:
            if (name.key, name.shard) in self._writer.contents.blocks:
                self._on_block()
            else:
                groups.setdefault((name.fingerprint, name.shard), []).append(name)
        for (fingerprint, shard), group in groups.items():
            self._group(self._cache(fingerprint, shard), group, session_id)

    def _group(self, cache: BlockCache, names: list[BlockName], session_id: str) -> None:
        attempts = 0
        while names:
            try:
                written = self._load(cache, names)
            except (ChecksumMismatch, LeaseExpired):  # The daemon has dropped a damaged block, or has restarted.
                attempts += 1
                if attempts > _ATTEMPTS + len(names):
                    raise
                continue
            if not written:
                self._miss(names[0].key, session_id)
            names = names[max(1, written) :]

    def _load(self, cache: BlockCache, names: list[BlockName]) -> int:
        """Write the leading blocks that are stored. Returns their number."""
        keys, counts = tuple(name.key for name in names), tuple(name.token_count for name in names)
        with cache.lookup(BlockChain(names[0].parent_key, keys, counts)) as lease:
            if not lease.hit_blocks:
                return 0
            layers = [layer.data for layer in lease.load()]
        names = names[: lease.hit_blocks]
        starts = layer_starts(cache.layout, cache.shard, lease.token_counts)
        for at, name in enumerate(names):
            pieces = zip(layers, starts, strict=True)
            self._writer.block(name, [data[begins[at] : begins[at + 1]] for data, begins in pieces])
            self._on_block()
        return len(names)

    def _cache(self, fingerprint: bytes, shard: Shard) -> BlockCache:
        if (fingerprint, shard) not in self._caches:
            self._caches[fingerprint, shard] = self._client.open_layout(self._layout(fingerprint), shard)
        return self._caches[fingerprint, shard]

    def _layout(self, fingerprint: bytes) -> Layout:
        """The layout. Its record comes before its first block or session."""
        layout = self._layouts[fingerprint]
        if fingerprint not in self._writer.contents.layouts:
            self._writer.layout(LayoutRecord(layout, generation_of(self._client.open_layout(layout))))
        return layout


def generation_of(cache: BlockCache) -> int:
    """The key generation of a layout; 0 in a daemon that keeps none."""
    try:
        return cache.generation()
    except DaemonTooOld:
        return 0
