"""A client without the library: raw stubs, raw bytes, and requests that the library never sends."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvservice_api.errors import KVError
from kvservice_api.image import checksum
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_api.status import DOMAIN
from kvservice_api.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    blocks_pb2,
    blocks_pb2_grpc,
    devices_pb2_grpc,
    hints_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    types_pb2,
)
from tests.daemon import until
from tests.integration.known_blocks import SMALL, layers_of, new_chain

_SAVE = "/kvservice_api.v1.BlockService/SaveBlocks"
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # A connection of its own, as another process would have.
    ("grpc.max_receive_message_length", -1),
)

# The state that must not change if a request is refused.
_STATE = ("evicted_dram_blocks evicted_ssd_blocks lost_unwritten_blocks discarded_blocks quarantined_blocks "
          "save_blocks_stored save_bytes storage_errors").split()  # fmt: skip


@contextmanager
def refused(kind: type[KVError], message: str, **details: str) -> Iterator[None]:
    """The call inside ends with this error's code and reason, these details, and a message that `message` matches."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    call: Any = caught.value
    status = rpc_status.from_call(call)
    assert status is not None, f"no details, only {call.code()}: {call.details()}"
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (call.code(), info.reason, info.domain) == (grpc.StatusCode[kind.code.name], kind.reason, DOMAIN)
    assert re.search(message, status.message), status.message
    assert details.items() <= dict(info.metadata).items()


@contextmanager
def unharmed(address: str) -> Iterator[BlockChain]:
    """Blocks in both tiers. On leaving, all of them are still stored, and no other space is in use."""
    with Wire(address) as wire:
        wire.attach("watcher")
        wire.open_layout(SMALL)
        chain = new_chain(SMALL, 3)
        assert wire.save(Upload.of(wire, SMALL, chain, types_pb2.DURABILITY_SSD).messages()).stored == 3
        before = wire.state()
        yield chain
        with suppress(AssertionError):
            until(lambda: wire.state() == before)
        assert wire.state() == before
        assert wire.has(SMALL, chain)


