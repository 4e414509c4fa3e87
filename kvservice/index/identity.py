"""The identity of a store: its id, the schema of its index, and whether it existed before this start."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvservice.durable_files import write_durably
from kvservice.index.environment import DATA_NAME
from kvservice.index.errors import StoreDamaged, StoreTooNew
from kvservice_api.errors import StorageFailed
from kvservice_api.layout import Layout

log = logging.getLogger(__name__)

# The newest schema. 2 added the database of sessions. 3 added layouts of several groups and layouts with a window.
# Records of blocks are the same in all. A store of 1 becomes one of 2 when it is opened. It becomes one of 3 before its
# first layout that needs 3 is stored: until then a daemon that knows only 2 can open it. 4 is a store with tiers below
# SSD: a daemon that knows only 3 would leave the records of a block that it discards.
# 5 is a store that an SSD file has left, so that a number is free: a daemon that knows only 4 would number the files in
# another way than the records do.
SCHEMA = 5
SCHEMA_WITH_LOWER_TIERS = 4
SCHEMA_WITH_FREE_FILE_NUMBERS = 5
SCHEMA_AT_LEAST = 2
SCHEMA_KEY = b"schema"

# Beside the index: the store's id in hexadecimal. If it is there, the store was made, though its index may be lost.
IDENTITY_NAME = "store_id"
STORE_KEY = b"store_id"
STORE_ID_BYTES = 16

_BLANK_BYTES_AT_ONCE = 1 << 20


def traces_of_store(directory: Path, ssd_files: Iterable[Path] = ()) -> list[Path]:
    """The evidence that the store of the index in `directory` existed before. Raises StorageFailed."""
    store = directory.parent
    try:
        candidates = dict.fromkeys([store / IDENTITY_NAME, *sorted(store.glob("ssd-*.kv")), *ssd_files])
        return [path for path in candidates if path.exists()]
    except OSError as error:
        raise StorageFailed(f"the store {store} cannot be read: {error}") from error


def read_identity(store: Path) -> bytes:
    """The id that the store's identity file has; empty if there is none, or it is damaged. Raises OSError."""
    try:
        text = (store / IDENTITY_NAME).read_text("ascii", errors="replace").split()
        store_id = bytes.fromhex(text[0]) if text else b""
    except (FileNotFoundError, ValueError):
        return b""
    return store_id if len(store_id) == STORE_ID_BYTES else b""


def write_identity(store: Path, store_id: bytes) -> None:
    """Write the store's identity file; replaces an existing one. Raises OSError."""
    write_durably(store / IDENTITY_NAME, f"{store_id.hex()}\n".encode())


def expect_index(directory: Path, traces: Sequence[Path]) -> None:
    """Raises StoreDamaged if the index of a store that was made before is gone or empty. Writes nothing."""
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


def clear_blank(path: Path) -> None:
    """A file that an interrupted first start left, such as after a power cut, is not an index yet."""
    with contextlib.suppress(OSError):  # Opening it gives a better error.
        if _is_blank(path):
            path.unlink()


def check_identity(directory: Path, store_id: bytes, *, note: bool) -> None:
    """Compare the index's store with that of the folder. With `note`, write it if there is none. Raises
    StoreDamaged.
    """
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
        except OSError as error:  # The SSD files also show that the store existed. The next start tries again.
            log.warning("%s could not be written: %s", store / IDENTITY_NAME, error.strerror)


def schema_of(meta: Mapping[bytes, bytes]) -> int:
    """0 if there is none."""
    text = meta.get(SCHEMA_KEY, b"").decode(errors="replace")
    return int(text) if text.isdecimal() else 0


def check_schema(directory: Path, meta: Mapping[bytes, bytes]) -> None:
    """Raises StoreDamaged if there is none, StoreTooNew if this program does not know it."""
    if not schema_of(meta):
        raise StoreDamaged(f"the index {directory} has no schema version")
    refuse_newer(meta)


def refuse_newer(meta: Mapping[bytes, bytes]) -> None:
    """Raises StoreTooNew if a newer program wrote the index: this one would lose what it does not know."""
    schema = schema_of(meta)
    if schema > SCHEMA:
        raise StoreTooNew(
            f"the store's schema is version {schema}; this program knows versions up to {SCHEMA}: "
            "run the KVService that wrote it, or a newer one"
        )


def schema_for(layout: Layout) -> int:
    """The oldest schema whose daemons can read the layout."""
    return 3 if len(layout.groups) > 1 or layout.groups[0].window else SCHEMA_AT_LEAST
