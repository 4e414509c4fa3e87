"""Saves: their headers are checked here. Then their bytes arrive as frames, or are written in place, by clients or by
the daemon.

Called on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.index.block_index import BlockIndex
from kvservice.store.caller import Caller
from kvservice.store.leases import Client, Leases
from kvservice.store.miss_reasons import MissReasons, Reason
from kvservice.store.operations.drain import Drain
from kvservice.store.operations.trace import TraceRecorder
from kvservice.store.transfers.admission import Admission, Incoming
from kvservice.store.transfers.filled_uploads import FilledUpload
from kvservice.store.transfers.in_place_uploads import InPlaceUploads
from kvservice.store.transfers.save_request import Place, SaveOutcome, SavePath, SaveRequest
from kvservice.store.transfers.upload import Upload, Uploads
from kvservice_api.errors import Draining, InvalidRequest, KVError, Overloaded
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Shard

T = TypeVar("T")


class SaveChain(NamedTuple):
    """Consecutive blocks of one chain, all full except the last (`last_block_tokens` 0: full too)."""

    parent_key: bytes
    keys: Sequence[bytes]
    last_block_tokens: int


class SaveHeader(NamedTuple):
    """The blocks of a save: those of its chains, one after the other. Without a shard, whole blocks."""

    fingerprint: bytes
    shard: Shard | None
    chains: Sequence[SaveChain]

    @property
    def keys(self) -> list[bytes]:
        return [key for chain in self.chains for key in chain.keys]


class Saves:
    def __init__(
        self,
        index: BlockIndex,
        leases: Leases,
        admission: Admission,
        drain: Drain,
        uploads: Uploads,
        in_place_uploads: InPlaceUploads,
        trace: TraceRecorder,
        history: MissReasons,
    ) -> None:
        self._index = index
        self._leases = leases
        self._admission = admission
        self._drain = drain
        self._uploads = uploads
        self._in_place_uploads = in_place_uploads
        self._trace = trace
        self._history = history

    # As a stream of frames

    def incoming(self, caller: Caller, messages: AsyncIterator[T]) -> Incoming[T]:
        """The messages of a save, each within the time that a client may be idle."""
        return self._admission.incoming(messages)

    def save(self, caller: Caller, header: SaveHeader) -> Upload:
        """One save, for use with ``async with``: entering claims the blocks and waits for space; leaving without a
        commit abandons it.

        Raises Overloaded, Draining, UnknownLayout, UnknownClient, InvalidRequest; entering it IncompleteSave.
        """
        return self._uploads.begin(caller, *self._admitted(caller, header))

    def fill(self, caller: Caller, header: SaveHeader, path: SavePath) -> FilledUpload:
        """One save whose bytes the daemon's own threads write, for use with ``async with``. Raises as `save`."""
        return FilledUpload(self._uploads, caller, *self._admitted(caller, header), path)

    def _admitted(self, caller: Caller, header: SaveHeader) -> tuple[Client, SaveRequest]:
        try:
            self._admission.saves.check()
        except Overloaded as error:
            raise self._refused(header.keys, error) from None
        return self._checked(caller, header)

    # In place

    async def reserve(
        self, caller: Caller, reservation_id: int, header: SaveHeader, *, on_ssd: bool
    ) -> tuple[list[Place], dict[int, KVError]]:
        """Claim blocks that the client writes into the arena itself: their places, and why others were refused.

        Raises as `save`; NotShared, NoWriterLock.
        """
        client, request = self._checked(caller, header)
        return await self._in_place_uploads.reserve(caller, reservation_id, client, request, on_ssd=on_ssd)

    async def commit(self, caller: Caller, reservation_id: int, checksums: NDArray[np.uint64]) -> SaveOutcome:
        """Make blocks visible that were written in place. `checksums`: u64, one per slice of the reserved blocks, in
        order.

        Raises UnknownClient, ReservationEnded, ReservationNotYours, InvalidRequest.
        """
        return await self._in_place_uploads.commit(caller, reservation_id, self._leases.client(caller), checksums)

    def abandon(self, caller: Caller, reservation_id: int) -> None:
        """The client writes no more, and abandons the blocks. Raises UnknownClient, ReservationNotYours."""
        self._in_place_uploads.abandon(caller, reservation_id, self._leases.client(caller))

    # Headers

    def _checked(self, caller: Caller, header: SaveHeader) -> tuple[Client, SaveRequest]:
        """The client, and the blocks of its save. Raises Draining, UnknownLayout, UnknownClient, InvalidRequest."""
        fingerprint, shard, chains = header
        keys = header.keys
        if self._drain.is_draining:
            raise self._refused(keys, Draining(f"the daemon is {self._drain.state_name} and accepts no new saves"))
        layout_id, layout = self._index.find_layout(fingerprint)
        client = self._leases.client(caller)
        part = Shard.whole(layout) if shard is None else shard.check(layout)
        self._admission.check_save(len(keys), part.layers)
        parents: list[bytes] = []
        counts: list[int] = []
        for chain in chains:
            if len(chain.parent_key) != KEY_BYTES:
                size = len(chain.parent_key)
                raise InvalidRequest(f"parent_key has {size} bytes, not {KEY_BYTES}", field="parent_key")
            if len(set(chain.keys)) != len(chain.keys):
                raise InvalidRequest("a key appears twice in one save", field="keys")
            self._trace.saved(caller, layout_id, *chain)
            parents += [chain.parent_key, *chain.keys[:-1]]
            full = len(chain.keys) - 1
            counts += [*[layout.block_tokens] * full, chain.last_block_tokens or layout.block_tokens]
        return client, SaveRequest(layout_id, layout, part, parents, keys, counts)

    def _refused(self, keys: Sequence[bytes], error: KVError) -> KVError:
        """The error with which a save of these blocks is refused; the history notes it."""
        self._history.note_keys(keys, Reason.REFUSED, error.reason)
        return error
