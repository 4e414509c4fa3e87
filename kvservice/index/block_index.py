"""Which blocks lie where, in two LMDB environments of one schema.

* durable: in the store's directory, synced. Layouts, sessions, and a record of every block on SSD.
* volatile: beside the arena, on its tmpfs. A record of every block in DRAM. It lives and dies with
  the arena: where store, schema and arena are not those it was made for, it is emptied.

Opening goes in two steps, because the arena needs the store's id and the volatile index the arena's::

    index = BlockIndex.open(store / "index", ...)     index.store_id    (opens or makes the arena)
    index.open_volatile(arena_directory / "index", arena_id, ...)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from zlib import crc32

import numpy as np
from google.protobuf.message import DecodeError

from kvservice.blocks import OBJECT_KEY_BYTES, TierName
from kvservice.index import recovery
from kvservice.index.environment import BLOCKS, DATA_NAME, LAYOUTS, META, SESSIONS, Environment, is_older_copy
from kvservice.index.errors import StoreDamaged, StoreTooNew
from kvservice.index.records import Records, encode_records
from kvservice.index.session_records import Manifest, decode_manifest, encode_manifest
from kvservice_api.errors import IndexFull, KVError, StorageFailed
from kvservice_api.layout import Layout
from kvservice_api.v1 import types_pb2 as pb

log = logging.getLogger(__name__)

# The newest schema. 2 added the database of sessions. 3 added layouts of several groups and layouts with a window.
# Records of blocks are the same in all. A store of 1 becomes one of 2 when it is opened. It becomes one of 3 before its
# first layout that needs 3 is stored: until then a daemon that knows only 2 can open it.
SCHEMA = 3
_SCHEMA_AT_LEAST = 2

# Beside the index: the store's id in hexadecimal. Where it is, the store was made, though its index may be lost.
IDENTITY_NAME = "store_id"

# Beside the index: one file per layout, named by its fingerprint, with what the index has of it.
LAYOUTS_NAME = "layouts"

# Beside the volatile index: which of its transactions was the last.
_NOTES_NAME = "index-transaction"

_SCHEMA_KEY = b"schema"
STORE_KEY = b"store_id"
_ARENA_KEY = b"arena_id"
_NEXT_LAYOUT_KEY = b"next_layout_id"
_SSD_FILES_KEY = b"ssd_files"
_VOLATILE_DIRECTORY_KEY = b"volatile_directory"
_EMPTIED_KEY = b"dram_emptied"
_META_KEYS = frozenset(
    (_SCHEMA_KEY, STORE_KEY, _NEXT_LAYOUT_KEY, _SSD_FILES_KEY, _VOLATILE_DIRECTORY_KEY, _EMPTIED_KEY)
)
STORE_ID_BYTES = 16
_BLANK_BYTES_AT_ONCE = 1 << 20

#  | layout id u32 | serialized pb.Layout | crc u32 |     one layout, under its fingerprint; little-endian,
#                                                        the crc over fingerprint, id and message
_U32 = struct.Struct("<I")

#  | when, ms u64 | why, UTF-8 |     the last time that the DRAM tier lost what it had; little-endian
_EMPTIED_AT = struct.Struct("<Q")


class Emptied(NamedTuple):
    """The last time that the DRAM tier lost what it had."""

    at_ms: int
    why: str


class BlockIndex:
    """The index of one store. All methods are for the event loop's thread."""

    def __init__(self, directory: Path, durable: Environment, meta: dict[bytes, bytes], layouts_max: int) -> None:
        """Use ``open``."""
        self.directory = directory
        self._layouts_max = layouts_max
        self.store_id = meta[STORE_KEY]
        self._meta = meta
        self._environments: dict[TierName, Environment] = {TierName.SSD: durable}
        self._layouts: dict[int, Layout] = {}
        self._layout_ids: dict[bytes, int] = {}
        self._layouts_in_flight: dict[bytes, asyncio.Future[tuple[None, None]]] = {}
        self._next_layout_id = 1
        self.emptied_keys: list[bytes] = []  # Objects that the DRAM tier had when it was emptied at this start.
        self.damaged_layouts: list[bytes] = []  # Keys of entries without a sound copy. Their blocks are lost with them.
        self.restorable_layouts: list[bytes] = []  # Fingerprints: the entry is damaged, its copy in a file is sound.
        self._replaced_layouts: list[bytes] = []  # Damaged keys of entries that `restore_layouts` writes again.
        self.damaged_sessions: list[bytes] = []  # Names, as of the last `load_sessions`.
        self._read_layouts()

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
        """Open the durable index, or make an empty one with a store id of its own.

        `layouts_max` are the layouts that it takes; those that it has are kept, however many they are.
        `before_commit` makes the bytes of blocks durable; it runs on the committer thread before the
        commit of their records. An index is made only where none was before: the store's identity file, and the
        `ssd_files` that are there, tell that one is missing. Where `create` is false, an index is never made, and
        nothing of the store is upgraded or restored. Raises StoreTooNew, StoreDamaged, StorageFailed.
        """
        traces = traces_of_store(directory, ssd_files)
        if traces or not create:
            _expect_index(directory, traces)
        else:
            _clear_blank(directory / DATA_NAME)
        durable = Environment(directory, map_bytes=map_bytes, durable=True, before_commit=before_commit)
        try:
            meta = _read_meta(durable)
            if not meta and not traces and create:
                meta = {_SCHEMA_KEY: str(_SCHEMA_AT_LEAST).encode(), STORE_KEY: os.urandom(STORE_ID_BYTES)}
                durable.write_now(META, meta)
            _check_schema(directory, meta)
            if len(meta.get(STORE_KEY, b"")) != STORE_ID_BYTES:
                raise StoreDamaged(f"the index {directory} names no store")
            _check_identity(directory, meta[STORE_KEY], note=create)
            index = cls(directory, durable, meta, layouts_max)
            if create:
                index._upgrade()
                index.restore_layouts()
                index._note_layouts()
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
            durable.write_now(META, {**known, _SCHEMA_KEY: str(_SCHEMA_AT_LEAST).encode()})
            if len(known.get(STORE_KEY, b"")) != STORE_ID_BYTES:
                raise StoreDamaged(f"nothing says which store the index {directory} is of")
            index = cls(directory, durable, _read_meta(durable), len(layouts))
            index._upgrade()
            index._note_layouts()
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
        # What lies in a volatile index is the same in every schema so far, so that it may have another of them.
        has_other_schema = found.get(_SCHEMA_KEY) != expected[_SCHEMA_KEY] and _schema_of(found) in range(1, SCHEMA + 1)
        wrong = [key.decode() for key, value in expected.items() if found.get(key) != value]
        if wrong and not (has_other_schema and wrong == [_SCHEMA_KEY.decode()]):
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
            volatile.write_now(META, {_SCHEMA_KEY: expected[_SCHEMA_KEY]})
        self._environments[TierName.DRAM] = volatile
        return ""

    def _volatile_meta(self, arena_id: bytes) -> dict[bytes, bytes]:
        assert len(arena_id) == STORE_ID_BYTES
        return {_SCHEMA_KEY: self._meta[_SCHEMA_KEY], STORE_KEY: self.store_id, _ARENA_KEY: arena_id}

    # Where the rest of the store lies, so that ``kvservice check`` finds it without the daemon's settings.

    @property
    def volatile_directory(self) -> Path | None:
        """Where the volatile index was when it was opened last."""
        found = self._meta.get(_VOLATILE_DIRECTORY_KEY)
        return Path(os.fsdecode(found)) if found else None

    @property
    def dram_emptied(self) -> Emptied | None:
        """None where the DRAM tier never lost anything by a restart."""
        found = self._meta.get(_EMPTIED_KEY, b"")
        if len(found) < _EMPTIED_AT.size:
            return None
        return Emptied(_EMPTIED_AT.unpack_from(found)[0], found[_EMPTIED_AT.size :].decode(errors="replace"))

    @property
    def ssd_files(self) -> list[Path | None]:
        """The SSD files in their order, as noted last; None for one that was given up. Empty before the first start."""
        names = self._meta.get(_SSD_FILES_KEY, b"").split(b"\0")
        return [self.directory.parent / os.fsdecode(name) if name else None for name in names] if any(names) else []

    def ssd_files_to_create(self, count: int) -> list[int]:
        """Which of `count` SSD files are not there yet. Any other was there, and may be on a drive that is away."""
        known = self.ssd_files
        return [number for number in range(count) if not known or (number < len(known) and known[number] is None)]

    def remember_ssd_files(self, files: Sequence[Path | None]) -> None:
        """Note where the SSD files lie, in their order. To be called while nothing waits for a commit.

        Those in the store's folder may move with it. None gives a file up: it is created at the next start.
        """
        store = self.directory.parent

        def name(file: Path | None) -> bytes:
            if file is None:
                return b""
            return os.fsencode(file.relative_to(store) if file.is_relative_to(store) else file.absolute())

        self._remember(_SSD_FILES_KEY, b"\0".join(map(name, files)))

    def _remember(self, key: bytes, value: bytes) -> None:
        if self._meta.get(key, b"") != value:
            self._environments[TierName.SSD].write_now(META, {key: value})
            self._meta[key] = value

    def load(self, tier: TierName) -> recovery.Recovered:
        """All records of a tier. For the start: it takes a second a million, on the caller's thread."""
        return recovery.load(self._environments[tier], self._layouts)

    def put(
        self, tier: TierName, keys: Sequence[bytes], records: Records, check: Callable[[], None] | None = None
    ) -> asyncio.Future[None]:
        """Record blocks whose bytes are complete in `tier`. Done once committed.

        `check` is called on the committer thread when the tier's bytes have been made durable, and fails the
        commit with the KVError that it raises. Errors: IndexFull, StorageFailed. A failed put may still have
        reached the disk: delete the keys before their extents are lent again. `records` must not change until
        then. Changes of a tier are applied in the order of submission.
        """

        def encode() -> list[bytes]:
            if check is not None:
                check()
            return encode_records(keys, records)

        return self._environments[tier].put(BLOCKS, keys, encode)

    def delete(self, tier: TierName, keys: Sequence[bytes]) -> asyncio.Future[None]:
        """Forget blocks in `tier`. Their extents may be lent again only once this is done."""
        return self._environments[tier].delete(BLOCKS, keys)

    def delete_now(self, tier: TierName, keys: Iterable[bytes]) -> None:
        """The same for the start, before anything waits for a commit. Raises StorageFailed."""
        self._environments[tier].delete_now(BLOCKS, keys)

    @property
    def layouts(self) -> Mapping[int, Layout]:
        """The layouts that were opened in this store, by id."""
        return MappingProxyType(self._layouts)

    def layout_id(self, fingerprint: bytes) -> int | None:
        return self._layout_ids.get(fingerprint)

    async def put_layout(self, layout: Layout) -> int:
        """The layout's id in this store; a new layout gets one, and is durable on return.

        Raises IndexFull, also where the store knows as many layouts as it may; StorageFailed.
        """
        fingerprint = layout.fingerprint
        if fingerprint not in self._layout_ids:
            self._expect_room_for_layout(fingerprint)
            if _schema_for(layout) > _schema_of(self._meta):
                await self._raise_schema(_schema_for(layout))
        if fingerprint not in self._layout_ids:  # Another caller may have stored it meanwhile.
            self._expect_room_for_layout(fingerprint)
            commit = self._layouts_in_flight.get(fingerprint) or self._commit_layout(layout)
            await asyncio.shield(commit)  # Another caller may wait for the same.
        return self._layout_ids[fingerprint]

    def _expect_room_for_layout(self, fingerprint: bytes) -> None:
        known = self._layout_ids.keys() | self._layouts_in_flight
        if fingerprint not in known and len(known) >= self._layouts_max:
            raise IndexFull(
                f"the store knows {len(known)} layouts, as many as index.layouts_max allows; those without blocks "
                "are forgotten at the daemon's next start"
            )

    async def _raise_schema(self, schema: int) -> None:
        """Write a newer schema. It is on disk on return, so before the layout that needs it.

        A daemon that knows only an older schema would take such a layout for damaged, and remove its blocks.
        """
        value = str(schema).encode()
        await self._environments[TierName.SSD].put(META, [_SCHEMA_KEY], lambda: [value])
        self._meta[_SCHEMA_KEY] = value

    def _commit_layout(self, layout: Layout) -> asyncio.Future[tuple[None, None]]:
        fingerprint = layout.fingerprint
        layout_id = self._next_layout_id
        self._next_layout_id += 1  # Never given twice: a record of a lost layout must not find another.
        value = _encode_layout(layout_id, layout)

        def encode() -> list[bytes]:
            self._note_layout(fingerprint, value)  # On the committer thread, and before the record.
            return [value]

        durable = self._environments[TierName.SSD]
        commit = asyncio.gather(
            durable.put(META, [_NEXT_LAYOUT_KEY], lambda: [_U32.pack(layout_id + 1)]),
            durable.put(LAYOUTS, [fingerprint], encode),
        )

        def settle(commit: asyncio.Future[tuple[None, None]]) -> None:
            del self._layouts_in_flight[fingerprint]
            if not commit.cancelled() and commit.exception() is None:
                self._layouts[layout_id] = layout
                self._layout_ids[fingerprint] = layout_id

        self._layouts_in_flight[fingerprint] = commit
        commit.add_done_callback(settle)
        return commit

    def forget_unused_layouts(self) -> int:
        """Where the store knows as many layouts as it may, forget those that nothing names. How many these were.

        For the start, once the volatile index is open: nobody has opened one then to store blocks later.
        Their ids are not given again. Reads all records if there is reason to. Raises StorageFailed.
        """
        if len(self._layouts) < self._layouts_max:
            return 0
        used: set[int] = set()
        for environment in self._environments.values():
            used.update(np.unique(recovery.load(environment, self._layouts).records["layout_id"]).tolist())
        used.update(manifest.layout_id for manifest in self.load_sessions())
        unused = [layout_id for layout_id in self._layouts if layout_id not in used]
        fingerprints = [self._layouts[layout_id].fingerprint for layout_id in unused]
        if unused:
            self._environments[TierName.SSD].delete_now(LAYOUTS, fingerprints)
            for fingerprint in fingerprints:
                # A copy that stays has an id that is not given again, so that no later record can name it.
                with contextlib.suppress(OSError):
                    (self.directory.parent / LAYOUTS_NAME / fingerprint.hex()).unlink()
        for layout_id, fingerprint in zip(unused, fingerprints, strict=True):
            del self._layouts[layout_id], self._layout_ids[fingerprint]
        return len(unused)

    # Sessions

    def load_sessions(self) -> list[Manifest]:
        """All sound manifests of known layouts. For the start; see `damaged_sessions` for the others."""
        found: list[Manifest] = []
        self.damaged_sessions = []
        for names, values in self._environments[TierName.SSD].read(SESSIONS):
            for name, value in zip(names, values, strict=True):
                manifest = decode_manifest(name, value)
                if manifest is None or manifest.layout_id not in self._layouts:
                    self.damaged_sessions.append(name)
                else:
                    found.append(manifest)
        if self.damaged_sessions:
            log.error("sessions that cannot be trusted are not loaded: %d of them", len(self.damaged_sessions))
        return found

    def put_session(self, manifest: Manifest) -> asyncio.Future[None]:
        """Record a session in the place of what it was. Done once on disk. IndexFull, StorageFailed."""
        return self._environments[TierName.SSD].put(SESSIONS, [manifest.name], lambda: [encode_manifest(manifest)])

    def put_session_values(self, values: Mapping[bytes, bytes]) -> asyncio.Future[None]:
        """Record sessions as they stood in a lost index, by name. Done once on disk. IndexFull, StorageFailed."""
        return self._environments[TierName.SSD].put(SESSIONS, list(values), lambda: list(values.values()))

    def delete_sessions(self, names: Sequence[bytes]) -> asyncio.Future[None]:
        """Forget sessions, by `Manifest.name`. Done once on disk. StorageFailed."""
        return self._environments[TierName.SSD].delete(SESSIONS, names)

    def restore_layouts(self) -> int:
        """Write the damaged entries of layouts again that have a sound copy. How many. Raises StorageFailed.

        To be called while nothing waits for a commit.
        """
        restored = len(self.restorable_layouts)
        if restored:
            durable = self._environments[TierName.SSD]
            entries = {name: self._layout_copy(name) for name in self.restorable_layouts}
            durable.write_now(LAYOUTS, entries)
            durable.delete_now(LAYOUTS, self._replaced_layouts)
            log.warning(
                "damaged entries of layouts were written again from their copies in files: %d of them", restored
            )
            self.restorable_layouts.clear()
            self._replaced_layouts.clear()
        return restored

    async def delete_damaged_layouts(self) -> None:
        await self._environments[TierName.SSD].delete(LAYOUTS, self.damaged_layouts)
        self.damaged_layouts.clear()

    def count(self, tier: TierName) -> int:
        """How many records a tier has."""
        return self._environments[tier].count(BLOCKS)

    def used_bytes(self, tier: TierName) -> int:
        return self._environments[tier].used_bytes

    def map_bytes(self, tier: TierName) -> int:
        return self._environments[tier].map_bytes

    def commits(self, tier: TierName) -> int:
        """Transactions since the start."""
        return self._environments[tier].commits

    def close(self) -> None:
        """Commit what is pending, then close."""
        for environment in self._environments.values():
            environment.close()

    def _note_layout(self, fingerprint: bytes, value: bytes) -> None:
        """Keep a layout's entry in a file of its own, too, for when the index is lost.

        Where that cannot be written, as on a full disk, the store serves all the same: the next start tries again.
        """
        folder = self.directory.parent / LAYOUTS_NAME
        path = folder / fingerprint.hex()
        try:
            if path.exists() and path.read_bytes() == value:
                return
            folder.mkdir(mode=0o700, exist_ok=True)
            write_durably(path, value)
        except OSError as error:
            log.warning(
                "a copy of a layout could not be written, so its blocks cannot be found without the index: %s: %s",
                path,
                error.strerror,
            )

    def _note_layouts(self) -> None:
        for layout_id, layout in self._layouts.items():
            self._note_layout(layout.fingerprint, _encode_layout(layout_id, layout))

    def _read_layouts(self) -> None:
        counter = self._meta.get(_NEXT_LAYOUT_KEY)
        damaged: dict[bytes, bytes] = {}
        for fingerprints, values in self._environments[TierName.SSD].read(LAYOUTS):
            for fingerprint, value in zip(fingerprints, values, strict=True):
                decoded = decode_layout(fingerprint, value)
                if decoded is None:
                    damaged[fingerprint] = value
                else:
                    self._add_layout(*decoded)
        if damaged:
            self._add_copies_of(damaged)
        after_known = max(self._layouts, default=0) + 1
        self._next_layout_id = max(after_known, _U32.unpack(counter)[0] if counter else 1)

    def _add_layout(self, layout_id: int, layout: Layout) -> None:
        self._layouts[layout_id] = layout
        self._layout_ids[layout.fingerprint] = layout_id

    def _add_copies_of(self, damaged: Mapping[bytes, bytes]) -> None:
        """Take the layouts of damaged entries from their own files.

        A file is the copy of an entry that has its name, or that has its content: then the entry's key is damaged.
        """
        unmatched = dict(damaged)
        for fingerprint, value in layout_copies(self.directory.parent).items():
            entries = [key for key, found in unmatched.items() if key == fingerprint or found == value]
            decoded = decode_layout(fingerprint, value)
            if not entries or decoded is None or decoded[0] in self._layouts or fingerprint in self._layout_ids:
                continue
            self._add_layout(*decoded)
            self.restorable_layouts.append(fingerprint)
            self._replaced_layouts += [key for key in entries if key != fingerprint]
            for key in entries:
                del unmatched[key]
        self.damaged_layouts += unmatched

    def _layout_copy(self, fingerprint: bytes) -> bytes:
        layout_id = self._layout_ids[fingerprint]
        return _encode_layout(layout_id, self._layouts[layout_id])

    def _upgrade(self) -> None:
        """Make an older store one of the schema it needs. `Environment` has made the databases that it did not have."""
        found = _schema_of(self._meta)
        needed = max(_SCHEMA_AT_LEAST, *map(_schema_for, self._layouts.values()), found)
        if needed > found:
            log.info("the store is upgraded from schema %s to %s", found, needed)
            self._remember(_SCHEMA_KEY, str(needed).encode())


