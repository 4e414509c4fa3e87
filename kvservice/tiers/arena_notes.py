"""Which arena belongs to which store: a note in the arena's folder, and a list in the store's.

Both are for operators' commands; a daemon does not read the note, and the list only to keep it. In the arena's folder::

    store.json   {"store": folder, "device": of the folder, "above": [[device, inode], ...] of the folders above it}

in the store's folder, each line a folder, the last one the arena in use::

    arenas

Devices and inodes tell a folder that is gone from one that is not visible here: on a drive that is not mounted, or in
another container.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple, Self

ARENA_NOTE_NAME = "store.json"
ARENAS_NAME = "arenas"


class ArenaNote(NamedTuple):
    """The store of an arena, and where its folder was at its last start."""

    store: Path  # Without links.
    device: int  # Of the store's folder.
    above: list[tuple[int, int]]  # Device and inode of each of `store.parents`.

    @classmethod
    def of(cls, store: Path) -> Self:
        """Raises OSError."""
        store = store.resolve()
        above = [(found.st_dev, found.st_ino) for found in map(Path.stat, store.parents)]
        return cls(store, store.stat().st_dev, above)

    def is_visible_place(self) -> bool:
        """Whether the place of the store's folder is visible here, so that the folder would be if it existed: the
        nearest folder above it that exists is the one of that time. Raises OSError.
        """
        for path, noted in zip(self.store.parents, self.above, strict=True):
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            return (found.st_dev, found.st_ino) == noted
        return False


def write_arena_note(arena: Path, store: Path) -> None:
    """Note the store in the arena's folder. Raises OSError."""
    note = ArenaNote.of(store)
    _replace(arena / ARENA_NOTE_NAME, json.dumps({**note._asdict(), "store": str(note.store)}) + "\n")


def read_arena_note(arena: Path) -> ArenaNote | None:
    """None if there is none, or it is damaged. Raises PermissionError."""
    try:
        note = json.loads((arena / ARENA_NOTE_NAME).read_text())
        found = ArenaNote(Path(note["store"]), int(note["device"]), [(int(a), int(b)) for a, b in note["above"]])
        return found if len(found.above) == len(found.store.parents) else None
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_arena(store: Path, arena: Path) -> list[Path]:
    """Note the arena in use in the store's folder. Returns earlier ones that are still there. Raises OSError."""
    before = arenas_of(store)
    earlier = [each for each in before if each != arena and each.is_dir()]
    if before != [*earlier, arena]:
        _replace(store / ARENAS_NAME, "".join(f"{each}\n" for each in (*earlier, arena)))
    return earlier


def arenas_of(store: Path) -> list[Path]:
    """The arenas that the store's folder notes, the one in use last. Empty if it notes none."""
    try:
        lines = (store / ARENAS_NAME).read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [Path(line) for line in lines if line]


def _replace(path: Path, text: str) -> None:
    """Readers see the former content or the new one. Not synced: a note that is lost is written at the next start."""
    written = path.with_name(f"{path.name}.new")
    with open(written, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(os.fsencode(text))
    written.replace(path)
