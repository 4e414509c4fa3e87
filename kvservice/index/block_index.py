"""The index of all blocks and their tiers, in LMDB environments of one schema.

* durable: in the store's directory, synced. Layouts, sessions, and a record of every block on SSD.
* lower: beside the durable one, an environment ``index-NAME`` per tier below SSD, synced. A record of every block
  there. Each has a map and a committer of its own, so that a slow or full one stops no other. It is emptied where it
  may be out of date.
* volatile: beside the arena, on its tmpfs. A record of every block in DRAM. It belongs to
  the arena: if store, schema or arena are not those it was created for, it is emptied.

Opening goes in steps, because the media of the tiers need the store's id and the volatile index the arena's::

    index = BlockIndex.open(store / "index", ...)     index.store_id    (opens or creates the media and the arena)
    index.open_lower({name: ...})
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
from kvservice.index.environment import (
    BLOCKS,
    DATA_NAME,
    LAYOUTS,
    META,
    SESSIONS,
    Confirm,
    Environment,
    all_durable,
    is_older_copy,
)
from kvservice.index.errors import StoreDamaged
from kvservice.index.identity import (
    SCHEMA,
    SCHEMA_AT_LEAST,
    SCHEMA_KEY,
    SCHEMA_WITH_LOWER_TIERS,
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
from kvservice.index.key_generations import KeyGenerations
from kvservice.index.layouts import NEXT_LAYOUT_KEY, LayoutEntries
from kvservice.index.records import Records, encode_records
from kvservice.index.session_records import Manifest, decode_manifest, encode_manifest
from kvservice_api.errors import IndexFull, StorageFailed, UnknownLayout
from kvservice_api.layout import Layout

log = logging.getLogger(__name__)

# A file beside the volatile index: the number of its last transaction.
_NOTES_NAME = "index-transaction"

_NEW_NAME = "index.new"  # The folder beside the volatile index, in which another is made that replaces it.
_RECORDS_AT_ONCE = 4096

_ARENA_KEY = b"arena_id"
_SSD_FILES_KEY = b"ssd_files"
_SSD_STALE_KEY = b"ssd_files_stale"  # Numbers of files that left the store and could not be deleted.
_SSD_CHANGING_KEY = b"ssd_files_changing"  # Numbers of files that a start creates or deletes, until it has done so.
_VOLATILE_DIRECTORY_KEY = b"volatile_directory"
_EMPTIED_KEY = b"dram_emptied"
_TIER_KEY = b"tier"  # In the environment of a tier below SSD: its name.
_LOWER_TIERS_KEY = b"tiers_below_ssd"  # Those of the last start.
_PLACE_KEY = b"place"  # The store's folder at the last start.
_KEY_GENERATIONS_KEY = b"key_generations"  # There, if the store has their file: without it they are lost.
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

    def __init__(self, directory: Path, durable: Environment, meta: dict[bytes, bytes], layouts_max: int) -> None:
        """Use ``open``."""
        self.directory = directory
        self.store_id = meta[STORE_KEY]
        self._meta = meta
        self._environments: dict[TierName, Environment] = {TierName.SSD: durable}
        self.layout_entries = LayoutEntries(directory.parent, durable, layouts_max, meta.get(NEXT_LAYOUT_KEY))
        self.emptied_keys: list[bytes] = []  # Objects that DRAM lost when it was emptied or shrunk at this start.
        self.damaged_sessions: list[bytes] = []  # Names, as of the last `load_sessions`.
        self.secret: DescriptorSecret | None = None  # Of an index that a daemon opened.
        self.key_generations: KeyGenerations | None = None  # The same.

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        map_bytes: int,
        layouts_max: int = 256,
        before_commit: Callable[[], None] | None = None,
        ssd_files: Sequence[Path] = (),
        create: bool = True,
    ) -> BlockIndex:
        """Open the durable index, or create an empty one with a new store id.

        `layouts_max` are the layouts that it takes; those that it has are kept, however many they are.
        `before_commit` makes the bytes of blocks durable; it runs on the committer thread before the
        commit of their records. An index is made only if there was none before: the store's identity file, and the
        `ssd_files` that are there, tell that one is missing. Where `create` is false, an index is never made, and
        nothing of the store is upgraded or restored. Raises StoreTooNew, StoreDamaged, StorageFailed.
        """
        traces = traces_of_store(directory, ssd_files)
        if traces or not create:
            expect_index(directory, traces)
        else:
            clear_blank(directory / DATA_NAME)
        durable = Environment(
            directory, map_bytes=map_bytes, durable=True, before_commit=before_commit, has_sessions=True
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
            index = cls(directory, durable, meta, layouts_max)
            if create:
                index._upgrade()
                index.layout_entries.restore()
                index.layout_entries.write_copies()
                index.secret = open_secret(directory.parent, meta)
                index._remember(DESCRIPTORS_KEY, index.secret.mark)
                had_file = _KEY_GENERATIONS_KEY in meta
                index.key_generations = KeyGenerations.open(directory.parent, had_file=had_file)
                if index.key_generations.is_on_disk:
                    index._remember(_KEY_GENERATIONS_KEY, b"1")
            return index
        except BaseException:
            durable.close()
            raise

    @classmethod
    def create(
        cls, directory: Path, *, map_bytes: int, meta: Mapping[bytes, bytes], layouts: Mapping[bytes, bytes]
    ) -> BlockIndex:
        """Create the durable index of a store that lost its own, in a folder that does not exist yet.

        `meta` and `layouts` are the lost index's entries; missing required entries are added. Raises StoreDamaged
        if `meta` names no store, and StorageFailed.
        """
        known = {key: value for key, value in meta.items() if key in _META_KEYS}
        durable = Environment(directory, map_bytes=map_bytes, durable=True)
        try:
            durable.write_now(LAYOUTS, dict(layouts))
            # The lost index may have noted that there are key generations: without their file, all get new ones.
            meta = {**known, SCHEMA_KEY: str(SCHEMA_AT_LEAST).encode(), _KEY_GENERATIONS_KEY: b"1"}
            durable.write_now(META, meta)
            if len(known.get(STORE_KEY, b"")) != STORE_ID_BYTES:
                raise StoreDamaged(f"no file names the store of the index {directory}")
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

        If there was one before, the index records permanently that it was emptied, and why (`why_new` if the
        arena itself is new). Its keys are then in `emptied_keys`, if it can still be read.
        """
        _remove(directory.with_name(_NEW_NAME))
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
            self._environments[TierName.DRAM] = volatile
        self._remember(_VOLATILE_DIRECTORY_KEY, os.fsencode(directory.absolute()))
        return why_emptied

    def adopt_volatile(self, directory: Path, arena_id: bytes, *, map_bytes: int) -> str:
        """Open the index of the arena as it is. Returns why it cannot be used and is not open, or ""."""
        assert TierName.DRAM not in self._environments
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
        # The content of a volatile index is the same in all schemas so far, so another schema is accepted.
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
        self._environments[TierName.DRAM] = volatile
        return ""

    def close_volatile(self) -> None:
        """Close the index of the arena, if `adopt_volatile` opened it. It may be opened again."""
        self.emptied_keys = []
        if TierName.DRAM in self._environments:
            self._environments.pop(TierName.DRAM).close()

    def replace_volatile(
        self, directory: Path, arena_id: bytes, keys: Sequence[bytes], records: Records, *, map_bytes: int
    ) -> int:
        """Replace the index of the arena, which is not open, by one of another arena with these records. Returns the
        number of the first ones that are in it: it may be too small for all.

        After a crash it is the old index or the new one. Raises StorageFailed.
        """
        new, done = directory.with_name(_NEW_NAME), 0
        _remove(new)
        made = Environment(new, map_bytes=map_bytes, durable=False)
        try:
            made.write_now(META, self._volatile_meta(arena_id))
            for start in range(0, len(keys), _RECORDS_AT_ONCE):
                end = min(start + _RECORDS_AT_ONCE, len(keys))
                values = encode_records(keys[start:end], records[start:end])
                made.write_now(BLOCKS, dict(zip(keys[start:end], values, strict=True)))
                done = end
        except IndexFull as error:
            log.warning("the index of the smaller DRAM tier does not take all blocks: %s", error.message)
        finally:
            made.close()
        _remove(directory.with_name(_NOTES_NAME))  # Otherwise the new index would look like an older copy.
        try:
            os.replace(new / DATA_NAME, directory / DATA_NAME)
        except OSError as error:
            raise StorageFailed(f"the index {directory} cannot be replaced: {error}") from error
        return done

    def open_lower(self, tiers: Mapping[TierName, tuple[int, Callable[[], None]]]) -> dict[TierName, str]:
        """Open the indexes of the tiers below SSD, each with the size of its map and its `before_commit`.

        Returns those that were emptied, with the reason. A tier that the last start did not have is emptied: blocks may
        have been discarded or saved again meanwhile. A damaged one is emptied too: its blocks are misses. Once a store
        has such a tier, older daemons refuse it: they would not remove its records. Raises StorageFailed.
        """
        if tiers:
            self.require_schema(SCHEMA_WITH_LOWER_TIERS)
        before = self._meta.get(_LOWER_TIERS_KEY, b"").split(b"\0")
        emptied = {}
        for tier, (map_bytes, before_commit) in tiers.items():
            directory = self.lower_directory(tier)
            why = "" if tier.encode() in before else "the daemon ran without this tier, or it is new"
            if not why:
                why = self._adopt_lower(tier, directory, map_bytes, before_commit)
            if why:
                emptied[tier] = why
                _remove(directory)
                environment = Environment(directory, map_bytes=map_bytes, durable=True, before_commit=before_commit)
                self._environments[tier] = environment
                environment.write_now(META, self._lower_meta(tier))
        self._remember(_LOWER_TIERS_KEY, b"\0".join(tier.encode() for tier in tiers))
        return emptied

    def _adopt_lower(self, tier: TierName, directory: Path, map_bytes: int, before_commit: Callable[[], None]) -> str:
        """Open the index of a tier below SSD as it is. Returns why it cannot be used and is not open, or ""."""
        if not (directory / DATA_NAME).exists():
            return "its index was removed"
        try:
            environment = Environment(directory, map_bytes=map_bytes, durable=True, before_commit=before_commit)
        except (StoreDamaged, StorageFailed) as error:
            return str(error)
        try:
            found = _read_meta(environment)
        except (StoreDamaged, StorageFailed) as error:
            environment.close()
            return str(error)
        if found != self._lower_meta(tier):
            environment.close()
            return "it is not this store's index of the tier"
        self._environments[tier] = environment
        return ""

    def lower_directory(self, tier: TierName) -> Path:
        """The folder of the index of a tier below SSD."""
        return self.directory.with_name(f"{self.directory.name}-{tier}")

    def _lower_meta(self, tier: TierName) -> dict[bytes, bytes]:
        return {STORE_KEY: self.store_id, _TIER_KEY: tier.encode()}

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
    def place(self) -> Path | None:
        """The store's folder when a daemon last used it; None if that is not known."""
        found = self._meta.get(_PLACE_KEY)
        return Path(os.fsdecode(found)) if found else None

    def remember_place(self) -> None:
        """Record where the store is. Call it while no change waits for a commit."""
        self._remember(_PLACE_KEY, os.fsencode(self.directory.parent.resolve()))

    @property
    def lower_tiers(self) -> list[str]:
        """The names of the tiers below SSD at the last start."""
        return [name.decode() for name in self._meta.get(_LOWER_TIERS_KEY, b"").split(b"\0") if name]

    @property
    def dram_emptied(self) -> Emptied | None:
        """None if the DRAM tier never lost blocks by a restart."""
        found = self._meta.get(_EMPTIED_KEY, b"")
        if len(found) < _EMPTIED_AT.size:
            return None
        return Emptied(_EMPTIED_AT.unpack_from(found)[0], found[_EMPTIED_AT.size :].decode(errors="replace"))

    @property
    def ssd_files(self) -> list[Path | None]:
        """The SSD files by number, as last recorded; None for one that left. Empty before the first start."""
        names = self._meta.get(_SSD_FILES_KEY, b"").split(b"\0")
        return [self.directory.parent / os.fsdecode(name) if name else None for name in names] if any(names) else []

    @property
    def ssd_files_changing(self) -> set[int]:
        """The numbers of SSD files that may be missing, because an interrupted start created or deleted them."""
        return {int(number) for number in self._meta.get(_SSD_CHANGING_KEY, b"").split()}

    def remember_ssd_files(self, files: Sequence[Path | None], changing: Iterable[int] = ()) -> None:
        """Record the paths of the SSD files by number, None for one that left, and which of them are about to be
        created or deleted. Call it while no change waits for a commit.

        Those in the store's folder may move with it.
        """
        store = self.directory.parent

        def name(file: Path | None) -> bytes:
            if file is None:
                return b""
            return os.fsencode(file.relative_to(store) if file.is_relative_to(store) else file.absolute())

        self._remember(_SSD_CHANGING_KEY, b" ".join(b"%d" % number for number in sorted(changing)))
        self._remember(_SSD_FILES_KEY, b"\0".join(map(name, files)))

    @property
    def stale_ssd_files(self) -> set[int]:
        """The numbers of SSD files that left the store and may still exist: no other file may get such a number."""
        return {int(number) for number in self._meta.get(_SSD_STALE_KEY, b"").split()}

    def remember_stale_ssd_files(self, numbers: Iterable[int]) -> None:
        """Call it while no change waits for a commit."""
        self._remember(_SSD_STALE_KEY, b" ".join(b"%d" % number for number in sorted(numbers)))

    def require_schema(self, schema: int) -> None:
        """Record that older daemons than those that know `schema` may not open the store. Call it while no change waits
        for a commit.
        """
        self._remember(SCHEMA_KEY, str(max(schema, schema_of(self._meta))).encode())

    def _remember(self, key: bytes, value: bytes) -> None:
        if self._meta.get(key, b"") != value:
            self._environments[TierName.SSD].write_now(META, {key: value})
            self._meta[key] = value

    def load(self, tier: TierName) -> recovery.Recovered:
        """All records of a tier. For the start: it blocks the caller for one second per million records."""
        return recovery.load(self._environments[tier], self.layouts)

    def put(
        self, tier: TierName, keys: Sequence[bytes], records: Records, confirm: Confirm = all_durable
    ) -> asyncio.Future[None]:
        """Record blocks whose bytes are complete in `tier`. Done once committed.

        `confirm` is called on the committer thread with the error of the tier's `sync`, or None, and raises the error
        with which this put fails: by default the same one. Errors: IndexFull, StorageFailed. A failed put may still
        have reached the disk: delete the keys before their extents are reserved again. `records` must not change until
        then. Changes of a tier are applied in the order of submission.
        """
        return self._environments[tier].put(BLOCKS, keys, lambda: encode_records(keys, records), confirm)

    def put_again(self, tier: TierName, keys: Sequence[bytes], records: Records) -> asyncio.Future[None]:
        """The same for blocks that are recorded in these extents already: their bytes were made durable then."""
        return self._environments[tier].put(BLOCKS, keys, lambda: encode_records(keys, records))

    def delete(self, tier: TierName, keys: Sequence[bytes]) -> asyncio.Future[None]:
        """Delete the records of blocks in `tier`. Their extents may be reserved again only once this is done."""
        return self._environments[tier].delete(BLOCKS, keys)

    def delete_now(self, tier: TierName, keys: Iterable[bytes]) -> None:
        """The same for the start, before any change waits for a commit. Raises StorageFailed."""
        self._environments[tier].delete_now(BLOCKS, keys)

    @property
    def layouts(self) -> Mapping[int, Layout]:
        """The layouts that were opened in this store, by id."""
        return self.layout_entries.by_id

    def layout_id(self, fingerprint: bytes) -> int | None:
        return self.layout_entries.ids.get(fingerprint)

    def find_layout(self, fingerprint: bytes) -> tuple[int, Layout]:
        """The layout's id, and the layout. Raises UnknownLayout."""
        layout_id = self.layout_id(fingerprint)
        if layout_id is None:
            raise UnknownLayout(f"no layout with fingerprint {fingerprint.hex() or '(empty)'} was opened here")
        return layout_id, self.layouts[layout_id]

    def block_tokens(self, layout_id: int) -> int:
        """The tokens of a whole block."""
        return self.layouts[layout_id].block_tokens

    async def put_layout(self, layout: Layout) -> int:
        """The layout's id in this store; a new layout gets one, and is durable on return.

        Raises IndexFull, also if the store knows as many layouts as it may; StorageFailed.
        """
        if self.layout_id(layout.fingerprint) is None:
            self.layout_entries.expect_room(layout.fingerprint)
            if schema_for(layout) > schema_of(self._meta):
                await self._raise_schema(schema_for(layout))
            log.debug("a new layout", extra={"model": layout.model_id, "fingerprint": layout.fingerprint.hex()})
        return await self.layout_entries.put(layout)

    async def _raise_schema(self, schema: int) -> None:
        """Write a newer schema. It is on disk on return, so before the layout that needs it.

        A daemon that knows only an older schema would treat such a layout as damaged, and remove its blocks.
        """
        value = str(schema).encode()
        await self._environments[TierName.SSD].put(META, [SCHEMA_KEY], lambda: [value])
        self._meta[SCHEMA_KEY] = value

    def forget_unused_layouts(self) -> int:
        """If the store has its maximum of layouts, delete those without blocks or sessions. Returns their number.

        For the start, once the volatile index is open: no client has opened a layout then to store blocks later.
        Their ids are not given again. Reads all records if there is reason to. Raises StorageFailed.
        """
        if not self.layout_entries.is_full:
            return 0
        used: set[int] = set()
        for tier in self._environments:
            used.update(np.unique(self.load(tier).records["layout_id"]).tolist())
        used.update(manifest.layout_id for manifest in self.load_sessions())
        return self.layout_entries.forget_all_but(used)

    # Sessions

    def load_sessions(self) -> list[Manifest]:
        """All sound manifests of known layouts. For the start; see `damaged_sessions` for the others."""
        found: list[Manifest] = []
        self.damaged_sessions = []
        for names, values in self._environments[TierName.SSD].read(SESSIONS):
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
        return self._environments[TierName.SSD].put(SESSIONS, [manifest.name], lambda: [encode_manifest(manifest)])

    def put_session_values(self, values: Mapping[bytes, bytes]) -> asyncio.Future[None]:
        """Record the sessions of a lost index, by name. Done once on disk. IndexFull, StorageFailed."""
        return self._environments[TierName.SSD].put(SESSIONS, list(values), lambda: list(values.values()))

    def delete_sessions(self, names: Sequence[bytes]) -> asyncio.Future[None]:
        """Forget sessions, by `Manifest.name`. Done once on disk. StorageFailed."""
        return self._environments[TierName.SSD].delete(SESSIONS, names)

    def count(self, tier: TierName) -> int:
        """How many records a tier has."""
        return self._environments[tier].count(BLOCKS)

    @property
    def used_sizes(self) -> dict[TierName, int]:
        """Bytes in use of each tier's index."""
        return {tier: environment.used_bytes for tier, environment in self._environments.items()}

    @property
    def map_sizes(self) -> dict[TierName, int]:
        """The size of the map of each tier's index."""
        return {tier: environment.map_bytes for tier, environment in self._environments.items()}

    def commits(self, tier: TierName) -> int:
        """Transactions since the start."""
        return self._environments[tier].commits

    def close(self) -> None:
        """Commit what is pending, then close."""
        for environment in self._environments.values():
            environment.close()

    def _upgrade(self) -> None:
        """Upgrade an older store to the schema it needs. `Environment` has created the missing databases."""
        found = schema_of(self._meta)
        needed = max(SCHEMA_AT_LEAST, *map(schema_for, self.layouts.values()), found)
        if needed > found:
            log.info("the store is upgraded from schema %s to %s", found, needed)
            self._remember(SCHEMA_KEY, str(needed).encode())


def _remove(path: Path) -> None:
    """Remove the folder or file at the path of an index that is to be made again. Raises StorageFailed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailed(f"the index {path} cannot be replaced: {error}") from error


def _read_meta(environment: Environment) -> dict[bytes, bytes]:
    return {key: value for keys, values in environment.read(META) for key, value in zip(keys, values, strict=True)}
