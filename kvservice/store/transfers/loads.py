"""Loads of leased blocks: their bytes in frames, or their places in the arena.

Called on the event loop's thread. A load is admitted, and noted with its request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sized
from contextlib import aclosing
from typing import TypeVar

from kvservice.blocks import BlockTable
from kvservice.store.caller import Caller
from kvservice.store.leases import Lease, Leases
from kvservice.store.operations.requests import Requests
from kvservice.store.prefix_match import narrowed
from kvservice.store.tasks import LoopBudget
from kvservice.store.transfers.admission import Admission
from kvservice.store.transfers.in_place_reads import InPlaceReads, Located, NotInPlace
from kvservice.store.transfers.reads import Part, Reads, Span
from kvservice_api.layout import Shard

F = TypeVar("F", bound=Sized)


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
        """Send leased blocks, layer by layer, as frames that `encode` makes on a thread; `send` awaits the client.

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

    async def locate(
        self, caller: Caller, lease_id: int, shard: Shard | None, blocks: Span, *, verify: bool
    ) -> AsyncGenerator[Located | NotInPlace | int, None]:
        """The places of leased blocks in the arena, then the number of layers that are ready, until all are.

        The blocks stay in place until this is closed. Raises InvalidRequest, UnknownClient, LeaseExpired,
        LeaseNotYours, NotShared, Overloaded, ChecksumMismatch, StorageFailed.
        """
        lease = await self._narrowed(caller, lease_id, shard)
        which, layers = blocks.within(len(lease.rows), "block"), range(lease.shard.layers)
        with (
            self._requests.load(caller, lease, which, layers, in_place=True) as record,
            self._admission.in_place_loads.entered(),
        ):
            async with aclosing(self._in_place_reads.run(caller, lease, which, verify=verify)) as steps:
                async for step in steps:
                    if isinstance(step, NotInPlace):
                        record.ends_as = "not_in_place"
                    elif isinstance(step, int):
                        record.ends_as = "done" if step == len(layers) else ""
                    yield step

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
