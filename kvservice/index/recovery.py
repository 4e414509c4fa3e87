"""What the index says at start: every sound record of a tier, and which ones are not to be trusted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvservice.index.environment import BLOCKS, Environment
from kvservice.index.records import Records, decode_records, new_records

_OFFSET_BITS = 48
_SEGMENT_BITS = 15  # Segment and offset together stay a positive 64-bit number.


@dataclass(frozen=True, slots=True)
class Recovered:
    """The sound records of one tier, and the keys of the others with what is wrong.

    A damaged record is not served and its space counts as free. Delete it before that space is lent.
    """

    keys: list[bytes]
    records: Records
    damaged: dict[bytes, str]


def load(environment: Environment, layout_ids: Collection[int]) -> Recovered:
    """All records: a million take about a second.

    Damaged is a record whose crc is wrong, whose layout is unknown, or whose extent overlaps another:
    of two records for the same bytes at least one is wrong, and nothing says which.
    """
    keys: list[bytes] = []
    parts: list[Records] = [new_records(0)]
    damaged: dict[bytes, str] = {}
    known_layouts = np.fromiter(layout_ids, np.uint32, len(layout_ids))
    for names, values in environment.read(BLOCKS):
        sound, records = decode_records(names, values)
        names, records = _drop(names, records, ~sound, "its record does not match its crc", damaged)
        unknown = ~np.isin(records["layout_id"], known_layouts)
        names, records = _drop(names, records, unknown, "its layout is unknown", damaged)
        keys += names
        parts.append(records)
    records = np.concatenate(parts)
    keys, records = _drop(keys, records, overlaps(records), "its extent overlaps another", damaged)
    return Recovered(keys, records, damaged)


def _drop(
    keys: list[bytes], records: Records, wrong: NDArray[np.bool_], why: str, damaged: dict[bytes, str]
) -> tuple[list[bytes], Records]:
    if not wrong.any():
        return keys, records
    damaged.update((keys[row], why) for row in np.flatnonzero(wrong).tolist())
    return [keys[row] for row in np.flatnonzero(~wrong).tolist()], records[~wrong]


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
