"""What the store holds and does at one time, for the metrics.

It scans the block table on the reader's thread, in parts: a long operation on an array would keep the event loop from
running.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from kvservice.blocks import BlockTable, TierName
from kvservice.clock import Clock
from kvservice.store.miss_reasons import MissReasons, Reason, SpaceFor
from kvservice.store.mover.active_policy import ActivePolicy
from kvservice.store.mover.promoter import Promoter
from kvservice.store.mover.write_behind import WriteBehind
from kvservice.store.operations.drain import Drain
from kvservice.store.transfers.admission import Admission
from kvservice.store.transfers.upload import Uploads
from kvservice_api.errors import Draining, IndexFull, Overloaded, TierFull, UploadCorrupted
from kvservice_api.layout import Layout

STATES = ("serving", "draining", "stopping")
_ON_REQUEST = "request"
_SPACE_FOR = (*(each.name.lower() for each in SpaceFor if each is not SpaceFor.UNKNOWN), _ON_REQUEST)
_REFUSED_FOR = [each.reason for each in (Draining, IndexFull, Overloaded, TierFull, UploadCorrupted)]
_ROWS_A_PART = 65_536  # They take a third of a millisecond.


@dataclass(frozen=True, slots=True)
class StoreGauges:
    """Counts of objects, and bytes of their images."""

    blocks: Mapping[TierName, int]  # Copies in each tier.
    unwritten_blocks: int  # Only the first tier has them.
    unwritten_bytes: int
    pinned_blocks: int
    pinned_bytes: int
    layouts: Mapping[int, tuple[Layout, int]]  # By id: the layout and its objects.
    promoting_blocks: int
    promoting_bytes: int
    write_queue: Mapping[TierName, int]  # By the tier that is written to.
    transfers: Mapping[tuple[str, str], int]  # That run, by kind and path.
    transfers_max: Mapping[tuple[str, str], int]  # Saves in place have a limit per client.
    policy: str
    state: str  # One of `STATES`.
    evicted: Mapping[tuple[str, str], int]  # Copies since the start, by tier and what got their space.
    refused: Mapping[str, int]  # Blocks of saves since the start, by the error's reason; 0 for the usual ones.


class Gauges:
    """Reads them. Call `read` on any thread; nothing else is locked or changed."""

    def __init__(
        self,
        blocks: BlockTable,
        layouts: Mapping[int, Layout],
        history: MissReasons,
        policy: ActivePolicy,
        promoter: Promoter | None,
        writers: Mapping[TierName, WriteBehind],
        admission: Admission,
        uploads: Uploads,
        drain: Drain,
        clock: Clock,
    ) -> None:
        """`writers` by the tier that each copies from."""
        self._blocks = blocks
        self._layouts = layouts
        self._history = history
        self._policy = policy
        self._promoter = promoter
        self._writers = {blocks.tiers[blocks.position(tier) + 1]: writer for tier, writer in writers.items()}
        self._admission = admission
        self._uploads = uploads
        self._drain = drain
        self._clock = clock

    def read(self) -> StoreGauges:
        blocks, promoter, admission = self._blocks, self._promoter, self._admission
        scanned = np.zeros(len(blocks.tiers) + 4, np.int64)
        now_ms, row_end = np.uint64(self._clock.wall_ms()), blocks.row_end
        for start in range(0, row_end, _ROWS_A_PART):
            scanned += _scan(blocks, slice(start, min(start + _ROWS_A_PART, row_end)), now_ms)
        *copies, unwritten_blocks, unwritten_bytes, pinned_blocks, pinned_bytes = scanned.tolist()
        streamed, noted = admission.saves.open_count, dict(self._history.noted)
        return StoreGauges(
            blocks=dict(zip(blocks.tiers, copies, strict=True)),
            unwritten_blocks=unwritten_blocks,
            unwritten_bytes=unwritten_bytes,
            pinned_blocks=pinned_blocks,
            pinned_bytes=pinned_bytes,
            layouts={id_: (layout, blocks.live_of_layout[id_]) for id_, layout in list(self._layouts.items())},
            promoting_blocks=promoter.pending_count if promoter is not None else 0,
            promoting_bytes=promoter.pending_bytes if promoter is not None else 0,
            write_queue={tier: writer.pending for tier, writer in self._writers.items()},
            transfers={
                ("load", "stream"): admission.loads.open_count,
                ("load", "in_place"): admission.in_place_loads.open_count,
                ("save", "stream"): streamed,
                ("save", "in_place"): max(0, len(self._uploads.open) - streamed),
            },
            transfers_max={
                ("load", "stream"): admission.loads.open_max,
                ("load", "in_place"): admission.in_place_loads.open_max,
                ("save", "stream"): admission.saves.open_max,
            },
            policy=self._policy.name,
            state=self._drain.state_name,
            evicted=dict.fromkeys(product(blocks.tiers, _SPACE_FOR), 0)
            | {
                (tier, what if reason is Reason.EVICTED else _ON_REQUEST): count
                for (reason, tier, what), count in noted.items()
                if reason in (Reason.EVICTED, Reason.EVICTED_ON_REQUEST)
            },
            refused=dict.fromkeys(_REFUSED_FOR, 0)
            | {what: count for (reason, _, what), count in noted.items() if reason is Reason.REFUSED},
        )


def _scan(blocks: BlockTable, rows: slice, now_ms: np.uint64) -> list[int]:
    """Of these rows: the copies in each tier; the blocks that only the first one has, and the pinned ones, each with
    their bytes. The event loop may change rows meanwhile, so the last ones may be counted wrongly.
    """
    live, sizes = blocks.live[rows], blocks.size_bytes[rows]
    resident = [blocks.lie_in(rows, tier) & live for tier in blocks.tiers]
    unwritten = resident[0]
    for slower in resident[1:]:
        unwritten = unwritten & ~slower
    pinned = (blocks.pinned_until_ms[rows] > now_ms) & live
    marked = [each for mask in (unwritten, pinned) for each in (np.count_nonzero(mask), sizes[mask].sum())]
    return [int(each) for each in (*map(np.count_nonzero, resident), *marked)]
