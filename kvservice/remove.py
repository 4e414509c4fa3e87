"""``kvservice remove``: deletes a stopped store with all its blocks, wherever its files are.

The index names the SSD files, the arena, and the folder in which the store was last used. If the store is in another
folder now, it may be a copy, and files outside its folder may belong to the original: they are not deleted. If the
index is damaged, they are not deleted either. Files that a store does not make stay. The same command continues an
interrupted removal.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvservice.index.block_index import BlockIndex
from kvservice.index.descriptor_secret import SECRET_NAME
from kvservice.index.environment import DATA_NAME
from kvservice.index.errors import StoreError
from kvservice.index.identity import IDENTITY_NAME, read_identity
from kvservice.index.key_generations import KEY_GENERATIONS_NAME
from kvservice.index.layouts import LAYOUTS_NAME
from kvservice.index.store_lock import StoreLock
from kvservice.store.mover.learned_counts import LEARNED_NAME
from kvservice.tiers.arena import arena_directory
from kvservice.tiers.arena_notes import ARENAS_NAME, arenas_of, read_arena_note
from kvservice.tiers.ssd_files import read_header
from kvservice_api.errors import KVError

_LOCK_NAME = "lock"
_NOTE_NAME = "removed"  # Of a removal that is not complete: the files outside the store's folder that it has deleted.
_MAP_BYTES_MIN = 1 << 20
_IN_FOLDER = (
    LAYOUTS_NAME,
    SECRET_NAME,
    KEY_GENERATIONS_NAME,
    LEARNED_NAME,
    ARENAS_NAME,
    f"{ARENAS_NAME}.new",
    "kvservice.sock",
    "kvservice.sock.lock",
)
_INDEX = re.compile(r"index(\.new|\.damaged-\d+)?")


class NotRemovable(RuntimeError):
    """There is no store, a daemon uses it, or the user cannot be asked. Nothing was changed."""


@dataclass(slots=True)
class Removal:
    """What is deleted, in this order, and what is not."""

    store: str
    paths: list[str] = field(default_factory=list)
    size_bytes: int = 0
    not_deleted: list[str] = field(default_factory=list)  # With the reason.
    removed: bool = False


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 removed, 1 not removed (the user's answer, or a file could not be deleted), 2 refused."""
    parser = argparse.ArgumentParser(
        prog="kvservice remove", description="Delete a stopped store with all its blocks, on disk and in memory."
    )
    parser.add_argument("store", type=Path, help="folder of the store, `store.path` of the daemon")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print one JSON object; needs --yes")
    options = parser.parse_args(argv)
    store = options.store.absolute()
    with ExitStack() as held:
        try:
            if not _is_store(store):
                raise NotRemovable(f"there is no store in {store}: give the folder that is the daemon's store.path")
            lock = StoreLock(store / _LOCK_NAME)
            held.callback(lock.release)
            if not options.yes and (options.json or not sys.stdin.isatty()):
                raise NotRemovable("cannot ask here: add --yes to delete the store")
            removal = _plan(store, held)
        except (NotRemovable, StoreError, KVError, OSError) as error:
            print(f"kvservice remove: {error}", file=sys.stderr)
            return 2
        if not options.yes and not _is_confirmed(removal):
            print("nothing was deleted")
            return 1
        try:
            _carry_out(store, removal)
        except OSError as error:
            print(f"kvservice remove: {error}; the same command continues", file=sys.stderr)
            return 1
    print(json.dumps(asdict(removal)) if options.json else "\n".join(_lines(removal)))
    return 0


def _is_store(store: Path) -> bool:
    """Whether a file says so that no other program makes. Raises OSError."""
    return bool(read_identity(store)) or any(map(read_header, sorted(store.glob("ssd-*.kv"))))


@dataclass(slots=True)
class _Known:
    """What the index says."""

    store_id: bytes
    ssd_files: list[Path] = field(default_factory=list)
    arena: Path | None = None
    lower_tiers: Sequence[str] = ()


