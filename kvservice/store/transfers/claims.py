"""Single flight: an object is uploaded once at a time. Saves that bring the same object queue for it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Claim:
    """One save's place in the queue for an object. `ended` is set when the save needs it no more."""

    name: bytes  # The object's key.
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Claims:
    """The queues of all objects that are being saved. Called on the event loop."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[Claim]] = {}

    @property
    def object_count(self) -> int:
        """How many objects are being saved."""
        return len(self._queues)

    def waiting_for(self, key: bytes) -> int:
        """How many saves claim an object of this block, the one that uploads it included."""
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
