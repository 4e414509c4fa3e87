"""The layouts of one store: an entry of each in the durable index, and a copy of the entry in a file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from zlib import crc32

from google.protobuf.message import DecodeError

from kvservice.durable_files import write_durably
from kvservice.index.environment import LAYOUTS, META, Environment
from kvservice_api.errors import IndexFull, KVError
from kvservice_api.layout import Layout
from kvservice_api.v1 import types_pb2 as pb

log = logging.getLogger(__name__)

# Beside the index: one file per layout, named by its fingerprint, with a copy of its entry.
LAYOUTS_NAME = "layouts"

NEXT_LAYOUT_KEY = b"next_layout_id"

#  | layout id u32 | serialized pb.Layout | crc u32 |     one layout, under its fingerprint; little-endian,
#                                                        the crc over fingerprint, id and message
_U32 = struct.Struct("<I")


class LayoutEntries:
    """The layouts that a store knows. All methods are for the event loop's thread."""

    def __init__(self, store: Path, durable: Environment, layouts_max: int, counter: bytes | None) -> None:
        """Read the entries of the durable index. `counter` is its value under NEXT_LAYOUT_KEY."""
        self._folder = store / LAYOUTS_NAME
        self._durable = durable
        self.count_max = layouts_max
        self._layouts: dict[int, Layout] = {}
        self._ids: dict[bytes, int] = {}
        self.by_id: Mapping[int, Layout] = MappingProxyType(self._layouts)
        self.ids: Mapping[bytes, int] = MappingProxyType(self._ids)  # By fingerprint.
        self._in_flight: dict[bytes, asyncio.Future[tuple[None, None]]] = {}
        self.damaged: list[bytes] = []  # Keys of entries without a sound copy. Their blocks are lost with them.
        self.restorable: list[bytes] = []  # Fingerprints: the entry is damaged, its copy in a file is sound.
        self._replaced: list[bytes] = []  # Damaged keys of entries that `restore` writes again.
        damaged: dict[bytes, bytes] = {}
        for fingerprints, values in durable.read(LAYOUTS):
            for fingerprint, value in zip(fingerprints, values, strict=True):
                decoded = decode_layout(fingerprint, value)
                if decoded is None:
                    damaged[fingerprint] = value
                else:
                    self._add(*decoded)
        if damaged:
            self._add_copies_of(damaged)
        after_known = max(self._layouts, default=0) + 1
        self._next_id = max(after_known, _U32.unpack(counter)[0] if counter else 1)

    @property
    def is_full(self) -> bool:
        """Whether the store knows as many layouts as it may."""
        return len(self._layouts) >= self.count_max

    def expect_room(self, fingerprint: bytes) -> None:
        """Raises IndexFull if the layout is new and the store has its maximum of layouts."""
        known = self._ids.keys() | self._in_flight
        if fingerprint not in known and len(known) >= self.count_max:
            raise IndexFull(
                f"the store knows {len(known)} layouts, as many as index.layouts_max allows; those without blocks "
                "are forgotten at the daemon's next start"
            )

    async def put(self, layout: Layout) -> int:
        """The layout's id; a new layout gets one, and is durable on return. Raises IndexFull, StorageFailed."""
        fingerprint = layout.fingerprint
        if fingerprint not in self._ids:
            self.expect_room(fingerprint)
            commit = self._in_flight.get(fingerprint) or self._commit(layout)
            await asyncio.shield(commit)  # Another caller may wait for the same layout.
        return self._ids[fingerprint]

    def _commit(self, layout: Layout) -> asyncio.Future[tuple[None, None]]:
        fingerprint = layout.fingerprint
        layout_id = self._next_id
        self._next_id += 1  # Never given twice: a record of a lost layout must not find another.
        value = _encode_layout(layout_id, layout)

        def encode() -> list[bytes]:
            self._write_copy(fingerprint, value)  # On the committer thread, and before the record.
            return [value]

        commit = asyncio.gather(
            self._durable.put(META, [NEXT_LAYOUT_KEY], lambda: [_U32.pack(layout_id + 1)]),
            self._durable.put(LAYOUTS, [fingerprint], encode),
        )

        def settle(commit: asyncio.Future[tuple[None, None]]) -> None:
            del self._in_flight[fingerprint]
            if not commit.cancelled() and commit.exception() is None:
                self._add(layout_id, layout)

        self._in_flight[fingerprint] = commit
        commit.add_done_callback(settle)
        return commit

    def forget_all_but(self, used: Collection[int]) -> int:
        """Forget the layouts whose ids are not in `used`; the ids are not given again. How many these were.

        To be called while nothing waits for a commit. Raises StorageFailed.
        """
        unused = {layout_id: layout.fingerprint for layout_id, layout in self._layouts.items() if layout_id not in used}
        if unused:
            self._durable.delete_now(LAYOUTS, unused.values())
        for layout_id, fingerprint in unused.items():
            # A copy that stays has an id that is not given again, so that no later record can name it.
            with contextlib.suppress(OSError):
                (self._folder / fingerprint.hex()).unlink()
            del self._layouts[layout_id], self._ids[fingerprint]
        return len(unused)

    def restore(self) -> int:
        """Write the damaged entries that have a sound copy again. Returns their number. Raises StorageFailed.

        To be called while nothing waits for a commit.
        """
        restored = len(self.restorable)
        if restored:
            entries = {
                name: _encode_layout(self._ids[name], self._layouts[self._ids[name]]) for name in self.restorable
            }
            self._durable.write_now(LAYOUTS, entries)
            self._durable.delete_now(LAYOUTS, self._replaced)
            log.warning(
                "damaged entries of layouts were written again from their copies in files: %d of them", restored
            )
            self.restorable.clear()
            self._replaced.clear()
        return restored

    async def delete_damaged(self) -> None:
        await self._durable.delete(LAYOUTS, self.damaged)
        self.damaged.clear()

    def write_copies(self) -> None:
        """Write the files of all layouts that have none, or one with other bytes."""
        for layout_id, layout in self._layouts.items():
            self._write_copy(layout.fingerprint, _encode_layout(layout_id, layout))

    def _write_copy(self, fingerprint: bytes, value: bytes) -> None:
        """Keep a layout's entry in a file of its own, too, for when the index is lost.

        If it cannot be written, such as on a full disk, the store still serves: the next start tries again.
        """
        path = self._folder / fingerprint.hex()
        try:
            if path.exists() and path.read_bytes() == value:
                return
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_durably(path, value)
        except OSError as error:
            log.warning(
                "a copy of a layout could not be written, so its blocks cannot be found without the index: %s: %s",
                path,
                error.strerror,
            )

    def _add(self, layout_id: int, layout: Layout) -> None:
        self._layouts[layout_id] = layout
        self._ids[layout.fingerprint] = layout_id

    def _add_copies_of(self, damaged: Mapping[bytes, bytes]) -> None:
        """Take the layouts of damaged entries from their own files.

        A file is the copy of an entry that has its name, or that has its content: then the entry's key is damaged.
        """
        unmatched = dict(damaged)
        for fingerprint, value in layout_copies(self._folder.parent).items():
            entries = [key for key, found in unmatched.items() if key == fingerprint or found == value]
            decoded = decode_layout(fingerprint, value)
            if not entries or decoded is None or decoded[0] in self._layouts or fingerprint in self._ids:
                continue
            self._add(*decoded)
            self.restorable.append(fingerprint)
            self._replaced += [key for key in entries if key != fingerprint]
            for key in entries:
                del unmatched[key]
        self.damaged += unmatched


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