def layout_copies(store: Path) -> dict[bytes, bytes]:
    """The sound entries that the files of a store's layouts have, by fingerprint."""
    found: dict[bytes, bytes] = {}
    for file in sorted((store / LAYOUTS_NAME).glob("*")):
        try:
            fingerprint, value = bytes.fromhex(file.name), file.read_bytes()
        except (ValueError, OSError):  # Not a layout's file, or one that cannot be read.
            continue
        if decode_layout(fingerprint, value) is not None:
            found[fingerprint] = value
    return found


def traces_of_store(directory: Path, ssd_files: Iterable[Path] = ()) -> list[Path]:
    """What says that the store of the index in `directory` was made before. Raises StorageFailed."""
    store = directory.parent
    try:
        candidates = dict.fromkeys([store / IDENTITY_NAME, *sorted(store.glob("ssd-*.kv")), *ssd_files])
        return [path for path in candidates if path.exists()]
    except OSError as error:
        raise StorageFailed(f"the store {store} cannot be read: {error}") from error


def read_identity(store: Path) -> bytes:
    """The id that the store's identity file has; empty where there is none, or it is damaged. Raises OSError."""
    try:
        text = (store / IDENTITY_NAME).read_text("ascii", errors="replace").split()
        store_id = bytes.fromhex(text[0]) if text else b""
    except (FileNotFoundError, ValueError):
        return b""
    return store_id if len(store_id) == STORE_ID_BYTES else b""


