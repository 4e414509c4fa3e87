"""Which SSD files the settings ask for, and which of a store's files they are: drives are added, moved and drained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvservice.blocks import TierName
from kvservice.index.block_index import BlockIndex
from kvservice.tiers.base import StoreMismatch
from kvservice.tiers.ssd_files import file_name, files_in, is_missing

log = logging.getLogger(__name__)


class Drives(NamedTuple):
    """The SSD files to open."""

    files: list[Path | None]  # By number; None where a file left the store.
    creatable: list[int]  # Files that never existed. Any other that is missing had blocks, or its drive is missing.
    leaving: list[int]  # Files whose blocks move to the others, or that have none.


def find_drives(index: BlockIndex, folders: Sequence[Path], drained: Sequence[Path]) -> Drives:
    """The files of the drives in `folders`, one each, and of those in `drained`.

    A file keeps its number in any folder where its drive is mounted. Raises StoreMismatch if a file with blocks is in
    none of the folders; OSError.
    """
    known = {number: path for number, path in enumerate(index.ssd_files) if path is not None}
    files: dict[int, Path] = {}
    creatable: list[int] = []
    leaving: list[int] = []
    new: list[Path] = []
    for folder in (each.absolute() for each in folders):
        number, path = _find(folder, known, files, index.store_id)
        if path is None:
            new.append(folder)
        else:
            files[number] = path
    for folder in (each.absolute() for each in drained):
        number, path = _find(folder, known, files, index.store_id)
        if path is None or is_missing(path):
            log.info("%s has no SSD file of this store: remove it from ssd.drained_paths", folder)
        else:
            files[number] = path
            leaving.append(number)
    for number, path in known.items():
        if number not in files:
            _expect_unused(index, number, path)
            if not is_missing(path):
                files[number] = path
                leaving.append(number)
    for folder in new:
        number = next(each for each in range(len(files) + 1) if each not in files)
        files[number] = folder / file_name(number)
        creatable.append(number)
    return Drives([files.get(number) for number in range(max(files) + 1)], creatable, leaving)


def _find(folder: Path, known: dict[int, Path], taken: dict[int, Path], store_id: bytes) -> tuple[int, Path | None]:
    """The store's file in this folder that no other folder has taken, with its number; None if there is none."""
    there = {number: path for number, path in known.items() if path.parent == folder and number not in taken}
    if there:
        return min(there.items())
    found = {number: path for number, path in files_in(folder, store_id).items() if number not in taken}
    for number, path in sorted(found.items()):
        # Otherwise it is a copy of a file in use, or an older one.
        if number not in known or is_missing(known[number]) or path.samefile(known[number]):
            return number, path
    return 0, None


def _expect_unused(index: BlockIndex, number: int, path: Path) -> None:
    count = int(np.count_nonzero(index.load(TierName.SSD).records["segment"] == number))
    if count:
        raise StoreMismatch(
            f"{path} has {count} blocks, and ssd.paths does not name its folder: name it there; or in "
            "ssd.drained_paths, and its blocks move to the other drives; or if the drive is lost, drop its blocks with "
            "`kvservice check --repair`"
        )
