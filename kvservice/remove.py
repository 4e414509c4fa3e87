"""``kvservice remove``: deletes a stopped store with all its blocks, wherever its files are.

The index names the SSD files and the arena. If it is damaged, only what lies in the store's folder and in /dev/shm is
found. Files that a store does not make stay. An interrupted removal is continued by the same command.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvservice.index.block_index import BlockIndex
from kvservice.index.descriptor_secret import SECRET_NAME
from kvservice.index.environment import DATA_NAME
from kvservice.index.errors import StoreError
from kvservice.index.identity import IDENTITY_NAME, read_identity, traces_of_store
from kvservice.index.key_generations import KEY_GENERATIONS_NAME
from kvservice.index.layouts import LAYOUTS_NAME
from kvservice.index.store_lock import StoreLock
from kvservice.store.mover.learned_counts import LEARNED_NAME
from kvservice.tiers.arena import arena_directory
from kvservice.tiers.ssd import origin_of
from kvservice_api.errors import KVError

_LOCK_NAME = "lock"
_MAP_BYTES_MIN = 1 << 20
_IN_FOLDER = (LAYOUTS_NAME, SECRET_NAME, KEY_GENERATIONS_NAME, LEARNED_NAME, "kvservice.sock", "kvservice.sock.lock")
_INDEX = re.compile(r"index(\.new|\.damaged-\d+|-[a-z][a-z0-9-]*)?")
_SHM = Path("/dev/shm")


@dataclass(slots=True)
class Removal:
    """What is deleted, in this order, and what stays."""

    store: str
    paths: list[str] = field(default_factory=list)
    size_bytes: int = 0
    stays: list[str] = field(default_factory=list)  # With the reason.
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
    if not options.yes and (options.json or not sys.stdin.isatty()):
        print("kvservice remove: there is no terminal to ask at: add --yes to delete the store", file=sys.stderr)
        return 2
    store = options.store.absolute()
    try:
        if not (store / "index" / DATA_NAME).is_file() and not traces_of_store(store / "index"):
            raise FileNotFoundError(f"there is no store in {store}")
        lock = StoreLock(store / _LOCK_NAME)
    except (StoreError, KVError, OSError) as error:
        print(f"kvservice remove: {error}", file=sys.stderr)
        return 2
    try:
        removal = _plan(store)
        if not options.yes and not _is_confirmed(removal):
            print("nothing was deleted")
            return 1
        _carry_out(store, removal)
    except OSError as error:
        print(f"kvservice remove: {error}; the same command continues", file=sys.stderr)
        return 1
    finally:
        lock.release()
    print(json.dumps(asdict(removal)) if options.json else "\n".join(_lines(removal)))
    return 0


def _plan(store: Path) -> Removal:
    """What belongs to the store. Raises OSError."""
    removal = Removal(str(store))
    directory = store / "index"
    ssd_files: list[Path] = []
    arena: Path | None = None
    store_id = b""
    try:
        index = BlockIndex.open(directory, map_bytes=_map_bytes(directory), create=False)
        try:
            store_id = index.store_id
            ssd_files = [file for file in index.ssd_files if file is not None]
            if index.volatile_directory is not None:
                arena = index.volatile_directory.parent
        finally:
            index.close()
    except (StoreError, KVError, OSError) as error:
        with suppress(OSError):
            store_id = read_identity(store)
        removal.stays.append(f"SSD files outside {store}, and an arena outside {_SHM}, if there are any: {error}")
    ssd_files = list(dict.fromkeys([*ssd_files, *sorted(store.glob("ssd-*.kv"))]))
    ours = [arena or arena_directory(_SHM, store_id)] if store_id else []
    for path in [each for each in ours if each.is_dir()]:
        if _is_in_use(path):
            removal.stays.append(f"{path}: a daemon uses it")
        else:
            _add(removal, path)
    for file in [each for each in ssd_files if each.exists()]:
        origin = origin_of(file)
        if origin is None or (store_id and origin.store_id != store_id):
            removal.stays.append(f"{file}: it is not a file of this store")
        else:
            _add(removal, file)
    for path in [each for each in sorted(store.glob("index-*")) if each.is_dir() and _INDEX.fullmatch(each.name)]:
        removal.stays.append(f"the file of a tier below SSD, where {path} is its index: the store does not name it")
    indexes = [path for path in sorted(store.glob("index*")) if _INDEX.fullmatch(path.name)]
    for path in [*indexes, *(store / name for name in (*_IN_FOLDER, IDENTITY_NAME, _LOCK_NAME))]:
        if os.path.lexists(path):
            _add(removal, path)
    listed = set(removal.paths)
    for path in sorted(store.iterdir()):
        if str(path) not in listed:
            removal.stays.append(f"{path}: a store makes no such file")
    return removal


def _map_bytes(directory: Path) -> int:
    with suppress(OSError):
        return max((directory / DATA_NAME).stat().st_size, _MAP_BYTES_MIN)
    return _MAP_BYTES_MIN


def _is_in_use(arena: Path) -> bool:
    try:
        fd = os.open(arena / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _add(removal: Removal, path: Path) -> None:
    removal.paths.append(str(path))
    if path.is_symlink():
        removal.stays.append(f"{path.resolve()}: {path} is a link to it, and only the link is deleted")
        return
    files = [each for each in path.rglob("*") if not each.is_dir()] if path.is_dir() else [path]
    removal.size_bytes += sum(file.lstat().st_blocks * 512 for file in files)


def _is_confirmed(removal: Removal) -> bool:
    print("\n".join(_lines(removal)))
    return input("Delete all of it, with every block? [y/N] ").strip().lower() in {"y", "yes"}


def _carry_out(store: Path, removal: Removal) -> None:
    for text in removal.paths:
        path = Path(text)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not any(store.iterdir()):
        store.rmdir()
    removal.removed = True


def _lines(removal: Removal) -> Iterator[str]:
    yield f"{'deleted' if removal.removed else 'to delete'}, {removal.size_bytes / 2**20:,.1f} MiB:"
    yield from (f"  {path}" for path in removal.paths)
    if removal.stays:
        yield "stays:"
        yield from (f"  {each}" for each in removal.stays)