def write_identity(store: Path, store_id: bytes) -> None:
    """Write the store's identity file, in the place of what it has. Raises OSError."""
    write_durably(store / IDENTITY_NAME, f"{store_id.hex()}\n".encode())


def _expect_index(directory: Path, traces: Sequence[Path]) -> None:
    """Raises StoreDamaged where the index of a store that was made before is gone or empty. Writes nothing."""
    try:
        blank = _is_blank(directory / DATA_NAME)
        what = "empty" if blank else ""
    except (FileNotFoundError, NotADirectoryError):
        what = "gone"
    except OSError as error:
        raise StorageFailed(f"the index {directory} cannot be used: {error}") from error
    if what:
        are = "is" if len(traces) == 1 else "are"
        why = f", and {', '.join(map(str, traces))} {are} there, so the store was made before" if traces else ""
        raise StoreDamaged(f"the index {directory} is {what}{why}: nothing was written")


def _is_blank(path: Path) -> bool:
    """Whether every byte of the file is zero: it was made, and never written. Raises OSError."""
    with path.open("rb") as file:
        while data := file.read(_BLANK_BYTES_AT_ONCE):
            if data.count(0) != len(data):
                return False
    return True


def _clear_blank(path: Path) -> None:
    """What a first start left that was cut off, maybe by a power cut, is no index yet."""
    with contextlib.suppress(OSError):  # Opening says better what is wrong.
        if _is_blank(path):
            path.unlink()


