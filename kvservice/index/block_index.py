"""The index of all blocks and their tiers, in two LMDB environments of one schema.

* durable: in the store's directory, synced. Layouts, sessions, and a record of every block on SSD. The records of
  each tier below SSD are in a database of their own, ``blocks-NAME``.
* volatile: beside the arena, on its tmpfs. A record of every block in DRAM. It belongs to
  the arena: if store, schema or arena are not those it was created for, it is emptied.

Opening goes in two steps, because the arena needs the store's id and the volatile index the arena's::

    index = BlockIndex.open(store / "index", ...)     index.store_id    (opens or creates the arena)
    index.open_volatile(arena_directory / "index", arena_id, ...)
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvservice.blocks import OBJECT_KEY_BYTES, TierName
from kvservice.index import recovery
from kvservice.index.descriptor_secret import DESCRIPTORS_KEY, DescriptorSecret, open_secret
from kvservice.index.environment import BLOCKS, DATA_NAME, LAYOUTS, META, SESSIONS, Environment, is_older_copy
from kvservice.index.errors import StoreDamaged
from kvservice.index.identity import (
    SCHEMA,
    SCHEMA_AT_LEAST,
    SCHEMA_KEY,
    STORE_ID_BYTES,
    STORE_KEY,
    check_identity,
    check_schema,
    clear_blank,
    expect_index,
    schema_for,
    schema_of,
    traces_of_store,
)
from kvservice.index.layouts import NEXT_LAYOUT_KEY, LayoutEntries
from kvservice.index.records import BELOW_SSD, Records, encode_records
from kvservice.index.session_records import Manifest, decode_manifest, encode_manifest
from kvservice_api.errors import StorageFailed
from kvservice_api.layout import Layout

log = logging.getLogger(__name__)

# A file beside the volatile index: the number of its last transaction.
_NOTES_NAME = "index-transaction"

_ARENA_KEY = b"arena_id"
_SSD_FILES_KEY = b"ssd_files"
_VOLATILE_DIRECTORY_KEY = b"volatile_directory"
_EMPTIED_KEY = b"dram_emptied"
_META_KEYS = frozenset(
    (SCHEMA_KEY, STORE_KEY, DESCRIPTORS_KEY, NEXT_LAYOUT_KEY, _SSD_FILES_KEY, _VOLATILE_DIRECTORY_KEY, _EMPTIED_KEY)
)

#  | when, ms u64 | why, UTF-8 |     the last time that the DRAM tier lost its blocks; little-endian
_EMPTIED_AT = struct.Struct("<Q")


class Emptied(NamedTuple):
    """The last time that the DRAM tier lost its blocks."""

    at_ms: int
    why: str


class BlockIndex:
    """The index of one store. Call all methods from the event loop's thread."""

    def __init__(
        self,
        directory: Path,
        durable: Environment,
        meta: dict[bytes, bytes],
        layouts_max: int,
        below_ssd: Sequence[TierName] = (),
    ) -> None:
        """Use ``open``."""
        self.directory = directory
        self.store_id = meta[STORE_KEY]
        self._meta = meta
        self._databases = {TierName.DRAM: BLOCKS, TierName.SSD: BLOCKS, **_databases_of(below_ssd)}
        self._durable = durable
        self._volatile: Environment | None = None
        self.layout_entries = LayoutEntries(directory.parent, durable, layouts_max, meta.get(NEXT_LAYOUT_KEY))
        self.emptied_keys: list[bytes] = []  # Objects that the DRAM tier had when it was emptied at this start.
        self.damaged_sessions: list[bytes] = []  # Names, as of the last `load_sessions`.
        self.secret: DescriptorSecret | None = None  # Of an index that a daemon opened.

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        map_bytes: int,
        layouts_max: int = 256,
        before_commit: Callable[[TierName], None] | None = None,
        below_ssd: Sequence[TierName] = (),
        ssd_files: Sequence[Path] = (),
        create: bool = True,
    ) -> BlockIndex:
        """Open the durable index, or create an empty one with a new store id.

        `layouts_max` are the layouts that it takes; those that it has are kept, however many they are.
        `below_ssd` are the names of the tiers below SSD. `before_commit` makes the bytes of a tier's blocks durable; it
        runs on the committer thread before the commit of their records. An index is made only where none was before:
        the store's identity file, and the `ssd_files` that are there, tell that one is missing. Where `create` is
        false, an index is never made, and nothing of the store is upgraded or restored. Raises StoreTooNew,
        StoreDamaged, StorageFailed.
        """
        traces = traces_of_store(directory, ssd_files)
        if traces or not create:
            expect_index(directory, traces)
        else:
            clear_blank(directory / DATA_NAME)
        lower = {database: tier for tier, database in _databases_of(below_ssd).items()}

        def make_durable(database: bytes) -> None:
            if before_commit is not None:
                before_commit(lower.get(database, TierName.SSD))

        durable = Environment(
            directory,
            map_bytes=map_bytes,
            durable=True,
            before_commit=make_durable,
            more_databases=tuple(lower),
        )
        try:
            meta = _read_meta(durable)
            if not meta and not traces and create:
                meta = {
                    SCHEMA_KEY: str(SCHEMA_AT_LEAST).encode(),
                    STORE_KEY: os.urandom(STORE_ID_BYTES),
                    DESCRIPTORS_KEY: open_secret(
                        directory.parent, {}
                    ).mark,  # The identity file is written before the index.
                }
                durable.write_now(META, meta)
            check_schema(directory, meta)
            if len(meta.get(STORE_KEY, b"")) != STORE_ID_BYTES:
                raise StoreDamaged(f"the index {directory} names no store")
            check_identity(directory, meta[STORE_KEY], note=create)
            index = cls(directory, durable, meta, layouts_max, below_ssd)
            if create:
                index._upgrade()
                index.layout_entries.restore()
                index.layout_entries.write_copies()
                index.secret = open_secret(directory.parent, meta)
                index._remember(DESCRIPTORS_KEY, index.secret.mark)
            return index
        except BaseException:
            durable.close()
            raise

    @classmethod
    def create(
        cls, directory: Path, *, map_bytes: int, meta: Mapping[bytes, bytes], layouts: Mapping[bytes, bytes]
    ) -> BlockIndex:
        """Make the durable index of a store whose own was lost, in a folder that is not there yet.

        `meta` and `layouts` are entries as they stood in the lost one, what must be there is added. Raises
        StoreDamaged where `meta` names no store; StorageFailed.
        """
        known = {key: value for key, value in meta.items() if key in _META_KEYS}
        durable = Environment(directory, map_bytes=map_bytes, durable=True)
        try:
            durable.write_now(LAYOUTS, dict(layouts))
            durable.write_now(META, {**known, SCHEMA_KEY: str(SCHEMA_AT_LEAST).encode()})
            if len(known.get(STORE_KEY, b"")) != STORE_ID_BYTES:
                raise StoreDamaged(f"nothing says which store the index {directory} is of")
            index = cls(directory, durable, _read_meta(durable), len(layouts))
            index._upgrade()
            index.layout_entries.write_copies()
            return index
        except BaseException:
            durable.close()
            raise

    def open_volatile(
        self, directory: Path, arena_id: bytes, *, map_bytes: int, now_ms: int = 0, why_new: str = ""
    ) -> str:
        """Open the index of the arena. Returns why it was emptied, or "" where it was kept.

        Where there was one before, it is noted for good that it was emptied, and why: `why_new`, if the
        arena itself is new. Its keys are then in `emptied_keys`, if it can still be read.
        """
        why_emptied = self.adopt_volatile(directory, arena_id, map_bytes=map_bytes)
        if why_emptied:
            if self.volatile_directory is not None:
                self._remember(_EMPTIED_KEY, _EMPTIED_AT.pack(now_ms) + (why_new or why_emptied).encode())
            _remove(directory)
            notes = directory.with_name(_NOTES_NAME)
            _remove(notes)
            volatile = Environment(directory, map_bytes=map_bytes, durable=False)
            volatile.keep_notes(notes)
            volatile.write_now(META, self._volatile_meta(arena_id))
            self._volatile = volatile
        self._remember(_VOLATILE_DIRECTORY_KEY, os.fsencode(directory.absolute()))
        return why_emptied

    def adopt_volatile(self, directory: Path, arena_id: bytes, *, map_bytes: int) -> str:
        """Open the index of the arena as it is. Returns why it cannot be used and is not open, or ""."""
        assert self._volatile is None
        try:
            if not (directory / DATA_NAME).stat().st_size:
                return "it is empty"
        except (FileNotFoundError, NotADirectoryError):
            return "there is none"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        try:
            if is_older_copy(directory, directory.with_name(_NOTES_NAME)):
                return "it is an older copy"
            volatile = Environment(directory, map_bytes=map_bytes, durable=False)
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        except (StoreDamaged, StorageFailed) as error:
            return str(error)
        try:
            found = _read_meta(volatile)
        except (StoreDamaged, StorageFailed) as error:
            volatile.close()
            return str(error)
        expected = self._volatile_meta(arena_id)
        # What lies in a volatile index is the same in every schema so far, so that it may have another of them.
        has_other_schema = found.get(SCHEMA_KEY) != expected[SCHEMA_KEY] and schema_of(found) in range(1, SCHEMA + 1)
        wrong = [key.decode() for key, value in expected.items() if found.get(key) != value]
        if wrong and not (has_other_schema and wrong == [SCHEMA_KEY.decode()]):
            if wrong == [_ARENA_KEY.decode()]:
                keys = (key for keys, _ in volatile.read(BLOCKS) for key in keys)
                self.emptied_keys = [key for key in keys if len(key) == OBJECT_KEY_BYTES]
            volatile.close()
            return f"{', '.join(wrong)} differs"
        try:
            volatile.keep_notes(directory.with_name(_NOTES_NAME))
        except StorageFailed as error:
            volatile.close()
            return str(error)
        if has_other_schema:
            volatile.write_now(META, {SCHEMA_KEY: expected[SCHEMA_KEY]})
        self._volatile = volatile
        return ""

    def _volatile_meta(self, arena_id: bytes) -> dict[bytes, bytes]:
        assert len(arena_id) == STORE_ID_BYTES
        return {SCHEMA_KEY: self._meta[SCHEMA_KEY], STORE_KEY: self.store_id, _ARENA_KEY: arena_id}

    # Where the other files of the store are, so that ``kvservice check`` finds it without the daemon's settings.

    @property
    def volatile_directory(self) -> Path | None:
        """The folder of the volatile index when it was last opened."""
        found = self._meta.get(_VOLATILE_DIRECTORY_KEY)
        return Path(os.fsdecode(found)) if found else None

    @property
    def dram_emptied(self) -> Emptied | None:
        """None if the DRAM tier never lost blocks by a restart."""
        found = self._meta.get(_EMPTIED_KEY, b"")
        if len(found) < _EMPTIED_AT.size:
            return None
        return Emptied(_EMPTIED_AT.unpack_from(found)[0], found[_EMPTIED_AT.size :].decode(errors="replace"))

    @property
    def ssd_files(self) -> list[Path | None]:
        """The SSD files in their order, as last recorded; None for a deleted one. Empty before the first start."""
        names = self._meta.get(_SSD_FILES_KEY, b"").split(b"\0")
        return [self.directory.parent / os.fsdecode(name) if name else None for name in names] if any(names) else []

    def ssd_files_to_create(self, count: int) -> list[int]:
        """Which of `count` SSD files were never created. Any other existed, and its drive may be missing."""
        known = self.ssd_files
        return [number for number in range(count) if not known or (number < len(known) and known[number] is None)]

    def remember_ssd_files(self, files: Sequence[Path | None]) -> None:
        """Record the paths of the SSD files, in their order. Call it while no change waits for a commit.

        Those in the store's folder may move with it. None removes a file: it is created at the next start.
        """
        store = self.directory.parent

        def name(file: Path | None) -> bytes:
            if file is None:
                return b""
            return os.fsencode(file.relative_to(store) if file.is_relative_to(store) else file.absolute())

        self._remember(_SSD_FILES_KEY, b"\0".join(map(name, files)))

    def _remember(self, key: bytes, value: bytes) -> None:
        if self._meta.get(key, b"") != value:
            self._durable.write_now(META, {key: value})
            self._meta[key] = value

    def load(self, tier: TierName) -> recovery.Recovered:
        """All records of a tier. For the start: it blocks the caller for one second per million records."""
        return recovery.load(self._environment(tier), self._databases[tier], self.layouts)

    def put(
        self, tier: TierName, keys: Sequence[bytes], records: Records, check: Callable[[], None] | None = None
    ) -> asyncio.Future[None]:
        """Record blocks whose bytes are complete in `tier`. Done once committed.

        `check` is called on the committer thread when the tier's bytes have been made durable, and fails the
        commit with the KVError that it raises. Errors: IndexFull, StorageFailed. A failed put may still have
        reached the disk: delete the keys before their extents are reserved again. `records` must not change until
        then. Changes of a tier are applied in the order of submission.
        """

        def encode() -> list[bytes]:
            if check is not None:
                check()
            if tier in (TierName.DRAM, TierName.SSD):
                return encode_records(keys, records)
            marked = records.copy()
            marked["flags"] = BELOW_SSD
            return encode_records(keys, marked)

        return self._environment(tier).put(self._databases[tier], keys, encode)

    def delete(self, tier: TierName, keys: Sequence[bytes]) -> asyncio.Future[None]:
        """Delete the records of blocks in `tier`. Their extents may be reserved again only once this is done."""
        return self._environment(tier).delete(self._databases[tier], keys)

    def delete_now(self, tier: TierName, keys: Iterable[bytes]) -> None:
        """The same for the start, before any change waits for a commit. Raises StorageFailed."""
        self._environment(tier).delete_now(self._databases[tier], keys)

    @property
    def layouts(self) -> Mapping[int, Layout]:
        """The layouts that were opened in this store, by id."""
        return self.layout_entries.by_id

    def layout_id(self, fingerprint: bytes) -> int | None:
        return self.layout_entries.ids.get(fingerprint)

    async def put_layout(self, layout: Layout) -> int:
        """The layout's id in this store; a new layout gets one, and is durable on return.

        Raises IndexFull, also where the store knows as many layouts as it may; StorageFailed.
        """
        if self.layout_id(layout.fingerprint) is None:
            self.layout_entries.expect_room(layout.fingerprint)
            if schema_for(layout) > schema_of(self._meta):
                await self._raise_schema(schema_for(layout))
        return await self.layout_entries.put(layout)

    async def _raise_schema(self, schema: int) -> None:
        """Write a newer schema. It is on disk on return, so before the layout that needs it.

        A daemon that knows only an older schema would treat such a layout as damaged, and remove its blocks.
        """
        value = str(schema).encode()
        await self._durable.put(META, [SCHEMA_KEY], lambda: [value])
        self._meta[SCHEMA_KEY] = value

    def forget_unused_layouts(self) -> int:
        """If the store has its maximum of layouts, delete those without blocks or sessions. Returns their number.

        For the start, once the volatile index is open: no client has opened a layout then to store blocks later.
        Their ids are not given again. Reads all records if there is reason to. Raises StorageFailed.
        """
        if not self.layout_entries.is_full:
            return 0
        used: set[int] = set()
        for tier in self._databases:
            used.update(np.unique(self.load(tier).records["layout_id"]).tolist())
        used.update(manifest.layout_id for manifest in self.load_sessions())
        return self.layout_entries.forget_all_but(used)

    # Sessions

    def load_sessions(self) -> list[Manifest]:
        """All sound manifests of known layouts. For the start; see `damaged_sessions` for the others."""
        found: list[Manifest] = []
        self.damaged_sessions = []
        for names, values in self._durable.read(SESSIONS):
            for name, value in zip(names, values, strict=True):
                manifest = decode_manifest(name, value)
                if manifest is None or manifest.layout_id not in self.layouts:
                    self.damaged_sessions.append(name)
                else:
                    found.append(manifest)
        if self.damaged_sessions:
            log.error("sessions that cannot be trusted are not loaded: %d of them", len(self.damaged_sessions))
        return found

    def put_session(self, manifest: Manifest) -> asyncio.Future[None]:
        """Replace the record of a session. Done once on disk. IndexFull, StorageFailed."""
        return self._durable.put(SESSIONS, [manifest.name], lambda: [encode_manifest(manifest)])

    def put_session_values(self, values: Mapping[bytes, bytes]) -> asyncio.Future[None]:
        """Record sessions as they stood in a lost index, by name. Done once on disk. IndexFull, StorageFailed."""
        return self._durable.put(SESSIONS, list(values), lambda: list(values.values()))

    def delete_sessions(self, names: Sequence[bytes]) -> asyncio.Future[None]:
        """Forget sessions, by `Manifest.name`. Done once on disk. StorageFailed."""
        return self._durable.delete(SESSIONS, names)

    def count(self, tier: TierName) -> int:
        """How many records a tier has."""
        return self._environment(tier).count(self._databases[tier])

    @property
    def used_sizes(self) -> dict[TierName, int]:
        """Bytes in use, by the first tier of each environment. That of SSD also has the tiers below SSD."""
        return {tier: self._environment(tier).used_bytes for tier in (TierName.DRAM, TierName.SSD)}

    @property
    def map_sizes(self) -> dict[TierName, int]:
        """Sizes of the maps, by the same tiers."""
        return {tier: self._environment(tier).map_bytes for tier in (TierName.DRAM, TierName.SSD)}

    def commits(self, tier: TierName) -> int:
        """Transactions since the start."""
        return self._environment(tier).commits

    def _environment(self, tier: TierName) -> Environment:
        if tier != TierName.DRAM:
            return self._durable
        assert self._volatile is not None, "it is opened after the arena"
        return self._volatile

    def close(self) -> None:
        """Commit what is pending, then close."""
        self._durable.close()
        if self._volatile is not None:
            self._volatile.close()

    def _upgrade(self) -> None:
        """Upgrade an older store to the schema it needs. `Environment` has created the missing databases."""
        found = schema_of(self._meta)
        needed = max(SCHEMA_AT_LEAST, *map(schema_for, self.layouts.values()), found)
        if needed > found:
            log.info("the store is upgraded from schema %s to %s", found, needed)
            self._remember(SCHEMA_KEY, str(needed).encode())


def _databases_of(below_ssd: Sequence[TierName]) -> dict[TierName, bytes]:
    """The database of each tier below SSD."""
    return {name: BLOCKS + b"-" + name.encode() for name in below_ssd}


def _remove(path: Path) -> None:
    """Remove the folder or file at the path of the volatile index. Raises StorageFailed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailed(f"the index {path} cannot be replaced: {error}") from error


def _read_meta(environment: Environment) -> dict[bytes, bytes]:
    return {key: value for keys, values in environment.read(META) for key, value in zip(keys, values, strict=True)}
