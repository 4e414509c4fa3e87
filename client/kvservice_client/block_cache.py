"""The blocks of one layout and shard: look a prefix up, save what is new."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from kvservice_api import spans
from kvservice_api.errors import DaemonTooOld, IndexFull, InvalidRequest, KVError, NotShared, Overloaded, TierFull
from kvservice_api.keys import KEY_BYTES, BlockChain, ChainBuilder
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_api.v1 import sessions_pb2
from kvservice_client import arguments
from kvservice_client.attach_stream import Attachment
from kvservice_client.buffers import Bytes, Slices, Source, cut, readable
from kvservice_client.channel import BLOCKS, SESSIONS
from kvservice_client.connection import Connection, RequestContext
from kvservice_client.device_memory import DeviceMemory, ExportedPages
from kvservice_client.lease import TRANSFER_BYTES_PER_S_MIN, Lease
from kvservice_client.local_directory import LocalHit
from kvservice_client.pending_lookup import LookupOrder, PendingLookup
from kvservice_client.retry import Deadline
from kvservice_client.save_parts import checked_save, joined, parts_of, slices_of
from kvservice_client.transports.base import Durability, SaveOrder, SaveResult, SaveSet
from kvservice_client.transports.ordered import OrderedTransports
from kvservice_client.transports.reservation import Reservation

# NumPy has no bfloat16 or float8, so integers of the same size represent their elements.
_VIEW_DTYPES = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}

_LARGE_BYTES = 1 << 30  # Assumed for blocks whose number is not known before the answer.

M = TypeVar("M", pb.GetGenerationResponse, pb.BeginGenerationResponse)


class BlockCache:
    """The lookups, loads and saves of one rank. Thread-safe. Made by `Client.open_layout`."""

    def __init__(self, connection: Connection, transports: OrderedTransports, layout: Layout, shard: Shard) -> None:
        self._connection = connection
        self._transports = transports
        self.layout = layout
        self.shard = shard
        self._wanted_shard = None if shard == Shard.whole(layout) else shard.to_proto()  # In lookups: None means whole.
        layers = range(shard.layer_begin, shard.layer_end)
        self._block_bytes = sum(layout.shard_slice_bytes(shard, each, layout.block_tokens) for each in layers)

    def __repr__(self) -> str:
        return f"BlockCache({self.layout.model_id!r}, {self.layout.fingerprint.hex()[:8]}, {self.shard})"

    def ping(self, timeout_s: float | None = None) -> None:
        """Attach, open the layout and map the daemon's memory if needed, and make a call that the daemon must answer.

        The next request then needs none of these steps. Raises DaemonUnavailable or DeadlineExceeded if the daemon is
        away.
        """
        deadline = self._connection.deadline(timeout_s)
        self._connection.retried(lambda: self._connection.session(self.layout, deadline), deadline)
        request = pb.GetCapabilitiesRequest()
        self._connection.channel.call(BLOCKS + "GetCapabilities", request, pb.GetCapabilitiesResponse, deadline)
        self._transports.prepare(deadline)

    def generation(self, timeout_s: float | None = None) -> int:
        """The layout's key generation: a number for the `salt` of keys; 0 if none was ever begun.

        Blocks with keys of another generation are not found. The daemon keeps the number per tenant and layout, over
        restarts, and gives a new one if it has lost it. Raises DaemonTooOld, and as `ping`.
        """
        request = pb.GetGenerationRequest(layout_fingerprint=self.layout.fingerprint)
        return self._ask_generation("GetGeneration", request, pb.GetGenerationResponse, timeout_s).generation

    def begin_generation(self, timeout_s: float | None = None) -> int:
        """Begin a key generation, such as after a change of the weights. The number was never used before.

        It is durable on return. After an error it is not known which generation other clients, and this one after its
        next start, see: use none of the earlier ones until a call succeeds. Raises StorageFailed, DaemonTooOld, and as
        `ping`.
        """
        request = pb.BeginGenerationRequest(layout_fingerprint=self.layout.fingerprint)
        return self._ask_generation("BeginGeneration", request, pb.BeginGenerationResponse, timeout_s).generation

    def contains(self, chain: BlockChain, timeout_s: float | None = None) -> int:
        """How many leading blocks of the chain are stored. No lease: they may be evicted at any time.

        Calls the daemon only if `lookup_local` has no answer.
        """
        if not len(arguments.chain(chain)):
            return 0
        deadline = self._connection.deadline(timeout_s)

        def attempt() -> int:
            local = self._look_up_locally(chain, deadline)
            return self._look_up(chain, 0, deadline)[1].hit_blocks if local is None else local.blocks

        return self._connection.retried(attempt, deadline)

    def lookup_local(self, chain: BlockChain | ChainBuilder, timeout_s: float | None = None) -> LocalHit | None:
        """The chain's stored leading blocks, from the daemon's residency directory in shared memory.

        With a `ChainBuilder`, the answer also says whether a partial block may continue them: only then, or if it has
        blocks, can `lookup` find anything.

        Makes no call once this client is attached, and does not count as a use of the blocks. None if there is no
        certain answer: the daemon is on another host, has no directory, has not filled it yet since its start, or
        blocks are stored as several shards. It does not count partial blocks that only `lookup` of a `ChainBuilder`
        finds. Raises as `contains` if the daemon cannot be reached.
        """
        _checked(chain)
        deadline = self._connection.deadline(timeout_s)
        return self._connection.retried(lambda: self._look_up_locally(chain, deadline), deadline)

    def peek(self, chain: BlockChain | ChainBuilder) -> LocalHit | None:
        """As `lookup_local`, and never waits: makes no call and no attempt to attach on the caller's thread.

        None also if this client is not attached, or has not opened the layout since the daemon's start. That then
        begins in the background, so a later peek can have an answer. An answer does not say that the daemon responds:
        the directory of a process that is stopped stays readable.
        """
        _checked(chain)
        session = self._connection.known_session(self.layout)
        return None if session is None else self._read_directory(chain, session)

    def lookup(
        self,
        chain: BlockChain | ChainBuilder,
        lease_ttl_s: float = 30.0,
        timeout_s: float | None = None,
        *,
        request_id: str = "",
        session_id: str = "",
    ) -> Lease:
        """Lease the stored part of a prefix. A chain longer than the daemon's limit is looked up as far as the limit.

        With a `ChainBuilder` the prefix is all tokens that were added to it. Then the last block of the lease, which
        `hit_blocks` counts too, may be partial: the longest of the newest partial blocks that continue the last whole
        hit with exactly the next tokens. So a conversation finds its history to the last token. An engine that must
        compute at least one token uses one token less of a lease of all its tokens. A block that goes beyond the
        builder's tokens is no hit, though it begins with them: its key depends on all of its tokens.

        With a builder and a `session_id`, the last block of that session is found too if it is not one of the newest.
        `request_id` is the engine's name of the request, at most 200 bytes: `kvctl explain` then shows how much of it
        was reused, and why the rest was not. A chain without blocks, or a builder without tokens, gives an empty lease
        without a call.
        """
        builder = chain if isinstance(chain, ChainBuilder) else None
        whole = _checked(chain)
        deadline = self._connection.deadline(timeout_s)
        ttl_ms = _ttl_ms(lease_ttl_s)
        arguments.request_id(request_id)
        arguments.optional_session_id(session_id)
        if not len(whole) and (builder is None or not builder.token_count):
            return self._lease(whole, Attachment(b"", 0), pb.LookupPrefixResponse(), 0.0)

        def leased(part: BlockChain, *, with_tails: bool = False) -> tuple[Lease, pb.LookupPrefixResponse]:
            asked_at_s = self._connection.clock.now_s()
            session, answer = self._look_up(part, ttl_ms, deadline, request_id, with_tails=with_tails)
            return self._lease(part, session.attachment, answer, asked_at_s), answer

        def attempt() -> Lease:
            lease, answer = leased(whole, with_tails=builder is not None)
            longer = _with_tail(builder, lease.hit_tokens, answer.tails) if builder is not None else None
            if longer is None and builder is not None and session_id:
                longer = _with_tail(builder, lease.hit_tokens, self._tail_of_session(session_id, deadline))
            if longer is None:
                return lease
            try:
                more = leased(longer)[0]
            except Overloaded:  # The client holds as many leases, or leased blocks, as it may.
                return lease
            except KVError:
                self._connection.background.submit(lease.release)
                raise
            unused = lease if more.hit_blocks > lease.hit_blocks else more  # The tail may be gone by now.
            self._connection.background.submit(unused.release)
            return more if unused is lease else lease

        trace = spans.current()
        with spans.span("kvservice.lookup", "client", blocks=len(whole)) as span:
            lease = self._connection.retried(attempt, deadline)
            lease.trace = trace
            if span is not None:
                span.set(hit_blocks=lease.hit_blocks, hit_tokens=lease.hit_tokens)
        return lease

    def begin_lookup(
        self,
        chain: BlockChain | ChainBuilder,
        lease_ttl_s: float = 30.0,
        timeout_s: float | None = None,
        *,
        request_id: str = "",
        session_id: str = "",
        adoptions: int = 0,
        ticket_ttl_s: float = 30.0,
    ) -> PendingLookup:
        """Begin what `lookup` does on a thread of the client, and return at once, also if the daemon does not answer.

        With `adoptions`, a hit is also exported as a ticket, as by ``lease.export(ticket_ttl_s, adoptions)``. At most
        four lookups of a client run at a time; others are queued. `timeout_s`, by default the client's, counts from
        this call, for lookup and export together. A `ChainBuilder` may get more tokens meanwhile. Raises InvalidRequest
        for wrong arguments; `PendingLookup.poll` raises the other errors.
        """
        if not isinstance(chain, ChainBuilder):
            arguments.chain(chain)
        _ttl_ms(lease_ttl_s)
        arguments.request_id(request_id)
        arguments.optional_session_id(session_id)
        adoptions = arguments.whole(adoptions, "adoptions")
        if not arguments.seconds(ticket_ttl_s, "ticket_ttl_s"):
            raise InvalidRequest("ticket_ttl_s is 0; a ticket must last for some time", field="ticket_ttl_s")
        order = LookupOrder(chain, lease_ttl_s, request_id, session_id, adoptions, ticket_ttl_s, spans.current())
        connection = self._connection
        pending = PendingLookup(self, connection.background, order, connection.deadline(timeout_s))
        pending.begin()
        return pending

    def adopt(
        self, ticket: bytes, shard: Shard | None = None, lease_ttl_s: float = 30.0, timeout_s: float | None = None
    ) -> Lease:
        """A lease of this client's own on the blocks of a ticket (`Lease.export`): the same blocks, the same length.

        It is for `shard`, by default this cache's, which must be within the exporter's. Raises TicketForged,
        TicketForeign, TicketExpired, TicketSpent, TicketLayoutMismatch, TicketNotYours; InvalidRequest for another
        shard; Overloaded.
        """
        if not isinstance(ticket, (bytes, bytearray, memoryview)):
            raise InvalidRequest(f"a ticket is bytes, not {type(ticket).__name__}", field="ticket")
        shard = self.shard if shard is None else arguments.instance(shard, Shard, "shard").check(self.layout)
        deadline, ttl_ms = self._connection.deadline(timeout_s), _ttl_ms(lease_ttl_s)
        request = pb.AdoptLeaseRequest(
            ticket=bytes(ticket),
            layout_fingerprint=self.layout.fingerprint,
            shard=shard.to_proto(),
        )

        def attempt() -> Lease:
            asked_at_s = self._connection.clock.now_s()
            attachment, limits = self._connection.session(self.layout, deadline)
            request.client_id = attachment.client_id
            request.lease_ttl_ms = min(ttl_ms, limits.max_lease_ttl_ms)
            request.locate, request.offer_load = self._wanted_with_lease(None, deadline)
            call = self._connection.channel.call  # Not on the bulk port: a second call would use the ticket up.
            adopted = call(BLOCKS + "AdoptLease", request, pb.AdoptLeaseResponse, deadline)
            answer = pb.LookupPrefixResponse(
                hit_blocks=len(adopted.token_counts),
                lease_id=adopted.lease_id,
                lease_ttl_ms=adopted.lease_ttl_ms,
                runs=adopted.runs,
                located=adopted.located if adopted.HasField("located") else None,
                located_verified=adopted.located_verified,
                offered_load=adopted.offered_load if adopted.HasField("offered_load") else None,
            )
            counts = adopted.token_counts
            return Lease(self._connection, self._transports, self.layout, shard, counts, attachment, answer, asked_at_s)

        lease = self._connection.retried(attempt, deadline)
        lease.trace = spans.current()
        return lease

    def save(
        self,
        chain: BlockChain,
        layers: Sequence[Source | Sequence[Source]],
        durability: Durability = Durability.DRAM,
        timeout_s: float | None = None,
    ) -> SaveResult:
        """Store the blocks of a chain. Blocks that are stored already succeed, and their buffers are not read.

        `layers` has one entry per layer: a contiguous buffer of all blocks' slices, or a list with one buffer per
        block. A buffer is flat (the layout's elements, or raw bytes), or an array of the layout's elements of shape
        `[blocks, 2, kv_heads, tokens, dim]`, for one block also `[2, kv_heads, tokens, dim]`; InvalidRequest is
        raised for another element type, shape or size. The buffers must not change until this returns.

        `timeout_s` is for the whole save; by default the client's timeout plus one second per 128 MiB. A save may be
        sent twice if the daemon restarts meanwhile. A chain without blocks stores nothing, and `layers` is not read.
        """
        (result,) = self.save_many([(chain, layers)], durability, timeout_s)
        return result

    def save_many(
        self,
        saves: Sequence[tuple[BlockChain, Sequence[Source | Sequence[Source]]]],
        durability: Durability = Durability.DRAM,
        timeout_s: float | None = None,
    ) -> list[SaveResult]:
        """As `save`, for many chains, in as few calls as the daemon's limits allow: (chain, layers) for each.

        Returns the result of each. A block that two chains have in common is stored once; for the later chain it counts
        as already stored.
        """
        arguments.member(durability, Durability, "durability")
        pairs = [tuple(arguments.sequence(each, "saves")) for each in arguments.sequence(saves, "saves")]
        if any(len(pair) != 2 for pair in pairs):
            raise InvalidRequest("saves must have pairs: a chain, and its layers", field="saves")
        chains = [arguments.chain(chain) for chain, _ in pairs]
        slices = [slices_of(self.layout, self.shard, chain, layers) if len(chain) else [] for chain, layers in pairs]
        if timeout_s is None:
            size_bytes = sum(len(piece) for layers in slices for layer in layers for piece in layer)
            timeout_s = self._connection.timeout_s + size_bytes / TRANSFER_BYTES_PER_S_MIN
        deadline = self._connection.deadline(timeout_s)
        if not any(map(len, chains)):
            return [SaveResult(0, 0, []) for _ in chains]
        limits = self._connection.retried(lambda: self._connection.limits(deadline), deadline)
        results: list[list[SaveResult]] = [[] for _ in chains]  # Of each chain's parts.
        full: KVError | None = None
        for parts in parts_of(chains, self._blocks_max(limits), max(1, limits.max_save_chains)):
            if full is not None:  # Blocks after a block that was refused cannot be used, so they are not sent.
                of_parts = [SaveResult(0, 0, [(block, full) for block in range(len(part))]) for _, part in parts]
            else:
                layers = [
                    [piece for number, part in parts for piece in slices[number][layer][part.start : part.stop]]
                    for layer in range(self.shard.layers)
                ]
                of_parts = self._save(
                    [chains[number][part.start : part.stop] for number, part in parts], layers, durability, deadline
                )
                refused = [result.refused[-1][1] for result in of_parts if result.refused]
                full = next((error for error in refused if isinstance(error, (TierFull, IndexFull))), None)
            for (number, part), result in zip(parts, of_parts, strict=True):
                errors = [(part.start + block, error) for block, error in result.refused]
                results[number].append(replace(result, refused=errors))
        return [joined(of_chain) for of_chain in results]

    def reserve(
        self, saves: Sequence[BlockChain], durability: Durability = Durability.DRAM, timeout_s: float | None = None
    ) -> Reservation:
        """Space in the daemon's shared memory for the blocks of one or more chains, which the caller writes itself.

        It saves a copy: gather the slices straight into `Reservation.slices`. Other clients that save the same blocks
        wait until the reservation has ended, so end it soon. Waits, as a save does, for their saves, and for space; at
        most `timeout_s`, by default the client's.

        Raises NotShared if blocks cannot be written in place (the daemon is on another host, its arena is not
        writable, or it is of a version that takes one chain): then `save_many` them. InvalidRequest for more blocks
        than one save may have; Overloaded if this client holds too many reservations; as `save`.
        """
        arguments.member(durability, Durability, "durability")
        chains = [checked_save(self.layout, each) for each in arguments.sequence(saves, "saves")]
        if not chains or not all(map(len, chains)):
            raise InvalidRequest("saves must have a chain, and each chain a block", field="saves")
        deadline = self._connection.deadline(timeout_s)

        def attempt() -> Reservation:
            session = self._connection.session(self.layout, deadline)
            count, most = sum(map(len, chains)), self._blocks_max(session.limits)
            if count > most:
                raise InvalidRequest(f"saves has {count} blocks; at most {most} may be reserved at once", field="saves")
            if len(chains) > max(1, session.limits.max_save_chains):
                raise NotShared("this daemon reserves the blocks of one chain at a time: save the blocks")
            client_id = session.attachment.client_id
            saved = SaveSet(client_id, chains, Durability(durability), self.layout, self.shard)
            return self._transports.reserve(saved, deadline)

        return self._connection.retried(attempt, deadline)

    def device_memory(self, pages: ExportedPages) -> DeviceMemory:
        """The engine's pages in GPU memory, which the daemon may open to copy to and from them. Makes no call yet."""
        return DeviceMemory(self._connection, self._transports, self.layout, self.shard, pages)

    def _blocks_max(self, limits: pb.GetCapabilitiesResponse) -> int:
        return max(1, min(limits.max_save_blocks, limits.max_save_slices // self.shard.layers))

    def _save(
        self, chains: list[BlockChain], layers: list[list[Bytes]], durability: Durability, deadline: Deadline
    ) -> list[SaveResult]:
        """One save; tried again during a short restart of the daemon."""
        order: SaveOrder | None = None

        def attempt() -> list[SaveResult]:
            nonlocal order
            session = self._connection.session(self.layout, deadline)
            client_id, frame_bytes = session.attachment.client_id, session.limits.max_frame_bytes
            if order is None:
                order = SaveOrder(
                    client_id, chains, Durability(durability), self.layout, self.shard, layers, frame_bytes
                )
            order.client_id = client_id
            return self._transports.save(order, deadline)

        with spans.span("kvservice.save", "client", blocks=sum(map(len, chains))) as span:
            results = self._connection.retried(attempt, deadline)
            if span is not None and order is not None:
                span.set(
                    bytes=order.size_bytes,
                    stored_blocks=sum(each.stored for each in results),
                    refused_blocks=sum(len(each.refused) for each in results),
                )
        return results

    def slice_bytes(self, token_count: int, layer: int | None = None) -> int:
        """The size of one layer of one block in this shard.

        `layer` counts from the shard's first. It may be left out if all layers have one size; InvalidRequest
        is raised if they do not.
        """
        return self._slices_of((token_count,), layer).size_bytes

    def layer_arrays(
        self, data: Source, token_counts: Sequence[int], layer: int | None = None
    ) -> list[tuple[NDArray[np.generic], NDArray[np.generic]]]:
        """Views of one layer's bytes: for each block, K and V as `[head, token, dim]`.

        The element type is that of the layer's group; bfloat16 shows as int16, float8 as uint8. `layer` counts from
        the shard's first, as `LoadedLayer.index`. It may be left out if all layers have one geometry;
        InvalidRequest is raised if they do not.
        """
        slices = self._slices_of(token_counts, layer)
        group, heads = slices.group, slices.heads
        sizes = [group.slice_bytes(heads, count) for count in token_counts]
        dtype = np.dtype(_VIEW_DTYPES.get(group.dtype, group.dtype))
        arrays = []
        for piece, tokens in zip(cut(readable(data, "data", slices), sizes), token_counts, strict=True):
            elements = piece.view(dtype)
            k_end = heads * tokens * group.k_head_dim
            keys = elements[:k_end].reshape(heads, tokens, group.k_head_dim)
            values = elements[k_end:].reshape(heads, tokens, group.v_head_dim)
            arrays.append((keys, values))
        return arrays

    def _slices_of(self, token_counts: Sequence[int], layer: int | None) -> Slices:
        for count in arguments.sequence(token_counts, "token_counts"):
            arguments.whole(count, "token_counts", 1)
        if layer is None:
            of_layers = [Slices.of(self.layout, self.shard, each, token_counts) for each in range(self.shard.layers)]
            first = of_layers[0]
            if any((each.group.geometry, each.heads) != (first.group.geometry, first.heads) for each in of_layers):
                raise InvalidRequest("the layers of this layout differ: name the layer", field="layer")
            return first
        layer = arguments.whole(layer, "layer", 0, self.shard.layers - 1)
        return Slices.of(self.layout, self.shard, layer, token_counts)

    def _ask_generation(self, method: str, request: Message, answer: type[M], timeout_s: float | None) -> M:
        deadline = self._connection.deadline(timeout_s)

        def attempt() -> M:
            session = self._connection.session(self.layout, deadline)
            if not session.limits.keeps_generations:
                address, version = self._connection.channel.address, session.limits.version
                raise DaemonTooOld(f"the daemon at {address}, version {version}, keeps no key generations: upgrade it")
            return self._connection.channel.call(BLOCKS + method, request, answer, deadline)

        return self._connection.retried(attempt, deadline)

    def _look_up_locally(self, chain: BlockChain | ChainBuilder, deadline: Deadline) -> LocalHit | None:
        return self._read_directory(chain, self._connection.session(self.layout, deadline))

    def _read_directory(self, chain: BlockChain | ChainBuilder, session: RequestContext) -> LocalHit | None:
        attachment, limits = session
        whole = _checked(chain)
        hit = self._connection.local_directory.look_up(
            limits.residency_directory,
            limits.store_id,
            attachment.boot_epoch,
            whole.packed_keys,
            self.layout.fingerprint,
            self.shard,
            b"" if whole is chain else whole.parent,
        )
        if isinstance(chain, ChainBuilder) and hit and hit.blocks * self.layout.block_tokens == chain.token_count:
            return hit._replace(may_have_tail=False)  # No token is left that it could have.
        return hit

    def _lease(
        self, chain: BlockChain, attachment: Attachment, answer: pb.LookupPrefixResponse, asked_at_s: float
    ) -> Lease:
        counts = chain.token_counts
        return Lease(
            self._connection, self._transports, self.layout, self.shard, counts, attachment, answer, asked_at_s
        )

    def _look_up(
        self,
        chain: BlockChain,
        lease_ttl_ms: int,
        deadline: Deadline,
        request_id: str = "",
        *,
        with_tails: bool = False,
    ) -> tuple[RequestContext, pb.LookupPrefixResponse]:
        session = self._connection.session(self.layout, deadline)
        with_tails = with_tails and session.limits.max_tails > 0
        if not len(chain) and not with_tails:
            return session, pb.LookupPrefixResponse()
        request = arguments.message(
            pb.LookupPrefixRequest,
            client_id=session.attachment.client_id,
            layout_fingerprint=self.layout.fingerprint,
            shard=self._wanted_shard,
            keys=chain.packed_keys[: session.limits.max_keys * KEY_BYTES],
            lease_ttl_ms=min(lease_ttl_ms, session.limits.max_lease_ttl_ms),
            request_id=request_id,
            parent_key=chain.parent if with_tails else b"",
        )
        if lease_ttl_ms:
            request.locate, request.offer_load = self._wanted_with_lease(chain, deadline)
        return session, self._transports.call("LookupPrefix", request, pb.LookupPrefixResponse, deadline)

    def _wanted_with_lease(self, chain: BlockChain | None, deadline: Deadline) -> tuple[bool, int]:
        """Whether an answer should have the places of its blocks, and for how many connections of the bulk port it
        should offer a load. Neither in a trace, which shows the daemon's part of the load. The chain is None if its
        length is not known.
        """
        if spans.current() is not None:
            return False, 0
        size_bytes = _LARGE_BYTES if chain is None else self._block_bytes * len(chain)
        return self._transports.read_in_place, self._transports.offered_connections(size_bytes, deadline)

    def _tail_of_session(self, session_id: str, deadline: Deadline) -> list[pb.Tail]:
        """The last block of a session, if it is partial. Nothing if the session cannot be read."""
        request = sessions_pb2.GetSessionRequest(session_id=session_id, layout_fingerprint=self.layout.fingerprint)
        try:
            answer = self._connection.channel.call(
                SESSIONS + "GetSession", request, sessions_pb2.GetSessionResponse, deadline
            )
        except KVError:
            return []
        session = answer.session
        if not session.tail_tokens:
            return []
        return [pb.Tail(key=session.slices.keys[-KEY_BYTES:], token_count=session.tail_tokens)]


def _checked(chain: BlockChain | ChainBuilder) -> BlockChain:
    """The chain of whole blocks. Raises InvalidRequest."""
    whole: BlockChain = arguments.chain(chain.chain if isinstance(chain, ChainBuilder) else chain)
    return whole


def _with_tail(builder: ChainBuilder, hit_tokens: int, tails: Iterable[pb.Tail]) -> BlockChain | None:
    """The chain of the hits and the longest of these tails that the next tokens of the builder make up."""
    for tail in sorted(tails, key=lambda tail: -tail.token_count):
        if hit_tokens + tail.token_count <= builder.token_count:
            chain = builder.prefix(hit_tokens + tail.token_count)
            if chain.keys[-1] == tail.key:
                return chain
    return None


def _ttl_ms(lease_ttl_s: float) -> int:
    return max(1, round(arguments.seconds(lease_ttl_s, "lease_ttl_s") * 1e3))
