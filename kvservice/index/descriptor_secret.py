"""The secret of a store, with which the daemon tags the descriptors of blocks, and ``kvservice check`` checks the tags.

It is in a file beside the index, which only the daemon's user can read. Clients do not get it: no message and no
arena contains it. The file also says whether every block of the store has a descriptor, if its image has room for one:
in a store that was made before there were descriptors, older blocks have none.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from kvservice.durable_files import write_durably
from kvservice.index.identity import SCHEMA_KEY

log = logging.getLogger(__name__)

SECRET_NAME = "descriptor_secret"

# A key in the index, beside its schema, with a copy of the file's content in case the file is lost.
DESCRIPTORS_KEY = b"descriptors"
_ALL, _LATER = b"all", b"later"

#  | "KVSECR01" | 1 where every block has a descriptor u32 | secret 32 | crc u32 of all before |      little-endian
_FILE = struct.Struct("<8sI32sI")
_MAGIC = b"KVSECR01"
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class DescriptorSecret:
    key: bytes = field(repr=False)
    every_block: bool  # Whether every block whose image has room for a descriptor has one.

    @classmethod
    def new(cls, *, every_block: bool) -> DescriptorSecret:
        return cls(os.urandom(_SECRET_BYTES), every_block)

    def encode(self) -> bytes:
        """The bytes of the file."""
        body = _FILE.pack(_MAGIC, self.every_block, self.key, 0)[:-4]
        return body + crc32(body).to_bytes(4, "little")

    @property
    def mark(self) -> bytes:
        """The index's value under DESCRIPTORS_KEY."""
        return _ALL if self.every_block else _LATER


def has_all_descriptors(meta: Mapping[bytes, bytes]) -> bool:
    """Whether the index says that all blocks have descriptors. True for a new store, and if the entry is lost."""
    if DESCRIPTORS_KEY in meta:
        return meta[DESCRIPTORS_KEY] == _ALL
    return SCHEMA_KEY not in meta


def read_secret(store: Path) -> DescriptorSecret | None:
    """The secret in the store's file; None if there is no file, or it is not whole. Raises OSError."""
    try:
        data = (store / SECRET_NAME).read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != _FILE.size:
        return None
    magic, every_block, key, crc = _FILE.unpack(data)
    return DescriptorSecret(key, bool(every_block)) if magic == _MAGIC and crc == crc32(data[:-4]) else None


def open_secret(store: Path, meta: Mapping[bytes, bytes]) -> DescriptorSecret:
    """The store's secret. A new one if there is none; it is on disk on return. For the daemon's start.

    `meta` has the index's entries about the store; empty for a new store. If the file cannot be read or written, the
    secret is only in memory: the daemon serves, the file stays as it is, and the next start tries again.
    """
    path = store / SECRET_NAME
    made = DescriptorSecret.new(every_block=has_all_descriptors(meta))
    try:
        found = read_secret(store)
        if found is not None and (
            meta or found.every_block
        ):  # The folder of a new store may contain the file of another store.
            if stat.S_IMODE(path.stat().st_mode) != 0o600:
                path.chmod(0o600)  # A restored copy may have another mode.
            return found
        was_there = path.exists()
        write_durably(path, made.encode())
    except OSError as error:
        log.warning(
            "the store's secret %s cannot be used, so blocks that are saved from now on cannot be found without the "
            "index: %s",
            path,
            error.strerror,
        )
        return made
    if meta and (was_there or DESCRIPTORS_KEY in meta):
        log.warning(
            "the store's secret %s was %s, and a new one was made: blocks that were saved before cannot be found "
            "without the index any more",
            path,
            "damaged" if was_there else "gone",
        )
    return made
