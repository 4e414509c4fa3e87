"""Which transfers may begin, how long one may be idle, and what one message may carry: one place for all listeners.

It also allows only one upload per object at a time, and saves of the same object queue for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvservice.clock import Clock
from kvservice_api.errors import DeadlineExceeded, IncompleteSave, InvalidFrame, InvalidRequest, Overloaded

T = TypeVar("T")

# Claims and records of more slices in one save would block the event loop for over 5 ms.
SAVE_BLOCKS_MAX = 256
SAVE_SLICES_MAX = 32768
IN_PLACE_UPLOADS_PER_CLIENT_MAX = 64


class Gate:
    """Counts the open transfers of one kind, and refuses more than `open_max`."""

    def __init__(self, kind: str, open_max: int) -> None:
        self._kind = kind
        self.open_max = open_max
        self.open_count = 0

    def check(self) -> None:
        """Raises Overloaded if no more may be opened."""
        if self.open_count >= self.open_max:
            raise Overloaded(f"{self.open_max} {self._kind} are open, the most that this daemon takes")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Counts one more as open until the block is left. Raises Overloaded."""
        self.check()
        self.open_count += 1
        try:
            yield
        finally:
            self.open_count -= 1


class Admission:
    """The rules of all transfers of one store. Called on the event loop."""

    def __init__(
        self, clock: Clock, *, loads_max: int, saves_max: int, slots: int, idle_s: float, frame_bytes: int
    ) -> None:
        """`slots` bounds how many saves copy at one time; `idle_s` is how long a client may send or read nothing."""
        self.loads = Gate("loads", loads_max)
        self.in_place_loads = Gate("loads", loads_max)
        self.saves = Gate("saves", saves_max)
        self.save_slots = asyncio.Semaphore(slots)
        self._clock = clock
        self._idle_s = idle_s
        self._frame_bytes = frame_bytes

    @property
    def loads_open(self) -> int:
        return self.loads.open_count + self.in_place_loads.open_count

    async def taken(self, sending: Awaitable[None]) -> None:
        """Wait until the client has read a frame. Raises DeadlineExceeded, because a load keeps its blocks in place."""
        try:
            async with self._clock.timeout(self._idle_s):
                await sending
        except TimeoutError as error:
            raise DeadlineExceeded(f"the client read nothing for {self._idle_s:g} s; the load was ended") from error

    def incoming(self, messages: AsyncIterator[T]) -> Incoming[T]:
        """The messages of a save, each within the time that a client may be idle."""
        return Incoming(messages, self._clock, self._idle_s)

    def check_frame(self, payload_bytes: int) -> None:
        """Raises InvalidFrame."""
        if payload_bytes > self._frame_bytes:
            raise InvalidFrame(f"a frame carries {payload_bytes} bytes; at most {self._frame_bytes} are allowed")

    @staticmethod
    def check_save(blocks: int, layers: int) -> None:
        """Raises InvalidRequest if a save has more slices than allowed."""
        if blocks * layers > SAVE_SLICES_MAX:
            raise InvalidRequest(
                f"{blocks} blocks of {layers} layers are {blocks * layers} slices; "
                f"at most {SAVE_SLICES_MAX} are allowed in one save",
                field="keys",
            )


class Incoming(Generic[T]):
    """The messages of one save as they arrive. A client that sends nothing for too long ends it."""

    def __init__(self, messages: AsyncIterator[T], clock: Clock, idle_s: float) -> None:
        self._messages = messages
        self._clock = clock
        self._idle_s = idle_s

    async def next(self) -> T:
        """The next message. Raises IncompleteSave at the end of the stream, which is never a commit."""
        message = await self._next()
        if message is None:
            raise IncompleteSave("the stream ended without a commit")
        return message

    async def ended(self) -> bool:
        """Wait for the end of the stream. False if another message arrives instead."""
        return await self._next() is None

    async def _next(self) -> T | None:
        try:
            async with self._clock.timeout(self._idle_s):
                return await anext(self._messages, None)
        except TimeoutError as error:
            raise IncompleteSave(f"no message arrived for {self._idle_s:g} s") from error


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
