"""Single flight: one upload of an object runs at a time. Other saves of the object queue for it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Claim:
    """One save's place in the queue for an object. `ended` is set when the save does not need it any more."""

    name: bytes  # The object's key.
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Claims:
    """The queues of all objects that are being saved. Called on the event loop."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[Claim]] = {}

    @property
    def object_count(self) -> int:
        """The number of objects that are being saved."""
        return len(self._queues)

    def waiting_for(self, key: bytes) -> int:
        """The number of saves that claim an object of this block, with the one that uploads it."""
        return sum(len(queue) for name, queue in self._queues.items() if name.startswith(key))

    def enqueue(self, name: bytes) -> Claim:
        claim = Claim(name)
        self._queues.setdefault(name, deque()).append(claim)
        return claim

    def is_first(self, claim: Claim) -> bool:
        return self._queues[claim.name][0] is claim

    async def until_first(self, claim: Claim) -> None:
        """Wait until all earlier claims of the object have ended, or this one has."""
        while not claim.ended.done() and not self.is_first(claim):
            before = self._queues[claim.name][0]
            await asyncio.wait({before.ended, claim.ended}, return_when=asyncio.FIRST_COMPLETED)

    def end(self, claim: Claim) -> None:
        queue = self._queues[claim.name]
        queue.remove(claim)
        if not queue:
            del self._queues[claim.name]
        claim.ended.set_result(None)
