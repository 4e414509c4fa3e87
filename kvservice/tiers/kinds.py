"""The kinds of tiers below SSD, by the names that the configuration uses: a new kind is one class and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvservice.blocks import TierName
from kvservice.tiers.base import DurableTier, StoreMismatch
from kvservice.tiers.files import FileCalls
from kvservice.tiers.ssd import SsdTier
from kvservice.tiers.ssd_files import is_missing


@dataclass(frozen=True, slots=True)
class TierOptions:
    """How a tier below SSD is opened."""

    path: Path  # Its folder.
    name: TierName
    store_id: bytes
    capacity_bytes: int
    io_threads: int
    calls: FileCalls
    may_create: bool  # False: the index has blocks of the tier, so a missing medium is an error.


#: Opens a tier, or creates it. A class has it as its class method `open`. Raises StoreMismatch for a medium of another
#: store, or a missing one that may not be created; OSError.
OpenTier = Callable[[TierOptions], DurableTier]


def _open_file(options: TierOptions) -> SsdTier:
    """One preallocated file, as on SSD: for a slower drive or a network file system."""
    file = options.path / f"tier-{options.name}.kv"
    if not options.may_create and is_missing(file):
        raise StoreMismatch(f"{file} is missing, and the tier has blocks in it: mount its drive or restore the file")
    return SsdTier.open(
        [file],
        name=options.name,
        store_id=options.store_id,
        capacity_bytes=options.capacity_bytes,
        io_threads=options.io_threads,
        calls=options.calls,
    )


KINDS: dict[str, OpenTier] = {"file": _open_file}


def tier_kind(kind: str) -> OpenTier:
    """How to open a tier of this kind: a name in `KINDS`, or ``module:Class`` of a class whose `open` is an `OpenTier`.

    Raises ValueError if there is no such kind.
    """
    if kind in KINDS:
        return KINDS[kind]
    module, _, name = kind.partition(":")
    try:
        opener: OpenTier = getattr(importlib.import_module(module), name).open
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(KINDS)
        raise ValueError(
            f"{kind!r} is not a kind of tier ({known}) and not a class as module:Class: {error}"
        ) from error
    return opener
