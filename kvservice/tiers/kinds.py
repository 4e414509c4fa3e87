"""The kinds of tiers below SSD, by the names that the configuration uses: a new kind is one class and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvservice.blocks import TierName
from kvservice.tiers.base import DurableTier, StoreMismatch
from kvservice.tiers.files import FileCalls
from kvservice.tiers.ssd import SsdTier, is_missing


class OpenTier(Protocol):
    """Opens a tier, or creates it. A class has it as its class method `open`."""

    def __call__(
        self,
        path: Path,
        *,
        name: TierName,
        store_id: bytes,
        capacity_bytes: int,
        io_threads: int,
        calls: FileCalls,
        may_create: bool,
    ) -> DurableTier:
        """The tier in the folder `path`.

        If `may_create` is false, the index has blocks of the tier, so a missing folder is an error. Raises
        StoreMismatch for a medium of another store, or a missing one that may not be created; OSError.
        """


def _open_files(
    path: Path,
    *,
    name: TierName,
    store_id: bytes,
    capacity_bytes: int,
    io_threads: int,
    calls: FileCalls,
    may_create: bool,
) -> SsdTier:
    """One preallocated file, as on SSD: for a slower drive or a network file system."""
    file = path / f"tier-{name}.kv"
    if not may_create and is_missing(file):
        raise StoreMismatch(f"{file} is missing, and the tier has blocks in it: mount its drive or restore the file")
    return SsdTier.open(
        [file],
        store_id=store_id,
        capacity_bytes=capacity_bytes,
        io_threads=io_threads,
        calls=calls,
    )


KINDS: dict[str, OpenTier] = {"file": _open_files}


def tier_kind(kind: str) -> OpenTier:
    """How to open a tier of this kind: a name in `KINDS`, or ``module:Class`` of a class with `OpenTier` as `open`.

    Raises ValueError if there is no such kind.
    """
    if kind in KINDS:
        return KINDS[kind]
    module, _, name = kind.partition(":")
    try:
        opener: Callable[..., DurableTier] = getattr(importlib.import_module(module), name).open
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(KINDS)
        raise ValueError(
            f"{kind!r} is not a kind of tier ({known}) and not a class as module:Class: {error}"
        ) from error
    return opener