class Wire:
    """One connection. A context manager: leaving it ends the attachment."""

    bulk_tls: ssl.SSLContext | None = None  # For connections to the bulk port; None if they are plain.

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.called: list[str] = []  # Full names of the RPCs, in order.
        if credentials is None:
            channel = grpc.insecure_channel(address, _OPTIONS)
        else:
            channel = grpc.secure_channel(address, credentials, _OPTIONS)
        self.channel = grpc.intercept_channel(channel, _Recorder(self.called))
        self.blocks = blocks_pb2_grpc.BlockServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.hints = hints_pb2_grpc.HintServiceStub(self.channel)
        self.devices = devices_pb2_grpc.DeviceServiceStub(self.channel)
        self._save = self.channel.stream_unary(_SAVE, None, blocks_pb2.SaveBlocksResponse.FromString)
        self._leaving = threading.Event()
        self._life_lines: list[Any] = []
        self.client_id = b""
        self.leases: list[int] = []  # Of lookups, until `release`.

    def attach(self, name: str = "by hand") -> blocks_pb2.AttachResponse:
        """Open the Attach stream, and keep it open."""

        def requests() -> Iterator[blocks_pb2.AttachRequest]:
            yield blocks_pb2.AttachRequest(client_name=name)
            self._leaving.wait()

        self._life_lines.append(self.blocks.Attach(requests()))
        answer: blocks_pb2.AttachResponse = next(self._life_lines[-1])
        self.client_id = answer.client_id
        return answer

    def capabilities(self) -> blocks_pb2.GetCapabilitiesResponse:
        answer: blocks_pb2.GetCapabilitiesResponse = self.blocks.GetCapabilities(blocks_pb2.GetCapabilitiesRequest())
        return answer

    def open_layout(self, layout: Layout) -> blocks_pb2.OpenLayoutResponse:
        request = blocks_pb2.OpenLayoutRequest(layout=layout.to_proto(), fingerprint=layout.fingerprint)
        answer: blocks_pb2.OpenLayoutResponse = self.blocks.OpenLayout(request)
        return answer

    def lookup(
        self, layout: Layout, chain: BlockChain, ttl_ms: int = 30_000, offer_load: int = 0
    ) -> blocks_pb2.LookupPrefixResponse:
        request = blocks_pb2.LookupPrefixRequest(
            client_id=self.client_id,
            layout_fingerprint=layout.fingerprint,
            keys=chain.packed_keys,
            lease_ttl_ms=ttl_ms,
            offer_load=offer_load,
        )
        answer: blocks_pb2.LookupPrefixResponse = self.blocks.LookupPrefix(request)
        self.leases.append(answer.lease_id)
        return answer

    def load(self, lease_id: int, **part: Any) -> list[blocks_pb2.LoadBlocksResponse]:
        """The frames of a load."""
        request = blocks_pb2.LoadBlocksRequest(client_id=self.client_id, lease_id=lease_id, **part)
        return list(self.blocks.LoadBlocks(request))

    def save(self, messages: Iterable[bytes], timeout_s: float | None = 30.0) -> blocks_pb2.SaveBlocksResponse:
        """A save whose messages are these bytes."""
        answer: blocks_pb2.SaveBlocksResponse = self._save(iter(messages), timeout=timeout_s)
        return answer

    def begin_save(self, feed: Feed, timeout_s: float = 30.0) -> grpc.Future[blocks_pb2.SaveBlocksResponse]:
        """A save whose messages the feed provides."""
        future: grpc.Future[blocks_pb2.SaveBlocksResponse] = self._save.future(feed, timeout=timeout_s)
        return future

    def renew(self, lease_id: int, ttl_ms: int = 30_000) -> blocks_pb2.RenewLeaseResponse:
        request = blocks_pb2.RenewLeaseRequest(client_id=self.client_id, lease_id=lease_id, ttl_ms=ttl_ms)
        answer: blocks_pb2.RenewLeaseResponse = self.blocks.RenewLease(request)
        return answer

    def release(self, lease_id: int) -> None:
        self.blocks.ReleaseLease(blocks_pb2.ReleaseLeaseRequest(client_id=self.client_id, lease_id=lease_id))

    def append(
        self, session_id: str, layout: Layout, chain: BlockChain, revision: int = 0, **more: Any
    ) -> sessions_pb2.Session:
        request = sessions_pb2.AppendTurnRequest(
            session_id=session_id,
            layout_fingerprint=layout.fingerprint,
            expected_revision=revision,
            parent_key=chain.parent,
            keys=chain.packed_keys,
            last_block_tokens=chain.token_counts[-1],
            **more,
        )
        session: sessions_pb2.Session = self.sessions.AppendTurn(request).session
        return session

    def truncate(self, session_id: str, layout: Layout, revision: int, *keep: tuple[int, int]) -> sessions_pb2.Session:
        request = sessions_pb2.TruncateSessionRequest(
            session_id=session_id,
            layout_fingerprint=layout.fingerprint,
            expected_revision=revision,
            keep=[sessions_pb2.TokenRange(first=first, count=count) for first, count in keep],
        )
        session: sessions_pb2.Session = self.sessions.TruncateSession(request).session
        return session

    def get_session(self, session_id: str, layout: Layout) -> sessions_pb2.GetSessionResponse:
        request = sessions_pb2.GetSessionRequest(session_id=session_id, layout_fingerprint=layout.fingerprint)
        answer: sessions_pb2.GetSessionResponse = self.sessions.GetSession(request)
        return answer

    def status(self) -> admin_pb2.StatusResponse:
        answer: admin_pb2.StatusResponse = self.admin.Status(admin_pb2.StatusRequest())
        return answer

    def state(self) -> dict[str, float]:
        """The daemon's contents and losses, by name."""
        status = self.status()
        return {
            "layouts": status.layouts,
            "blocks": status.blocks,
            "blocks in DRAM": status.dram.blocks,
            "blocks on SSD": status.ssd.blocks,
            "DRAM bytes": status.dram.used_bytes,
            "SSD bytes": status.ssd.used_bytes,
            "uploads": status.uploads,
            "leases": status.leases,
            "clients": status.clients,
            **{name: status.counters[name] for name in _STATE},
        }

    def has(self, layout: Layout, chain: BlockChain) -> bool:
        """The whole chain is stored, and its bytes are right."""
        hit = self.lookup(layout, chain)
        if hit.hit_blocks < len(chain):
            return False
        frames = self.load(hit.lease_id)
        self.release(hit.lease_id)
        loaded = [b"".join(frame.payload for frame in frames if frame.layer == layer) for layer in range(layout.layers)]
        return loaded == [np.concatenate(slices).tobytes() for slices in layers_of(layout, chain)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._leaving.set()
        self.channel.close()


class Feed(Iterator[bytes]):
    """The messages of a stream, one by one as a test sends them."""

    def __init__(self, *messages: bytes) -> None:
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self.send(*messages)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._queue.put(message)

    def end(self) -> None:
        self._queue.put(None)

    def __next__(self) -> bytes:
        if (message := self._queue.get()) is None:
            raise StopIteration
        return message


@dataclass
class Upload:
    """The messages of one save of known blocks, to be changed before they are sent."""

    header: blocks_pb2.SaveHeader
    frames: list[blocks_pb2.SaveBlocksRequest]  # One per slice, layer by layer.
    commit: blocks_pb2.SaveCommit

    @classmethod
    def of(
        cls,
        wire: Wire,
        layout: Layout,
        chain: BlockChain,
        durability: types_pb2.Durability = types_pb2.DURABILITY_UNSPECIFIED,
    ) -> Self:
        slices = layers_of(layout, chain)
        header = blocks_pb2.SaveHeader(
            client_id=wire.client_id,
            layout_fingerprint=layout.fingerprint,
            shard=Shard.whole(layout).to_proto(),
            parent_key=chain.parent,
            keys=chain.packed_keys,
            last_block_tokens=chain.token_counts[-1] if len(chain) else 0,
            durability=durability,
        )
        frames = [
            blocks_pb2.SaveBlocksRequest(layer=layer, first_block=block, payload=data.tobytes())
            for layer, blocks in enumerate(slices)
            for block, data in enumerate(blocks)
        ]
        sums = [[checksum(layer[block].data) for layer in slices] for block in range(len(chain))]
        return cls(header, frames, blocks_pb2.SaveCommit(checksums=np.array(sums, "<u8").tobytes()))

    def messages(self) -> list[bytes]:
        return [self.first, *(frame.SerializeToString() for frame in self.frames), self.last]

    @property
    def first(self) -> bytes:
        return blocks_pb2.SaveBlocksRequest(header=self.header).SerializeToString()

    @property
    def last(self) -> bytes:
        return blocks_pb2.SaveBlocksRequest(commit=self.commit).SerializeToString()


class _Recorder(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Records which RPCs are called."""

    def __init__(self, called: list[str]) -> None:
        self._called = called

    def _note(self, proceed: Callable[[Any, Any], Any], call: Any, request: Any) -> Any:
        self._called.append(call.method)
        return proceed(call, request)

    intercept_unary_unary = intercept_unary_stream = _note  # type: ignore[assignment]
    intercept_stream_unary = intercept_stream_stream = _note  # type: ignore[assignment]
