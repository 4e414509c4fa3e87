"""The load path: leased blocks are sent layer by layer, as frames or by threads. Each slice is verified before any byte
of it is sent, or by a client of the bulk port, which gets the checksums.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.leases import Lease
from kvservice.store.mover.promoter import Promoter
from kvservice.store.tasks import LoopBudget
from kvservice.store.transfers.leased_bytes import (
    LayerSlice,
    LeasedBytes,
    Part,
    ReadsShared,
    ScratchBudget,
    listed,
)
from kvservice.store.transfers.load_times import LoadTimes
from kvservice.store.transfers.precedence import LoadTurn, Precedence
from kvservice.tiers.dram import DramTier
from kvservice.tiers.files import ended, on_thread
from kvservice_api.errors import InvalidRequest, KVError
from kvservice_api.image import checksum

T = TypeVar("T")

_AHEAD_BYTES = 32 << 20  # Queued for threads that send: what they send while the event loop does something else.
# What one frame may need to be verified and joined on the event loop, which takes a millisecond; else on a thread.
_ON_LOOP_BYTES = 4 << 20
_ON_LOOP_PIECES = 512


@dataclass(frozen=True, slots=True)
class Span:
    """`count` items from `first` on; a count of 0 means all later ones."""

    first: int = 0
    count: int = 0

    def within(self, end: int, what: str) -> range:
        """As a range of a lease's `end` items. Raises InvalidRequest if it is empty or beyond the end."""
        last = self.first + self.count if self.count else end
        if not self.first < last <= end:
            raise InvalidRequest(f"{what}s {self.first}..{last} are not in the lease's {end}", field=f"first_{what}")
        return range(self.first, last)


class DamagedSlice(Exception):
    """A thread has found that the bytes of a slice are not those that were stored."""

    def __init__(self, found: LayerSlice) -> None:
        super().__init__()
        self.found = found


class PartSender(Protocol):
    """Threads that send the parts of a load, verified where the client cannot do it. Called on the event loop."""

    sent_bytes: int
    unit_bytes: int  # About as much is to be in one part.

    def when_joined(self, call: Callable[[], None] | None) -> None:
        """Call it once the client has come for the load; a KVError that it raises ends the load. None: call nothing."""

    def put(self, parts: Sequence[Part], *, is_last: bool) -> None:
        """Queue whole slices, in this order; `is_last` says that nothing follows."""

    async def until_sent(self, size_bytes: int) -> None:
        """Wait until so many of the queued bytes were sent. Raises DamagedSlice, and KVErrors if the client fails."""

    async def until_taken(self) -> None:
        """Wait until the end was sent, after all queued bytes. Raises DeadlineExceeded if the client does not read."""

    async def stop(self) -> None:
        """On return no thread reads a part any more; also if the awaiting task is cancelled."""


