"""Which SSD files the settings ask for, and which of a store's files they are: drives are added, moved and drained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations, count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvservice.blocks import TierName
from kvservice.index.block_index import BlockIndex
from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.ssd_files import (
    file_name,
    files_in,
    is_missing,
    partial_of,
    read_header,
    remove_partial_files,
)

log = logging.getLogger(__name__)


class Drives(NamedTuple):
    """The SSD files to open."""

    files: list[Path | None]  # By number; None where a file left the store.
    creatable: list[int]  # Files that may be created. Any other that is missing has blocks, or its drive is missing.
    leaving: list[int]  # Files whose blocks move to the others, or that have none.


def find_drives(index: BlockIndex, folders: Sequence[Path], drained: Sequence[Path]) -> Drives:
    """The files of the drives in `folders`, one each, and of those in `drained`.

    A file keeps its number in any folder where its drive is mounted. Changes nothing but what an interrupted start has
    left. Raises StoreMismatch if a file with blocks is in none of the folders, or a new folder is missing; OSError.
    """
    known = {number: path for number, path in enumerate(index.ssd_files) if path is not None}
    files: dict[int, Path] = {}
    leaving: list[int] = []
    new: list[Path] = []
    _expect_different(folders)
    for folder in (each.absolute() for each in folders):
        remove_partial_files(folder, index.store_id)
        if (found := _find(folder, known, files, index.store_id)) is not None:
            files[found[0]] = found[1]
        elif folder.is_dir():
            new.append(folder)
        else:
            raise StoreMismatch(f"ssd.paths: there is no folder {folder}; create it, or mount its drive")
    for folder in (each.absolute() for each in drained):
        found = _find(folder, known, files, index.store_id)
        if found is None or is_missing(found[1]):
            what = "has no SSD file of this store" if folder.is_dir() else "is not there"
            log.warning("ssd.drained_paths: %s %s; remove it from the setting, or mount its drive", folder, what)
        else:
            files[found[0]] = found[1]
            leaving.append(found[0])
    for number, path in known.items():
        if number not in files:
            _expect_unused(index, number, path)
            partial_of(path).unlink(missing_ok=True)
            if not is_missing(path):
                files[number] = path
                leaving.append(number)
    # A drained file whose drive is away has its blocks still, if the start that was to move them did not end.
    interrupted = index.ssd_files_changing & files.keys()
    creatable = [
        number for number in sorted(interrupted) if is_missing(files[number]) and not _block_count(index, number)
    ]
    stale = index.stale_ssd_files
    for folder in new:
        number = next(each for each in count() if each not in files and each not in stale)
        files[number] = folder / file_name(number)
        creatable.append(number)
    return Drives([files.get(number) for number in range(max(files) + 1)], creatable, leaving)


def left_behind(drives: Drives) -> set[int]:
    """The numbers of files that have left, and are still there: a failing drive is often read-only."""
    leaving = {number: drives.files[number] for number in drives.leaving}
    return {number for number, path in leaving.items() if path is not None and not is_missing(path)}


def leave_ssd(index: BlockIndex, drained: Sequence[Path]) -> None:
    """Drop the blocks on SSD of a store that is to have no SSD tier any more, and delete the files, if `drained` has
    their folders.

    Raises StoreMismatch if a file with blocks is elsewhere: without its tier, a block that is discarded would be found
    again once the tier is back.
    """
    files = [path for path in index.ssd_files if path is not None]
    found = index.load(TierName.SSD)
    keys = [*found.keys, *found.damaged]
    folders = {folder.absolute() for folder in drained}
    if keys and not {path.parent for path in files} <= folders:
        raise StoreMismatch(
            f"ssd.capacity_bytes is 0, and {len(keys)} blocks are on SSD in {', '.join(map(str, files))}: set it to "
            "more; or to drop these blocks, name the folders in ssd.drained_paths"
        )
    index.delete_now(TierName.SSD, keys)
    for path in files:
        if path.parent in folders:
            path.unlink(missing_ok=True)
            log.warning("%s is deleted, with the blocks of the SSD tier: there is none any more", path)
    kept = [None if path is None or path.parent in folders else path for path in index.ssd_files]
    index.remember_ssd_files(kept)


def _expect_different(folders: Sequence[Path]) -> None:
    """Raises StoreMismatch if two names are of one folder, as a symbolic link and its target: one drive would hold two
    files, and its failure would cost both.
    """
    for one, other in combinations((each for each in folders if each.is_dir()), 2):
        if one.samefile(other):
            raise StoreMismatch(
                f"ssd.paths: {one} and {other} are the same folder: name it once. If the store has two files in it, "
                "name the folder in ssd.drained_paths too, by its other name"
            )


def _find(folder: Path, known: dict[int, Path], taken: dict[int, Path], store_id: bytes) -> tuple[int, Path] | None:
    """The store's file in this folder that no other folder has taken, with its number. It may be missing there."""
    for number, path in sorted(files_in(folder, store_id).items()):
        if number not in taken and not _is_copy(path, number, known, store_id):
            return number, path
    missing = {number: path for number, path in known.items() if path.parent == folder and number not in taken}
    return next(((number, path) for number, path in sorted(missing.items()) if is_missing(path)), None)


def _is_copy(path: Path, number: int, known: dict[int, Path], store_id: bytes) -> bool:
    """Whether the file is the copy of one in use, or an older one: that of this number is elsewhere."""
    other = known.get(number)
    if other is None or is_missing(other) or path.samefile(other):
        return False
    header = read_header(other)
    return header is not None and (header.store_id, header.number) == (store_id, number)


def _block_count(index: BlockIndex, number: int) -> int:
    """The blocks in a file."""
    return int(np.count_nonzero(index.load(TierName.SSD).records["segment"] == number))


def _expect_unused(index: BlockIndex, number: int, path: Path) -> None:
    if blocks := _block_count(index, number):
        raise StoreMismatch(
            f"{path} has {blocks} blocks, and ssd.paths does not name its folder: name it there; or in "
            "ssd.drained_paths, and its blocks move to the other drives; or if the drive is lost, drop its blocks with "
            "`kvservice check --repair`"
        )
