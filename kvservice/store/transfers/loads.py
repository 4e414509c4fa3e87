"""Loads of leased blocks: their bytes in frames, or their places in the arena.

Called on the event loop's thread. A load is admitted, and noted with its request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence, Sized
from contextlib import ExitStack, aclosing
from functools import partial
from typing import TypeVar

from kvservice.blocks import BlockTable
from kvservice.store.caller import Caller
from kvservice.store.leases import Lease, Leases
from kvservice.store.operations.requests import Requests
from kvservice.store.prefix_match import narrowed
from kvservice.store.tasks import LoopBudget
from kvservice.store.transfers.admission import Admission
from kvservice.store.transfers.in_place_reads import InPlaceReads, Located, NotInPlace
from kvservice.store.transfers.leased_bytes import Part
from kvservice.store.transfers.load_times import InPlacePath
from kvservice.store.transfers.precedence import LITTLE_BYTES
from kvservice.store.transfers.reads import PartSender, Reads, Span
from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import Shard

F = TypeVar("F", bound=Sized)

LOADS_REPORTED_MAX = 64
# With the lease of more blocks no places are named: a call for them is short beside the copy.
PLACED_BLOCKS_MAX = 256


class Loads:
    def __init__(
        self,
        blocks: BlockTable,
        leases: Leases,
        requests: Requests,
        admission: Admission,
        reads: Reads,
        in_place_reads: InPlaceReads,
        loop_budget: LoopBudget,
    ) -> None:
        self._blocks = blocks
        self._leases = leases
        self._requests = requests
        self._admission = admission
        self._reads = reads
        self._in_place_reads = in_place_reads
        self._loop_budget = loop_budget

    async def load(
        self,
        caller: Caller,
        lease_id: int,
        shard: Shard | None,
        blocks: Span,
        layers: Span,
        encode: Callable[[Part], F],
        send: Callable[[F], Awaitable[None]],
    ) -> None:
        """Send leased blocks, layer by layer, as frames that `encode` makes; `send` awaits the client.

        Raises InvalidRequest, UnknownClient, LeaseExpired, LeaseNotYours, Overloaded, ChecksumMismatch, StorageFailed;
        DeadlineExceeded if the client reads nothing for too long. Bytes that were sent before are right.
        """
        lease = await self._narrowed(caller, lease_id, shard)
        which, parts = blocks.within(len(lease.rows), "block"), layers.within(lease.shard.layers, "layer")
        with self._requests.load(caller, lease, which, parts) as record, self._admission.loads.entered():
            async with aclosing(self._reads.run(caller, lease, which, parts, encode)) as frames:
                async for frame in frames:
                    await self._admission.taken(send(frame))
                    record.sent_bytes += len(frame)

    def expect(self, caller: Caller, lease_id: int) -> None:
        """The client has a new lease, and probably loads its blocks at once. If they are few, its next call goes before
        the frames of huge loads. No effect if the lease has ended already.
        """
        precedence = self._reads.precedence
        lease = self._find(caller, lease_id) if precedence.has_huge() else None
        if lease is not None and int(self._blocks.size_bytes[lease.held_rows].sum()) <= LITTLE_BYTES:
            precedence.expect_call(lease_id)

    async def to_send(
        self, caller: Caller, lease_id: int, shard: Shard | None, blocks: Span, layers: Span
    ) -> Callable[[PartSender], Awaitable[None]]:
        """A load that threads send: call what this returns, once. It raises as `load`, and what the sender raises.
        It counts as an open load once its client has come for it.

        Raises InvalidRequest, UnknownClient, LeaseExpired, LeaseNotYours, Overloaded.
        """
        lease = await self._narrowed(caller, lease_id, shard)
        which, parts = blocks.within(len(lease.rows), "block"), layers.within(lease.shard.layers, "layer")
        self._admission.loads.check()
        self._reads.precedence.called(lease_id)
        return partial(self._send, caller, lease, which, parts)

    def to_send_all(self, caller: Caller, lease_id: int) -> Callable[[PartSender], Awaitable[None]]:
        """As `to_send`, for all of a lease, and without a wait."""
        lease = self._leases.get(caller, lease_id)
        self._admission.loads.check()
        return partial(self._send, caller, lease, range(len(lease.rows)), range(lease.shard.layers))

    async def _send(self, caller: Caller, lease: Lease, blocks: range, layers: range, sender: PartSender) -> None:
        self._leases.get(caller, lease.lease_id)  # In the step that holds the rows: it may have ended meanwhile.
        with self._requests.load(caller, lease, blocks, layers, "bulk") as record, ExitStack() as slot:
            sender.when_joined(lambda: slot.enter_context(self._admission.loads.entered()))
            try:
                await self._reads.send(caller, lease, blocks, layers, sender)
                await sender.until_taken()
            finally:
                sender.when_joined(None)
                record.sent_bytes = sender.sent_bytes

    async def locate(
        self,
        caller: Caller,
        lease_id: int,
        shard: Shard | None,
        blocks: Span,
        *,
        verify: bool,
        path: InPlacePath = "in_place",
    ) -> AsyncGenerator[Located | NotInPlace | int, None]:
        """The places of leased blocks in the arena, then the number of layers that are ready, until all are.

        The blocks stay in place until this is closed. `path` says who reads them there: the client, or the daemon for
        a copy to the client's GPU. Raises InvalidRequest, UnknownClient, LeaseExpired,
        LeaseNotYours, NotShared, Overloaded, ChecksumMismatch, StorageFailed.
        """
        lease = await self._narrowed(caller, lease_id, shard)
        which, layers = blocks.within(len(lease.rows), "block"), range(lease.shard.layers)
        with (
            self._requests.load(caller, lease, which, layers, path) as record,
            self._admission.in_place_loads.entered(),
        ):
            async with aclosing(self._in_place_reads.run(caller, lease, which, verify=verify, path=path)) as steps:
                async for step in steps:
                    if isinstance(step, NotInPlace):
                        record.ends_as = "not_in_place"
                    elif isinstance(step, int):
                        record.ends_as = "done" if step == len(layers) else ""
                    yield step

    def places_of(self, caller: Caller, lease_id: int) -> tuple[Located, bool] | None:
        """The places of all blocks of a lease that has just begun, and whether all were verified since the start.

        None if there are too many, or they cannot be read in place without a promotion: `locate` then says why. None
        also if the lease has ended.
        """
        lease = self._find(caller, lease_id)
        if lease is None:
            return None
        if len(lease.rows) > PLACED_BLOCKS_MAX:
            return None
        located = self._in_place_reads.at_hand(lease)
        return None if located is None else (located, self._in_place_reads.are_verified(lease.rows))

    def note_in_place(self, caller: Caller, lease_id: int, loads: Sequence[tuple[Span, float]]) -> None:
        """Note loads from those places, which the client reports with its last call for the lease: the blocks and the
        seconds of each, 0 for a view.

        Nothing is noted if the lease has ended. Raises InvalidRequest.
        """
        lease = self._find(caller, lease_id)
        if lease is None:
            return
        self._reads.precedence.called(lease_id)
        if len(loads) > LOADS_REPORTED_MAX:
            raise InvalidRequest(f"{len(loads)} loads are reported; at most {LOADS_REPORTED_MAX}", field="loads")
        for blocks, took_s in loads:
            which = blocks.within(len(lease.rows), "block")
            self._in_place_reads.note_load(lease, which, took_s)
            self._requests.note_load(lease, which, range(lease.shard.layers), "in_place", took_s)

    def _find(self, caller: Caller, lease_id: int) -> Lease | None:
        """The caller's lease; None if it has ended, or is another client's."""
        lease = self._leases.find(lease_id)
        return lease if lease is not None and lease.client.client_id == caller.client else None

    async def _narrowed(self, caller: Caller, lease_id: int, shard: Shard | None) -> Lease:
        """The caller's lease; with a shard, narrowed to that shard.

        Raises UnknownClient, LeaseExpired, LeaseNotYours, InvalidRequest.
        """
        lease = self._leases.get(caller, lease_id)
        if shard is None or shard == lease.shard:
            return lease
        part = await narrowed(self._blocks, lease, shard, self._loop_budget)
        self._leases.get(caller, lease_id)  # The lease may have ended meanwhile.
        return part