def _check_identity(directory: Path, store_id: bytes, *, note: bool) -> None:
    """Compare the index's store with that of the folder. With `note`, write it where none is. Raises StoreDamaged."""
    store = directory.parent
    try:
        found = read_identity(store)
        if found and found != store_id:
            raise StoreDamaged(
                f"the index {directory} is damaged or another store's: it is of the store {store_id.hex()}, and "
                f"{store / IDENTITY_NAME} says {found.hex()}"
            )
    except OSError as error:
        raise StorageFailed(f"{store / IDENTITY_NAME} cannot be used: {error}") from error
    if not found and note:
        try:
            write_identity(store, store_id)
        except OSError as error:  # The SSD files tell too that the store was made. The next start tries again.
            log.warning("%s could not be written: %s", store / IDENTITY_NAME, error.strerror)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all; it survives a power cut from here on. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    """What stands in the place of the volatile index, whatever it is. Raises StorageFailed."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailed(f"the index {path} cannot be replaced: {error}") from error


def _read_meta(environment: Environment) -> dict[bytes, bytes]:
    return {key: value for keys, values in environment.read(META) for key, value in zip(keys, values, strict=True)}


def _schema_of(meta: Mapping[bytes, bytes]) -> int:
    """0 where there is none."""
    text = meta.get(_SCHEMA_KEY, b"").decode(errors="replace")
    return int(text) if text.isdecimal() else 0


def _check_schema(directory: Path, meta: Mapping[bytes, bytes]) -> None:
    """Raises StoreDamaged where there is none, StoreTooNew where this program does not know it."""
    if not _schema_of(meta):
        raise StoreDamaged(f"the index {directory} has no schema version")
    refuse_newer(meta)


def refuse_newer(meta: Mapping[bytes, bytes]) -> None:
    """Raises StoreTooNew where a newer program wrote the index: this one would lose what it does not know."""
    schema = _schema_of(meta)
    if schema > SCHEMA:
        raise StoreTooNew(
            f"the store's schema is version {schema}; this program knows versions up to {SCHEMA}: "
            "run the KVService that wrote it, or a newer one"
        )


def _schema_for(layout: Layout) -> int:
    """The oldest schema whose daemons can read the layout."""
    return 3 if len(layout.groups) > 1 or layout.groups[0].window else _SCHEMA_AT_LEAST


def _encode_layout(layout_id: int, layout: Layout) -> bytes:
    body = _U32.pack(layout_id) + layout.to_proto().SerializeToString(deterministic=True)
    return body + _U32.pack(crc32(body, crc32(layout.fingerprint)))


def decode_layout(fingerprint: bytes, value: bytes) -> tuple[int, Layout] | None:
    """None where anything is wrong: the crc, the message, or the fingerprint."""
    body, crc = value[:-4], value[-4:]
    if len(body) < _U32.size or crc != _U32.pack(crc32(body, crc32(fingerprint))):
        return None
    try:
        return _U32.unpack_from(body)[0], Layout.from_proto(pb.Layout.FromString(body[4:]), fingerprint)
    except (DecodeError, KVError):
        return None
