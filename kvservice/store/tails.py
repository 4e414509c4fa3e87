"""Partial blocks by the key that they continue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kvservice.blocks import BlockTable, Rows
from kvservice_api.layout import Layout


class Tails:
    """The visible rows of partial blocks, by the key that they continue: with them a lookup finds the end of a history.

    A lookup by keys finds the whole blocks of a conversation that was continued, but not its last block: the key of a
    partial block depends on how many tokens there were when it was saved. Nothing here is recorded: at start it is
    made from the table.
    """

    def __init__(self, blocks: BlockTable, layouts: Mapping[int, Layout]) -> None:
        """`layouts` by id, also those that are opened later."""
        self._blocks = blocks
        self._layouts = layouts
        self._rows: dict[bytes, dict[int, None]] = {}  # Parent key -> its rows in the order in which they were stored.
        stored = self._partial(blocks.live_rows())
        self._note(stored[np.argsort(blocks.stored_at_ms[stored], kind="stable")])

    def __len__(self) -> int:
        """How many keys have tails."""
        return len(self._rows)

    def add(self, rows: Sequence[int]) -> None:
        """Note rows that are visible now. Whole blocks among them are skipped."""
        self._note(self._partial(np.asarray(rows, np.int64)))

    def remove(self, rows: Sequence[int]) -> None:
        """Remove rows that are no longer visible. Whole blocks among them are skipped."""
        for row in rows:
            parent = self._blocks.parent_key[row].tobytes()
            siblings = self._rows.get(parent, {})
            if row in siblings:
                del siblings[row]
                if not siblings:
                    del self._rows[parent]

    def newest_first(self, parent: bytes) -> Iterator[int]:
        """The rows of partial blocks that continue this key. Nothing may be added or removed meanwhile."""
        return iter(reversed(self._rows.get(parent, {})))

    def _partial(self, rows: Rows) -> Rows:
        layout_ids, which = np.unique(self._blocks.layout_id[rows], return_inverse=True)
        full = np.array([self._layouts[layout_id].block_tokens for layout_id in layout_ids.tolist()], np.int64)
        return rows[self._blocks.token_count[rows] < full[which]]

    def _note(self, rows: Rows) -> None:
        for row, parent in zip(rows.tolist(), self._blocks.parent_key[rows].tolist(), strict=True):
            self._rows.setdefault(parent, {})[row] = None
