"""``kvservice arenas``: lists the arenas in shared memory with their stores, and removes those that no store needs.

An arena takes memory until the host restarts, also when its store was deleted by hand or moved to another `dram.path`.
The folder of the arena has a note of its store. An arena is removed only if that note proves that no store needs it:
the store is gone, or has another arena now. It stays if the store's drive is not mounted, its folder is another
container's, or there is no note, as in arenas of older versions. An arena whose daemon runs is never removed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pwd
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from kvservice.index.identity import read_identity
from kvservice.tiers.arena import arena_directory, store_of_arena
from kvservice.tiers.arena_notes import ArenaNote, arenas_of, read_arena_note

_SHARED_MEMORY = Path("/dev/shm")

IN_USE, NEEDED, ORPHAN, UNKNOWN = "in use", "needed", "orphan", "unknown"


@dataclass(slots=True)
class FoundArena:
    """One arena. `state` is one of those above; only an orphan may be removed."""

    arena: str
    state: str
    why: str
    store: str = ""  # As its note says; empty without a note.
    store_id: str = ""  # Hexadecimal; the first half if only the folder's name is known.
    size_bytes: int = 0
    changed_s_ago: int = 0
    removed: bool = False


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 listed, or removed; 1 not removed (the answer, or a file could not be deleted); 2 refused."""
    parser = argparse.ArgumentParser(
        prog="kvservice arenas", description="List the arenas in shared memory, and the store of each."
    )
    parser.add_argument("folder", type=Path, nargs="*", help=f"`dram.path` of the daemons; by default {_SHARED_MEMORY}")
    unneeded = "delete those whose store is gone, or uses another dram.path"
    parser.add_argument("--remove-orphans", action="store_true", help=unneeded)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print one JSON object; to remove, needs --yes")
    options = parser.parse_args(argv)
    if options.remove_orphans and not options.yes and (options.json or not sys.stdin.isatty()):
        print("kvservice arenas: cannot ask here: add --yes to delete the orphans", file=sys.stderr)
        return 2
    try:
        folders = [path for folder in options.folder or [_SHARED_MEMORY] for path in sorted(_arenas_in(folder))]
    except OSError as error:
        print(f"kvservice arenas: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    found = [examine(path) for path in folders]
    orphans = [each for each in found if each.state == ORPHAN] if options.remove_orphans else []
    if orphans and not options.yes and not _is_confirmed(orphans):
        print("nothing was deleted")
        return 1
    for each in orphans:
        _remove(each)
    print(json.dumps({"arenas": [asdict(each) for each in found]}) if options.json else "\n".join(_lines(found)))
    return 0 if all(each.removed for each in orphans) else 1


def examine(arena: Path) -> FoundArena:
    """What is known of an arena."""
    found = FoundArena(str(arena), UNKNOWN, "", store_id=arena.name.removeprefix("kvservice-"))
    try:
        _describe(found, arena)
        with ExitStack() as held:  # No longer than needed: a daemon that starts meanwhile would end.
            in_use = not _lock(arena, held)
        found.state, found.why = (IN_USE, "a daemon uses it") if in_use else _state(arena, found)
    except PermissionError:
        found.why = f"only its user, {_owner(arena)}, may look into it"
    except OSError as error:
        found.why = f"it cannot be read: {error.strerror}"
    return found


def _arenas_in(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and _is_arena_name(path):
            yield path


def _is_arena_name(path: Path) -> bool:
    with suppress(ValueError):
        return path == arena_directory(path.parent, bytes.fromhex(path.name.removeprefix("kvservice-")).ljust(16))
    return False


def _describe(found: FoundArena, arena: Path) -> None:
    """Fill in everything but the state. Raises OSError."""
    found.changed_s_ago = max(0, round(time.time() - arena.stat().st_mtime))
    files = [each.lstat() for each in (arena, *arena.rglob("*"))]
    os.listdir(arena)  # rglob lists nothing where it may not look.
    found.size_bytes = sum(each.st_blocks * 512 for each in files)
    found.changed_s_ago = max(0, round(time.time() - max(each.st_mtime for each in files)))
    if store_id := store_of_arena(arena):
        found.store_id = store_id.hex()
    if note := read_arena_note(arena):
        found.store = str(note.store)


def _lock(arena: Path, held: ExitStack) -> bool:
    """Lock the arena as a daemon does, until `held` ends. False if a daemon uses it. Raises OSError."""
    try:
        fd = os.open(arena / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # A start was killed before it locked it.
        return True
    held.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _state(arena: Path, found: FoundArena) -> tuple[str, str]:
    """Whether the store of an arena that no daemon uses needs it, and why. Raises OSError."""
    note = read_arena_note(arena)
    if note is None:
        return UNKNOWN, "it has no note of its store: it is of an older version, or its first start was interrupted"
    store = note.store
    if not store.exists():
        if sibling := _moved_to(note, found.store_id):
            return NEEDED, f"its store was moved to {sibling}"
        if not note.is_visible_place():
            return UNKNOWN, f"its store {store} is not visible here: a drive is away, or another container has it"
        return ORPHAN, f"its store {store} is gone"
    store_id = read_identity(store).hex()
    if store_id and store_id.startswith(found.store_id):
        arenas = arenas_of(store)
        if arenas and arena.resolve() != arenas[-1].resolve():
            return ORPHAN, f"of an earlier dram.path: its store {store} is there, and uses {arenas[-1]} now"
        return NEEDED, f"its store {store} is stopped"
    if store_id and note.is_visible_place() and store.stat().st_dev == note.device and not store.is_mount():
        return ORPHAN, f"{store} has another store now"
    return UNKNOWN, f"{store} does not have its store: perhaps a drive is away"


def _moved_to(note: ArenaNote, store_id: str) -> Path | None:
    """The folder of the store beside its former one, if it was renamed."""
    with suppress(OSError):
        for folder in sorted(note.store.parent.iterdir()):
            with suppress(OSError):
                if read_identity(folder).hex().startswith(store_id) and read_identity(folder):
                    return folder
    return None


def _remove(found: FoundArena) -> None:
    arena = Path(found.arena)
    with ExitStack() as held:
        try:
            if not _lock(arena, held):
                found.state, found.why = IN_USE, "a daemon uses it"
                return
            found.state, found.why = _state(arena, found)  # A store may have come back since.
            if found.state == ORPHAN:
                shutil.rmtree(arena)
                found.removed = True
        except OSError as error:
            found.why += f"; {error.filename} cannot be deleted: {error.strerror}"


def _is_confirmed(orphans: Sequence[FoundArena]) -> bool:
    print("\n".join(_lines(orphans)))
    try:
        return input("Delete them, with the blocks in them? [y/N] ").strip().lower() in {"y", "yes"}
    except EOFError:
        print()
        return False


def _owner(path: Path) -> str:
    uid = path.stat().st_uid
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _lines(found: Sequence[FoundArena]) -> Iterator[str]:
    if not found:
        yield "there are no arenas"
    for each in found:
        yield f"{each.arena}  {each.size_bytes / 2**20:,.1f} MiB, changed {_span(each.changed_s_ago)} ago"
        yield f"  {'deleted' if each.removed else each.state}: {each.why}"
        if each.store and each.store not in each.why:
            yield f"  store: {each.store}"


def _span(seconds: int) -> str:
    for unit_s, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds // unit_s} {name}"
    return f"{seconds} s"
