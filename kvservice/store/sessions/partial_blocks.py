"""The partial blocks that sessions name.

No other conversation looks a partial block up, so one that no session names any more is dropped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from kvservice.index.block_index import BlockIndex
from kvservice.index.session_records import Manifest
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.miss_reasons import Reason
from kvservice.store.sessions import manifests
from kvservice.store.tasks import Tasks
from kvservice_api.errors import StorageFailed

log = logging.getLogger(__name__)

_DROPPED_A_TURN = 32  # They take a millisecond of the event loop.
_LET_GO = "no session names it any more"  # The reason of a dropped partial block, for `explain`.


class NamedPartialBlocks:
    """How many manifests name each partial block."""

    def __init__(self, index: BlockIndex, lifecycle: BlockLifecycle, tasks: Tasks) -> None:
        self._index = index
        self._lifecycle = lifecycle
        self._tasks = tasks
        self._named: Counter[bytes] = Counter()

    def add(self, manifest: Manifest) -> None:
        """Count one more manifest, whose partial blocks are not dropped from now on."""
        self._named.update(self._keys(manifest))

    def forget(self, manifest: Manifest) -> list[bytes]:
        """Count one manifest fewer, and drop nothing. Returns the partial blocks that no manifest names any more."""
        orphans = []
        for key in self._keys(manifest):
            self._named[key] -= 1
            if not self._named[key]:
                del self._named[key]
                orphans.append(key)
        return orphans

    def drop(self, gone: Iterable[Manifest], why: Reason) -> None:
        """Forget manifests, and drop the partial blocks that no manifest names any more."""
        if orphans := [key for manifest in gone for key in self.forget(manifest)]:
            self._tasks.start(self._drop(orphans, why), "drop of partial blocks")

    def _keys(self, manifest: Manifest) -> set[bytes]:
        return manifests.partial_keys(manifest, self._index.layouts[manifest.layout_id])

    async def _drop(self, keys: Sequence[bytes], why: Reason) -> None:
        for start in range(0, len(keys), _DROPPED_A_TURN):
            try:
                await self._lifecycle.discard(self._rows(keys[start : start + _DROPPED_A_TURN]), why, _LET_GO)
            except StorageFailed as error:  # They are invisible already; their records are removed later.
                log.warning("partial blocks of sessions could not be dropped yet: %s", error.message)

    def _rows(self, keys: Sequence[bytes]) -> list[int]:
        """The rows of these partial blocks that are stored and that still no manifest names."""
        blocks, layouts = self._lifecycle.blocks, self._index.layouts
        orphans = [key for key in keys if not self._named[key]]  # A session may name one again.
        rows = [row for first in blocks.rows_of_keys(orphans).tolist() for row in blocks.shards_of(first)]
        # Clients state which blocks are partial. A full block is not dropped, because other conversations can use it.
        return [row for row in rows if blocks.token_count[row] < layouts[int(blocks.layout_id[row])].block_tokens]
