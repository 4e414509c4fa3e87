"""A new durable index takes the place of an old one, in steps that an interruption leaves recognizable.

The new index is created in the folder ``index.new`` beside the old one. A file in it gives the step: ``unfinished``
until the index is whole, then ``complete`` until the exchange is over. The states after an interruption:

=====================  =================  ========================================  ==========================
``index.new``          ``index``          what was interrupted                      what ends it
=====================  =================  ========================================  ==========================
has ``unfinished``     any                making the new index                      the new index is removed
has ``complete``       the old one        nothing was exchanged yet                 the new index is removed
has ``complete``       none               the exchange, where it takes two steps    the new index is put there
has neither            has ``complete``   giving the old one a name of its own      the old one gets that name
none                   has ``complete``   nothing but removing the file             the file is removed
=====================  =================  ========================================  ==========================

In the second case a daemon may have changed the old index since, so the new one is no longer right.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

from kvservice.durable_files import sync_folder

_UNFINISHED_NAME, _COMPLETE_NAME = "unfinished", "complete"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def new_index(store: Path) -> Path:
    """The folder in which a new index is made."""
    return store / "index.new"


def begin(store: Path) -> Path:
    """Make the folder for a new index. Ends an earlier replacement that was interrupted. Raises OSError."""
    end_interrupted(store)
    new = new_index(store)
    new.mkdir()
    (new / _UNFINISHED_NAME).touch()
    return new


def put_in_place(store: Path) -> Path | None:
    """Have the new index take the old one's place. Returns where the old one is now, if there was one. Raises OSError.

    One step where the file system can exchange two names. Otherwise there is a moment without an index.
    """
    new, index = new_index(store), store / "index"
    (new / _UNFINISHED_NAME).rename(new / _COMPLETE_NAME)
    sync_folder(new)
    kept: Path | None = None
    if not os.path.lexists(index):
        _rename(new, index)
    elif _exchange(new, index):
        sync_folder(store)
        kept = _set_aside(new)
    else:
        kept = _set_aside(index)
        _rename(new, index)
    (index / _COMPLETE_NAME).unlink()
    return kept


def interrupted(store: Path) -> str:
    """What an interrupted replacement left, and the command to run; empty if there is nothing. Changes nothing."""
    new, index = new_index(store), store / "index"
    if not os.path.lexists(new):
        return ""
    if _is_undone(new, index):
        what, then = f"before its new index was in place, so the index {index} is as it was", "removes what is left"
    elif (new / _COMPLETE_NAME).exists():
        what, then = f"while it put its new index in place: there is no {index}, and {new} is complete", "finishes it"
    else:
        what, then = f"when its new index was in place; the old one is {new}", "gives that another name"
    return f"a repair of the index was interrupted {what}: `kvservice check {store} --repair` {then}"


def end_interrupted(store: Path) -> str:
    """Finish or undo an interrupted replacement. Returns what was done; empty if nothing was. Raises OSError."""
    new, index = new_index(store), store / "index"
    with suppress(FileNotFoundError, NotADirectoryError):
        if not (new / _COMPLETE_NAME).exists():
            (index / _COMPLETE_NAME).unlink()
    if not os.path.lexists(new):
        return ""
    if _is_undone(new, index):
        _remove(new)
        return "an earlier repair of the index was interrupted, and is undone: the index is as it was before"
    if (new / _COMPLETE_NAME).exists():
        _rename(new, index)
        (index / _COMPLETE_NAME).unlink()
        return "an earlier repair of the index was interrupted, and is finished: its new index is in place"
    return f"an earlier repair of the index was interrupted, and is finished: the old index is {_set_aside(new)}"


def _is_undone(new: Path, index: Path) -> bool:
    """Whether the new index must be removed."""
    if (new / _COMPLETE_NAME).exists():
        return os.path.lexists(index)
    return (new / _UNFINISHED_NAME).exists() or (new.is_dir() and not any(new.iterdir()))


def _remove(new: Path) -> None:
    """Removes the step files last: after an interruption here it must not look like an old index."""
    for path in new.iterdir():
        if path.name not in (_UNFINISHED_NAME, _COMPLETE_NAME):
            path.unlink()
    shutil.rmtree(new)


def _set_aside(old: Path) -> Path:
    """Give an old index the first free name ``index.damaged-1``, ``-2`` and so on."""
    number = 1
    while os.path.lexists(kept := old.with_name(f"index.damaged-{number}")):
        number += 1
    _rename(old, kept)
    return kept


def _rename(old: Path, new: Path) -> None:
    old.rename(new)
    sync_folder(new.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Have two names change places in one step. False if the file system, the kernel or the C library cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
