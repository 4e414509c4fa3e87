"""Reads the index at start: every sound record of a tier, and the damaged ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import OBJECT_KEY, ObjectKeys, pack_object_keys
from kvservice.index.environment import BLOCKS, Environment
from kvservice.index.records import RECORD, Records, decode_records

UNKNOWN_LAYOUT = "its layout is unknown"
_OFFSET_BITS = 48
_SEGMENT_BITS = 15  # Segment and offset together stay a positive 64-bit number.


@dataclass(frozen=True)
class Recovered:
    """The sound records of one tier, and the keys of the others with what is wrong.

    A damaged record is not served and its space counts as free. Delete it before that space is reserved.
    """

    object_keys: ObjectKeys
    records: Records
    damaged: dict[bytes, str]

    @cached_property
    def keys(self) -> list[bytes]:
        """The object keys one by one; a million take 100 MB."""
        return [key.tobytes() for key in self.object_keys]


def load(environment: Environment, layout_ids: Collection[int]) -> Recovered:
    """All records: a million take about a second.

    Damaged is a record whose crc is wrong, whose layout is unknown, or whose extent overlaps another:
    of two records for the same bytes at least one is wrong, and nothing says which.
    """
    count = environment.count(BLOCKS)
    all_keys, all_records = np.empty(count, OBJECT_KEY), np.empty(count, RECORD)  # Filled in, for joining takes space.
    end = 0
    damaged: dict[bytes, str] = {}
    known_layouts = np.fromiter(layout_ids, np.uint32, len(layout_ids))
    for names, values in environment.read(BLOCKS):
        sound, records = decode_records(names, values)
        if not sound.all():
            damaged.update((names[row], "its record does not match its crc") for row in np.flatnonzero(~sound).tolist())
            names, records = [names[row] for row in np.flatnonzero(sound).tolist()], records[sound]
        keys = pack_object_keys(names)
        unknown = ~np.isin(records["layout_id"], known_layouts)
        keys, records = _drop(keys, records, unknown, UNKNOWN_LAYOUT, damaged)
        start, end = end, end + len(keys)
        all_keys[start:end], all_records[start:end] = keys, records
    keys, records = all_keys[:end], all_records[:end]
    keys, records = _drop(keys, records, overlaps(records), "its extent overlaps another", damaged)
    return Recovered(keys, records, damaged)


def _drop(
    keys: ObjectKeys, records: Records, wrong: NDArray[np.bool_], why: str, damaged: dict[bytes, str]
) -> tuple[ObjectKeys, Records]:
    if not wrong.any():
        return keys, records
    damaged.update((key.tobytes(), why) for key in keys[wrong])
    return keys[~wrong], records[~wrong]


def overlaps(records: Records) -> NDArray[np.bool_]:
    """Which records share bytes with another record, or name a place that no tier can have."""
    found = np.zeros(len(records), np.bool_)
    segments, offsets, sizes = (records[name].astype(np.uint64) for name in ("segment", "offset_bytes", "size_bytes"))
    limit = np.uint64(1) << np.uint64(_OFFSET_BITS)
    found |= (offsets >= limit) | (sizes > limit - np.minimum(offsets, limit))
    found |= segments >= np.uint64(1 << _SEGMENT_BITS)
    rows = np.flatnonzero(~found)
    starts = (segments[rows] << np.uint64(_OFFSET_BITS)) + offsets[rows]
    order = np.argsort(starts)
    starts = starts[order]
    ends = starts + sizes[rows][order]
    shared = np.zeros(len(rows), np.bool_)
    shared[1:] |= np.maximum.accumulate(ends)[:-1] > starts[1:]  # Begins inside an earlier one.
    shared[:-1] |= ends[:-1] > starts[1:]  # Reaches into the next one.
    found[rows[order]] = shared
    return found