class Reads:
    """All running loads. `slots` bounds how many large frames are joined at a time, over all clients."""

    def __init__(
        self,
        lifecycle: BlockLifecycle,
        dram: DramTier,
        promoter: Promoter | None,
        clock: Clock,
        counters: Counters,
        executor: Executor,
        loop_budget: LoopBudget,
        *,
        slots: int,
        frame_bytes: int,
    ) -> None:
        self.shared = ReadsShared(lifecycle, dram, promoter, counters, executor, loop_budget, ScratchBudget(clock))
        self._clock = clock
        self._slots = asyncio.Semaphore(slots)
        self._frame_bytes = frame_bytes
        self.precedence = Precedence(clock)

    async def run(
        self, caller: Caller, lease: Lease, blocks: range, layers: range, encode: Callable[[Part], T]
    ) -> AsyncGenerator[T, None]:
        """Every frame of a load, in order. `encode` is called after the frame's slices are verified; for large ones, on
        a thread.

        Raises ChecksumMismatch or StorageFailed, with the block's position in the lease as the detail `block`; frames
        that were yielded before are right.
        """
        read, times = self._begin(lease, blocks, "stream")
        turn = self.precedence.enter(lease.lease_id)
        following: asyncio.Future[list[Part]] | None = None  # The next layer is read while this one is sent.
        try:
            await read.open()
            for layer in layers:
                if following is None:
                    times.layer_begins(layer)
                left_bytes = read.layer_bytes(layer)
                async with aclosing(self._parts(read, layer, following, times)) as parts:
                    async for part in parts:
                        left_bytes -= _size_bytes([part])
                        if not left_bytes:
                            times.layers_ready(layer + 1)
                        frame = await self._frame(read, turn, part, encode)
                        if not left_bytes:
                            times.first_layer()
                            if layer + 1 < layers.stop:
                                times.layer_begins(layer + 1)
                                following = asyncio.ensure_future(listed(read.parts(layer + 1, self._frame_bytes)))
                        yield frame
                assert not left_bytes, "a layer has another size than its layout says"
            self.shared.counters.load_blocks += len(blocks)
            self.shared.counters.load_tokens += self._tokens(lease, blocks)
            times.ended()
        except KVError as error:
            self.shared.counters.loads_failed += 1
            raise lease.placed(error, self.shared.lifecycle.blocks) from error
        finally:
            turn.leave()
            try:
                if following is not None:
                    following.cancel()
                    await ended(following)  # It may be reading into memory that is released below.
                    if not following.cancelled():
                        following.exception()  # Another error was raised before it.
            finally:
                await self._end(read)

    async def _parts(
        self, read: LeasedBytes, layer: int, read_before: asyncio.Future[list[Part]] | None, times: LoadTimes
    ) -> AsyncGenerator[Part, None]:
        """A layer's parts: those of a first layer from a slower tier as they come, because it is waited for."""
        if read_before is None and not read.is_in_dram:
            async with aclosing(read.parts(layer, self._frame_bytes)) as parts:
                async for part in parts:
                    yield part
            return
        found = await (read_before or listed(read.parts(layer, self._frame_bytes)))
        times.layers_ready(layer + 1)  # What follows waits for the client.
        for part in found:
            yield part

    async def _frame(self, read: LeasedBytes, turn: LoadTurn, part: Part, encode: Callable[[Part], T]) -> T:
        """Verify the slices that begin in this part, then encode it.

        On the event loop, one frame of each load in turn: a thread would cost as much again, because each of its calls
        that releases the interpreter's lock makes it wait for the event loop.
        """

        def work() -> T | LayerSlice:
            for found in part.unverified:
                if checksum(found.data) != found.expected:
                    return found
            return encode(part)

        payload_bytes = sum(map(len, part.runs))
        await turn.take(payload_bytes)
        read_bytes = payload_bytes + sum(len(found.data) for found in part.unverified)
        if read_bytes <= _ON_LOOP_BYTES and len(part.runs) + len(part.unverified) <= _ON_LOOP_PIECES:
            await self.shared.loop_budget.slot()
            result = work()
        else:
            async with self._slots:
                result = await on_thread(work, self.shared.executor)
        if isinstance(result, LayerSlice):
            raise await read.dropped(result)
        self.shared.counters.load_bytes += payload_bytes
        return result

    async def send(self, caller: Caller, lease: Lease, blocks: range, layers: range, sender: PartSender) -> None:
        """All of a load, by threads. Parts without checksums for the client are verified right before they are sent.
        Raises as `run`; and what the sender raises.
        """
        read, times = self._begin(lease, blocks, "bulk")
        counters = self.shared.counters
        first_layer: asyncio.Future[None] | None = None
        try:
            await read.open()
            put_bytes, layer = 0, layers.start
            while layer < layers.stop:
                times.layer_begins(layer)
                # The first layer alone, because it is waited for. Later ones wait for no more than was sent before.
                if put_bytes or await read.are_at_hand():
                    units, layer = await read.units(range(layer, layers.stop), put_bytes, sender.unit_bytes)
                    units_bytes = _size_bytes(units)
                    sender.put(units, is_last=layer == layers.stop)
                else:
                    units_bytes = await self._send_first(read, layer, sender)
                    layer += 1
                times.layers_ready(layer)
                put_bytes += units_bytes
                if first_layer is None:
                    first_layer = asyncio.ensure_future(sender.until_sent(put_bytes))
                    first_layer.add_done_callback(times.first_layer_sent)
                # Of blocks in scratch memory, only this layer may be there while the next one is read.
                ahead_bytes = units_bytes if read.scratch_bytes else max(_AHEAD_BYTES, units_bytes)
                if put_bytes - sender.sent_bytes > ahead_bytes:  # Not for each layer: a wait costs as much as 100 KiB.
                    await sender.until_sent(put_bytes - ahead_bytes // (1 if read.scratch_bytes else 2))
            await sender.until_sent(put_bytes)
            counters.bulk_bytes += put_bytes
            counters.bulk_blocks += len(blocks)
            counters.bulk_tokens += self._tokens(lease, blocks)
            times.ended()
        except KVError as error:
            counters.loads_failed += 1
            raise lease.placed(error, self.shared.lifecycle.blocks) from error
        except DamagedSlice as error:
            counters.loads_failed += 1
            raise lease.placed(await read.dropped(error.found), self.shared.lifecycle.blocks) from error
        finally:  # Each step also if the one before was cancelled.
            try:
                await sender.stop()
            finally:
                if first_layer is not None:
                    first_layer.cancel()
                    await ended(first_layer)
                await self._end(read)

    async def _send_first(self, read: LeasedBytes, layer: int, sender: PartSender) -> int:
        """A first layer of which slices are still read: each part is sent while later ones come. Returns its size."""
        size_bytes = 0
        async with aclosing(read.arriving_units(layer)) as units:
            async for unit in units:
                size_bytes += _size_bytes([unit])
                sender.put([unit], is_last=False)
        return size_bytes

    def _begin(self, lease: Lease, blocks: range, path: Literal["stream", "bulk"]) -> tuple[LeasedBytes, LoadTimes]:
        """The rows are held until `_end`."""
        shared = self.shared
        read, rows = LeasedBytes(shared, lease, blocks), shared.lifecycle.blocks
        times = LoadTimes(rows, lease, blocks, read.rows, self._clock, shared.counters, path)
        shared.lifecycle.hold(read.rows)
        return read, times

    async def _end(self, read: LeasedBytes) -> None:
        try:
            await read.close()
        finally:
            self.shared.lifecycle.unhold(read.rows)

    def _tokens(self, lease: Lease, blocks: range) -> int:
        return int(self.shared.lifecycle.blocks.token_count[lease.rows[blocks.start : blocks.stop]].sum())


def _size_bytes(units: Sequence[Part]) -> int:
    return sum(len(run) for unit in units for run in unit.runs)
