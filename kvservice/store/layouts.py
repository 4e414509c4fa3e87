"""The layouts that were opened here, and the key generations of each.

Called on the event loop's thread.
"""

from __future__ import annotations

import asyncio

from kvservice.index.block_index import BlockIndex
from kvservice.store.caller import Caller
from kvservice.store.tasks import Tasks
from kvservice_api.layout import Layout


class Layouts:
    def __init__(self, index: BlockIndex, tasks: Tasks) -> None:
        assert index.key_generations is not None, "a daemon opened it"
        self._index = index
        self._generations = index.key_generations
        self._tasks = tasks

    async def open(self, caller: Caller, layout: Layout) -> bool:
        """Open a layout. True if it is new."""
        if self._index.layout_id(layout.fingerprint) is not None:
            return False
        await self._index.put_layout(layout)
        return True

    def find(self, caller: Caller, fingerprint: bytes) -> Layout:
        """Raises UnknownLayout."""
        return self._index.find_layout(fingerprint)[1]

    def generation(self, caller: Caller, fingerprint: bytes) -> int:
        """The key generation of a layout for the caller's tenant. Raises UnknownLayout."""
        self._index.find_layout(fingerprint)
        return self._generations.of(caller.tenant.number, fingerprint)

    async def begin_generation(self, caller: Caller, fingerprint: bytes) -> int:
        """Begin a key generation; it is durable on return. Raises UnknownLayout, StorageFailed."""
        self._index.find_layout(fingerprint)
        begun = self._tasks.start_quietly(self._generations.begin(caller.tenant.number, fingerprint), "key generation")
        return await asyncio.shield(begun)  # The caller's deadline must not interrupt it.