def _plan(store: Path, held: ExitStack) -> Removal:
    """What belongs to the store. Locks its arena until `held` ends. Raises NotRemovable, OSError."""
    removal = Removal(str(store))
    known = _known(store, removal)
    for arena in dict.fromkeys([*([known.arena] if known.arena is not None else []), *_noted_arenas(store, known)]):
        if arena.is_dir():
            _lock_arena(arena, held)
            _add(removal, arena)
    note = store / _NOTE_NAME
    gone = set(note.read_bytes().splitlines()) if note.exists() else set()
    for file in dict.fromkeys([*known.ssd_files, *sorted(store.glob("ssd-*.kv"))]):
        try:
            header = read_header(file)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and (file.parent == store or os.fsencode(file) in gone):
                continue  # A removal that was killed has deleted it.
            removal.not_deleted.append(f"{file}: {error.strerror}; if its drive is away, delete it once it is back")
            continue
        if header is None or (known.store_id and header.store_id != known.store_id):
            removal.not_deleted.append(f"{file}: it is not a file of this store")
        else:
            _add(removal, file)
    for tier in known.lower_tiers:
        removal.not_deleted.append(f"the file of the tier {tier}: delete tier-{tier}.kv in the `path` of that tier")
    indexes = [path for path in sorted(store.glob("index*")) if _INDEX.fullmatch(path.name)]
    indexes += [store / f"index-{tier}" for tier in known.lower_tiers]
    ours = [*sorted(store.glob("ssd-*.kv.partial")), *indexes]
    for path in [*ours, *(store / name for name in (*_IN_FOLDER, IDENTITY_NAME, _LOCK_NAME))]:
        if os.path.lexists(path):
            _add(removal, path)
    listed = {*removal.paths, str(note)}
    for path in sorted(store.iterdir()):
        if str(path) not in listed:
            removal.not_deleted.append(f"{path}: a store makes no such file")
    return removal


def _known(store: Path, removal: Removal) -> _Known:
    directory = store / "index"
    try:
        index = BlockIndex.open(directory, map_bytes=_map_bytes(directory), create=False)
    except (StoreError, KVError, OSError) as error:
        removal.not_deleted.append(f"SSD files outside {store}, and its shared memory, if there are any: {error}")
        return _Known(read_identity(store))
    try:
        known = _Known(index.store_id, lower_tiers=index.lower_tiers)
        files = [file for file in index.ssd_files if file is not None]
        arena = None if index.volatile_directory is None else index.volatile_directory.parent
        if index.place is not None and index.place.resolve() == store.resolve():
            known.ssd_files = files
            if arena is not None and arena == arena_directory(arena.parent, index.store_id):
                known.arena = arena
            return known
    finally:
        index.close()
    known.ssd_files = [file for file in files if file.is_relative_to(store)]
    for path in [*(file for file in files if file not in known.ssd_files), *([arena] if arena is not None else [])]:
        removal.not_deleted.append(
            f"{path}: the store was last used in another folder; this may belong to another store"
        )
    return known


def _noted_arenas(store: Path, known: _Known) -> list[Path]:
    """Arenas of this and earlier settings of `dram.path`, if their notes name this folder: those of a store that was
    copied name the original's.
    """
    found = []
    for arena in arenas_of(store):
        note = read_arena_note(arena)
        is_ours = known.store_id and arena == arena_directory(arena.parent, known.store_id)
        if is_ours and note is not None and note.store.resolve() == store.resolve():
            found.append(arena)
    return found


def _map_bytes(directory: Path) -> int:
    with suppress(OSError):
        return max((directory / DATA_NAME).stat().st_size, _MAP_BYTES_MIN)
    return _MAP_BYTES_MIN


def _lock_arena(arena: Path, held: ExitStack) -> None:
    """Raises NotRemovable if a daemon uses it."""
    fd = os.open(arena / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NotRemovable(f"a daemon uses {arena}: stop it first") from None


def _add(removal: Removal, path: Path) -> None:
    removal.paths.append(str(path))
    if path.is_symlink():
        removal.not_deleted.append(f"{path.resolve()}: {path} is a link to it, and only the link is deleted")
        return
    files = [each for each in path.rglob("*") if not each.is_dir()] if path.is_dir() else [path]
    removal.size_bytes += sum(file.lstat().st_blocks * 512 for file in files)


def _is_confirmed(removal: Removal) -> bool:
    print("\n".join(_lines(removal)))
    try:
        return input("Delete all of it, with every block? [y/N] ").strip().lower() in {"y", "yes"}
    except EOFError:
        print()
        return False


def _carry_out(store: Path, removal: Removal) -> None:
    note = store / _NOTE_NAME
    for text in removal.paths:
        path = Path(text)
        if path == store / IDENTITY_NAME:
            note.unlink(missing_ok=True)  # The index is gone, which names the files in it.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent != store:
            with suppress(OSError), note.open("ab") as file:  # A full disk prevents no removal.
                file.write(os.fsencode(path) + b"\n")
    with suppress(OSError):  # It has other files, is a mount point or a link, or lies in a folder of another user.
        store.rmdir()
    removal.removed = True


def _lines(removal: Removal) -> Iterator[str]:
    yield f"{'deleted' if removal.removed else 'to delete'}, {removal.size_bytes / 2**20:,.1f} MiB:"
    yield from (f"  {path}" for path in removal.paths)
    if removal.not_deleted:
        yield "not deleted:"
        yield from (f"  {each}" for each in removal.not_deleted)
