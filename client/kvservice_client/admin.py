"""The operators' verbs: list, explain, pin, verify and drop what a daemon stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from itertools import islice
from typing import TypeVar

from kvservice_api.errors import DaemonTooOld
from kvservice_api.v1 import admin_pb2 as pb
from kvservice_api.v1 import sessions_pb2
from kvservice_client import arguments
from kvservice_client.channel import ADMIN, SESSIONS
from kvservice_client.connection import Connection

_PAGE_BLOCKS = 1000
_PIN_KEYS = 4096
_DRAIN_TIMEOUT_S = 3600.0
TRACE_MAX_S = 30 * 86400.0  # The longest recording.
_STREAM_OPENS_S = 30.0
_SCRUB_TIMEOUT_S = 7 * 86400.0  # A scrub at a low rate takes days; the end of the connection ends it at once.


_PageRequest = pb.ListBlocksRequest | pb.ListSessionsRequest | pb.ListLayoutsRequest | pb.ListClientsRequest
_Page = TypeVar("_Page", pb.ListBlocksResponse, pb.ListSessionsResponse, pb.ListLayoutsResponse, pb.ListClientsResponse)


class Tier(StrEnum):
    """A medium that holds blocks. A store may have more, with names of their own: see `Client.admin.status().tiers`."""

    DRAM = "dram"
    SSD = "ssd"


class Admin:
    """`Client.admin`. Answers are the messages of ``admin.proto``, which documents their fields."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def status(self, timeout_s: float | None = None) -> pb.StatusResponse:
        deadline = self._connection.deadline(timeout_s)
        return self._connection.ask(ADMIN + "Status", pb.StatusRequest(), pb.StatusResponse, deadline)

    def list_blocks(
        self,
        tier: Tier | str | None = None,
        layout_fingerprint: bytes = b"",
        timeout_s: float | None = None,
        *,
        key_prefix: str = "",
    ) -> Iterator[pb.StoredBlock]:
        """All stored objects, page by page; `timeout_s` is for one page. `key_prefix`: hexadecimal digits with which
        the keys begin.
        """
        request = arguments.message(
            pb.ListBlocksRequest,
            **arguments.tier_fields(tier),
            layout_fingerprint=layout_fingerprint,
            page_size=_PAGE_BLOCKS,
            key_prefix=key_prefix,
        )
        for page in self._pages("ListBlocks", request, pb.ListBlocksResponse, timeout_s):
            yield from page.blocks

    def list_sessions(
        self, session_id: str = "", layout_fingerprint: bytes = b"", timeout_s: float | None = None
    ) -> Iterator[sessions_pb2.Session]:
        """All sessions, or those of one id, without their slices, page by page; `timeout_s` is for one page."""
        request = arguments.message(
            pb.ListSessionsRequest,
            session_id=session_id,
            layout_fingerprint=layout_fingerprint,
            page_size=_PAGE_BLOCKS,
        )
        for page in self._pages("ListSessions", request, pb.ListSessionsResponse, timeout_s):
            yield from page.sessions

    def list_layouts(self, timeout_s: float | None = None) -> Iterator[pb.StoredLayout]:
        """All layouts that the store knows, page by page; `timeout_s` is for one page."""
        request = pb.ListLayoutsRequest(page_size=_PAGE_BLOCKS)
        for page in self._pages("ListLayouts", request, pb.ListLayoutsResponse, timeout_s):
            yield from page.layouts

    def list_clients(self, timeout_s: float | None = None) -> Iterator[pb.AttachedClient]:
        """All attached clients, page by page; `timeout_s` is for one page."""
        request = pb.ListClientsRequest(page_size=_PAGE_BLOCKS)
        for page in self._pages("ListClients", request, pb.ListClientsResponse, timeout_s):
            yield from page.clients

    def _pages(
        self, method: str, request: _PageRequest, answer: type[_Page], timeout_s: float | None
    ) -> Iterator[_Page]:
        """All pages of a list; `timeout_s` is for one of them."""
        while True:
            page = self._connection.ask(ADMIN + method, request, answer, self._connection.deadline(timeout_s))
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def get_session(
        self, session_id: str, layout_fingerprint: bytes, timeout_s: float | None = None
    ) -> sessions_pb2.GetSessionResponse:
        """One session with all its slices, also of another client. Counts as a use. Raises SessionNotFound."""
        deadline = self._connection.deadline(timeout_s)
        request = arguments.message(
            sessions_pb2.GetSessionRequest, session_id=session_id, layout_fingerprint=layout_fingerprint
        )
        return self._connection.ask(SESSIONS + "GetSession", request, sessions_pb2.GetSessionResponse, deadline)

    def restore_session(
        self, session: sessions_pb2.Session, expected_revision: int = 0, timeout_s: float | None = None
    ) -> sessions_pb2.RestoreSessionResponse:
        """Store the session of another daemon's `get_session`, in a layout that is open here.

        `expected_revision` is that of the session here, which it replaces; 0 if there is none. Raises DaemonTooOld,
        InvalidRequest, UnknownLayout, SessionChanged if the session exists with other content, SessionsFull.
        """
        deadline = self._connection.deadline(timeout_s)
        limits = self._connection.retried(lambda: self._connection.limits(deadline), deadline)
        if not limits.restores_sessions:
            raise DaemonTooOld(f"the daemon's version {limits.version} restores no sessions: upgrade it")
        request = sessions_pb2.RestoreSessionRequest(session=session, expected_revision=expected_revision)
        answer = sessions_pb2.RestoreSessionResponse
        return self._connection.ask(SESSIONS + "RestoreSession", request, answer, deadline)

    def inspect(self, key: bytes, timeout_s: float | None = None) -> pb.InspectResponse:
        """Raises BlockNotFound."""
        deadline = self._connection.deadline(timeout_s)
        return self._connection.ask(
            ADMIN + "Inspect", pb.InspectRequest(key=arguments.key(key)), pb.InspectResponse, deadline
        )

    def discard(self, keys: Iterable[bytes], timeout_s: float | None = None) -> pb.DiscardResponse:
        """Drop blocks from every tier. `timeout_s` is for one request; many keys take several."""
        total = pb.DiscardResponse()
        for packed in arguments.packed_keys(keys, _PAGE_BLOCKS):
            answer = self._discard(pb.DiscardRequest(keys=packed), timeout_s)
            total.discarded += answer.discarded
            total.missing += answer.missing
        return total

    def discard_all(
        self,
        layout_fingerprint: bytes | None = None,
        progress: Callable[[int], None] = lambda discarded: None,
        timeout_s: float | None = None,
    ) -> pb.DiscardResponse:
        """Drop all blocks of a layout, or all blocks.

        In small steps, with a call of `progress` after each, so that no request takes long; `timeout_s` is per request.
        """
        total = pb.DiscardResponse()
        while True:
            blocks = islice(self.list_blocks(None, layout_fingerprint or b"", timeout_s), _PAGE_BLOCKS)
            keys = dict.fromkeys(block.key for block in blocks)  # Shards of one block share a key.
            answer = self.discard(keys, timeout_s)
            total.discarded += answer.discarded
            if not answer.discarded:
                break
            progress(total.discarded)
        if layout_fingerprint is None:
            last = self._discard(pb.DiscardRequest(everything=True), timeout_s)
        else:
            last = self._discard(pb.DiscardRequest(layout_fingerprint=layout_fingerprint), timeout_s)
        total.discarded += last.discarded
        return total

    def scrub(
        self, tier: Tier | str | None = None, bytes_per_second: int = 0, timeout_s: float = _SCRUB_TIMEOUT_S
    ) -> Iterator[pb.ScrubResponse]:
        """Verify everything stored. Yields about twice per second; the last message has `done`."""
        request = arguments.message(pb.ScrubRequest, **arguments.tier_fields(tier), bytes_per_second=bytes_per_second)
        deadline = self._connection.deadline(timeout_s)
        return self._connection.channel.stream(ADMIN + "Scrub", request, pb.ScrubResponse, deadline)

    def pin(self, keys: Iterable[bytes], ttl_s: float, timeout_s: float | None = None) -> pb.PinResponse:
        """Keep blocks from being evicted for `ttl_s` from now. Those that are not stored are counted.

        More than 4,096 keys take several requests, each with its own `timeout_s`. If one is refused, the keys of the
        requests before it are pinned. Raises InvalidRequest, PinsFull, StorageFailed.
        """
        total, ttl_ms = pb.PinResponse(), round(arguments.seconds(ttl_s, "ttl_s") * 1e3)
        for packed in arguments.packed_keys(keys, _PIN_KEYS):
            request = pb.PinRequest(keys=packed, ttl_ms=ttl_ms)
            answer = self._connection.ask(ADMIN + "Pin", request, pb.PinResponse, self._connection.deadline(timeout_s))
            answer.pinned += total.pinned
            answer.missing += total.missing
            total = answer
        return total

    def unpin(self, keys: Iterable[bytes], timeout_s: float | None = None) -> pb.UnpinResponse:
        """End pins before their time. `timeout_s` is for one request; many keys take several."""
        total = pb.UnpinResponse()
        for packed in arguments.packed_keys(keys, _PIN_KEYS):
            deadline = self._connection.deadline(timeout_s)
            answer = self._connection.ask(ADMIN + "Unpin", pb.UnpinRequest(keys=packed), pb.UnpinResponse, deadline)
            total.unpinned += answer.unpinned
            total.not_pinned += answer.not_pinned
            total.missing += answer.missing
        return total

    def explain_block(self, key: bytes, timeout_s: float | None = None) -> pb.ExplainedBlock:
        """Where a block is and why, or why it is missing."""
        return self._explain(pb.ExplainRequest(key=arguments.key(key)), timeout_s).block

    def explain_remembered_block(self, key_prefix: str, timeout_s: float | None = None) -> pb.ExplainedBlock:
        """The same for the only block in the daemon's history whose key begins with these hexadecimal digits, such as
        one that was evicted or quarantined. Raises BlockNotFound; InvalidRequest if there are several.
        """
        return self._explain(arguments.message(pb.ExplainRequest, key_prefix=key_prefix), timeout_s).block

    def explain_request(self, request_id: str, timeout_s: float | None = None) -> pb.ExplainedRequest:
        """The lookups and loads with this request id, and their results. Raises RequestNotFound."""
        return self._explain(arguments.message(pb.ExplainRequest, request_id=request_id), timeout_s).request

    def explain_session(self, session_id: str, timeout_s: float | None = None) -> list[pb.ExplainedSession]:
        """How much of a session is stored, one entry per layout. Raises SessionNotFound, which says why."""
        return list(self._explain(arguments.message(pb.ExplainRequest, session_id=session_id), timeout_s).sessions)

    def _explain(self, request: pb.ExplainRequest, timeout_s: float | None) -> pb.ExplainResponse:
        deadline = self._connection.deadline(timeout_s)
        return self._connection.ask(ADMIN + "Explain", request, pb.ExplainResponse, deadline)

    def drain(self, timeout_s: float = _DRAIN_TIMEOUT_S) -> Iterator[pb.DrainResponse]:
        """Make the daemon refuse new saves and write everything to SSD; it continues to serve loads.

        Yields about twice per second; the last message has `done`, unless the drain was undone.
        Leaving the iterator does not end the drain.
        """
        request = pb.DrainRequest(action=pb.DRAIN_ACTION_BEGIN)
        return self._connection.channel.stream(
            ADMIN + "Drain", request, pb.DrainResponse, self._connection.deadline(timeout_s)
        )

    def undo_drain(self, timeout_s: float | None = None) -> pb.DrainResponse:
        """Make the daemon accept saves again. Raises Draining if it is stopping."""
        request, deadline = pb.DrainRequest(action=pb.DRAIN_ACTION_UNDO), self._connection.deadline(timeout_s)
        (answer,) = self._connection.channel.stream(ADMIN + "Drain", request, pb.DrainResponse, deadline)
        return answer

    def policy(self, timeout_s: float | None = None) -> pb.SetPolicyResponse:
        """The policy that decides which blocks are in which tier, and what its shadow would have done."""
        return self.set_policy(timeout_s=timeout_s)

    def set_policy(self, policy: str = "", shadow: str = "", timeout_s: float | None = None) -> pb.SetPolicyResponse:
        """Use another policy until the daemon's restart, or run one beside it without effect; `shadow` "none" ends
        that. Empty names change nothing. Raises InvalidRequest for an unknown name.
        """
        request = arguments.message(pb.SetPolicyRequest, policy=policy, shadow=shadow)
        deadline = self._connection.deadline(timeout_s)
        return self._connection.ask(ADMIN + "SetPolicy", request, pb.SetPolicyResponse, deadline)

    def record_trace(
        self, layout_fingerprint: bytes = b"", duration_s: float = TRACE_MAX_S
    ) -> Iterator[pb.RecordTraceResponse]:
        """The turns that end from now on, of one layout: that of the first turn, unless it is named.

        Yields at most twice per second; the last message has `done`, after `duration_s` or when the daemon stops.
        Leaving the iterator ends the recording. Raises InvalidRequest, UnknownLayout, Overloaded.
        """
        duration_ms = round(arguments.seconds(duration_s, "duration_s") * 1e3)
        request = arguments.message(
            pb.RecordTraceRequest, layout_fingerprint=layout_fingerprint, duration_ms=duration_ms
        )
        deadline = self._connection.deadline(duration_s + _STREAM_OPENS_S)
        return self._connection.channel.stream(ADMIN + "RecordTrace", request, pb.RecordTraceResponse, deadline)

    def _discard(self, request: pb.DiscardRequest, timeout_s: float | None) -> pb.DiscardResponse:
        deadline = self._connection.deadline(timeout_s)
        return self._connection.ask(ADMIN + "Discard", request, pb.DiscardResponse, deadline)
