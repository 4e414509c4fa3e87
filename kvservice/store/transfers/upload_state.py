"""One upload's destinations, and what is known of their bytes: for the parts of the save path that work on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, BlockTable, Extent, Rows
from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.transfers.admission import Claim
from kvservice.store.transfers.arrived_slices import ArrivedSlices
from kvservice.store.transfers.save_request import SaveOutcome, SavePath, SaveRequest
from kvservice_api.image import BlockGeometry


@dataclass(slots=True, eq=False)
class Destination:
    """The destination of one block's bytes, once it has space."""

    position: int
    claim: Claim
    geometry: BlockGeometry
    slices: ArrivedSlices
    extent: Extent | None = None
    image: memoryview | None = None


@dataclass(slots=True, eq=False)
class UploadState:
    caller: Caller
    client: Client
    request: SaveRequest
    path: SavePath
    began_s: float  # By the monotonic clock.
    checksums: NDArray[np.uint64]  # Of received slices: ``[block, layer]``.
    outcome: SaveOutcome = field(default_factory=SaveOutcome)
    destinations: dict[int, Destination] = field(default_factory=dict)  # By position.
    # Positions of blocks that an earlier chain has too, and their first one.
    first_of: dict[int, int] = field(default_factory=dict)
    is_counted: bool = False  # The metrics have its outcome.


def stored_rows(blocks: BlockTable, request: SaveRequest, positions: Sequence[int]) -> Rows:
    """Per block a row with everything that this save would store of it, in its layout, or NO_ROW."""
    rows = blocks.rows_of_keys([request.keys[position] for position in positions])
    found = np.full(len(rows), NO_ROW)
    while len(there := np.flatnonzero((rows != NO_ROW) & (found == NO_ROW))):
        those = rows[there]
        fits = (blocks.layout_id[those] == request.layout_id) & blocks.cover(those, request.shard)
        found[there[fits]] = those[fits]
        rows[there] = blocks.next_shard[those]
    return found
