"""Every RPC of SessionService, called over the wire: each test is named after one, and checks its effect."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status

from kvservice_api.errors import (
    InvalidRequest,
    SessionChanged,
    SessionNotFound,
    SessionsFull,
    UnknownLayout,
)
from kvservice_api.image import checksum
from kvservice_api.keys import BlockChain, block_key, cut_key
from kvservice_api.status import from_status
from kvservice_api.v1 import admin_pb2, blocks_pb2, types_pb2
from kvservice_api.v1 import sessions_pb2 as pb
from tests.daemon import DaemonProcess, until
from tests.integration.known_blocks import SMALL, new_chain
from tests.integration.wire import Upload, Wire, refused, unharmed

SERVICE = "SessionService"
DRAM = types_pb2.TIER_DRAM
_numbers = itertools.count()


@pytest.fixture
def session_id() -> str:
    return f"chat-{next(_numbers)}"


def saved(wire: Wire, blocks: int = 3) -> BlockChain:
    chain = new_chain(SMALL, blocks)
    assert wire.save(Upload.of(wire, SMALL, chain, types_pb2.DURABILITY_SSD).messages()).stored == blocks
    return chain


def columns(session: pb.Session) -> list[tuple[bytes, int, int, int, int]]:
    """Key, first token, tokens, tokens of the block and stored position of each slice."""
    slices = session.slices
    keys = [slices.keys[at : at + 32] for at in range(0, len(slices.keys), 32)]
    rows = zip(keys, slices.first_token, slices.token_count, slices.block_tokens, slices.stored_position, strict=True)
    return list(rows)


def attached_to(error: grpc.RpcError) -> pb.Session:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    session = from_status(status).attached
    assert isinstance(session, pb.Session)
    return session


def test_AppendTurn_begins_a_session_and_continues_it(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 4)

    begun = wire.append(session_id, SMALL, BlockChain(chain.parent, (*chain.keys[:2], bytes(32)), (16, 16, 5)))
    assert (begun.session_id, begun.layout_fingerprint, begun.revision) == (session_id, SMALL.fingerprint, 1)
    assert (begun.tip, begun.tail_tokens, begun.token_count, begun.slice_count) == (chain.keys[1], 5, 37, 3)
    assert begun.created_at == begun.used_at
    assert begun.expires_at.seconds - begun.used_at.seconds == 3600
    assert not begun.HasField("slices")

    grown = wire.append(session_id, SMALL, chain[2:], 1)
    assert (grown.revision, grown.tip, grown.tail_tokens, grown.token_count) == (2, chain.keys[3], 0, 64)
    assert [row[0] for row in columns(wire.get_session(session_id, SMALL).session)] == list(chain)


def test_AppendTurn_refuses_a_stale_revision_with_the_session_as_it_is(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 3)
    wire.append(session_id, SMALL, chain[:1])
    now = wire.append(session_id, SMALL, chain[1:2], 1)

    for stale in (0, 1, 3, 2**64 - 1):
        with pytest.raises(grpc.RpcError) as caught:
            wire.append(session_id, SMALL, chain[2:], stale)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        current = attached_to(caught.value)
        assert (current.revision, current.tip) == (2, now.tip)
        assert [row[0] for row in columns(current)] == list(chain[:2])
    assert wire.append(session_id, SMALL, chain[2:], 2).revision == 3


def test_AppendTurn_leaves_the_slices_of_a_long_session_out_of_the_error(wire: Wire, session_id: str) -> None:
    keys = tuple(block_key(bytes(32), [number]) for number in range(5000))
    wire.append(session_id, SMALL, BlockChain(bytes(32), keys, (16,) * 5000))

    with pytest.raises(grpc.RpcError) as caught:
        wire.append(session_id, SMALL, BlockChain(bytes(32), keys[:1], (16,)))
    current = attached_to(caught.value)
    assert (current.revision, current.slice_count, current.HasField("slices")) == (1, 5000, False)
    assert len(columns(wire.get_session(session_id, SMALL).session)) == 5000
    wire.sessions.EndSession(pb.EndSessionRequest(session_id=session_id, layout_fingerprint=SMALL.fingerprint))


def test_AppendTurn_refuses_what_does_not_continue_the_session(
    wire: Wire, daemon: DaemonProcess, session_id: str
) -> None:
    chain = saved(wire, 2)
    before = wire.append(session_id, SMALL, BlockChain(chain.parent, chain.keys, (16, 9)))
    with unharmed(daemon.address):
        for parent, keys, tokens, why in (
            (chain.parent, chain.packed_keys[32:], 10, "parent_key is"),
            (b"short", chain.packed_keys[32:], 10, "parent_key has 5 bytes"),
            (before.tip, b"", 10, "keys has 0 bytes"),
            (before.tip, chain.packed_keys[:40], 10, "keys has 40 bytes"),
            (before.tip, bytes(32), 9, "extend the session's open tail"),
            (before.tip, bytes(32), 17, "at most 16"),
        ):
            request = pb.AppendTurnRequest(
                session_id=session_id,
                layout_fingerprint=SMALL.fingerprint,
                expected_revision=1,
                parent_key=parent,
                keys=keys,
                last_block_tokens=tokens,
            )
            with refused(InvalidRequest, why):
                wire.sessions.AppendTurn(request)
        with refused(InvalidRequest, "stored_position"):
            wire.append(session_id, SMALL, BlockChain(before.tip, (bytes(32),), (16,)), 1, stored_position=2**63)
        with refused(InvalidRequest, "each of 16 tokens"):
            wire.append(session_id, SMALL, BlockChain(before.tip, (bytes(32),), (16,)), 1, stored_positions=[1, 2])
        with refused(SessionNotFound, "never begun"):
            wire.append("unknown", SMALL, chain, 1)
        many = tuple(number.to_bytes(32, "big") for number in range(9000))
        with refused(SessionsFull, "at most 8192"):
            wire.append("too-long", SMALL, BlockChain(bytes(32), many, (16,) * 9000))
        now = wire.get_session(session_id, SMALL).session
        assert (now.revision, now.tip, now.tail_tokens) == (1, before.tip, 9)


@pytest.mark.parametrize("session_id", ["", "a b", "x" * 201, "ü", "line\n", "nul\0"])
def test_AppendTurn_and_all_others_refuse_odd_session_ids(wire: Wire, session_id: str) -> None:
    named: dict[str, Any] = {"session_id": session_id, "layout_fingerprint": SMALL.fingerprint}
    calls: list[Callable[[], object]] = [
        lambda: wire.append(session_id, SMALL, BlockChain(bytes(32), (bytes(32),), (16,))),
        lambda: wire.sessions.GetSession(pb.GetSessionRequest(**named)),
        lambda: wire.truncate(session_id, SMALL, 1, (0, 1)),
        lambda: wire.sessions.ForkSession(pb.ForkSessionRequest(**named, new_session_id="new")),
        lambda: wire.sessions.EndSession(pb.EndSessionRequest(**named)),
    ]
    for call in calls:
        with refused(InvalidRequest, "1 to 200 letters", field="session_id"):
            call()


def test_GetSession_tells_how_much_of_the_history_is_stored_and_where(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 4)
    wire.append(session_id, SMALL, chain)
    until(lambda: wire.get_session(session_id, SMALL).runs == [blocks_pb2.ResidencyRun(count=4, dram=True, ssd=True)])
    wire.blocks.Evict(blocks_pb2.EvictRequest(keys=chain[1:2].packed_keys, tier=DRAM))

    answer = wire.get_session(session_id, SMALL)
    assert (answer.stored_slices, answer.stored_tokens) == (4, 64)
    assert [(run.count, run.dram, run.ssd) for run in answer.runs] == [
        (1, True, True),
        (1, False, True),
        (2, True, True),
    ]
    assert columns(answer.session) == [(key, 0, 16, 16, at * 16) for at, key in enumerate(chain)]

    wire.admin.Discard(admin_pb2.DiscardRequest(keys=chain[2:3].packed_keys))
    answer = wire.get_session(session_id, SMALL)
    assert (answer.stored_slices, answer.stored_tokens) == (2, 32)
    with refused(SessionNotFound, "unknown"):
        wire.get_session("unknown", SMALL)
    with refused(UnknownLayout, "was opened here"):
        wire.sessions.GetSession(pb.GetSessionRequest(session_id=session_id, layout_fingerprint=bytes(32)))
    request = pb.GetSessionRequest(session_id=session_id, layout_fingerprint=SMALL.fingerprint)
    request.shard.layer_end = 99
    with refused(InvalidRequest, "shard"):
        wire.sessions.GetSession(request)


def test_TruncateSession_keeps_the_ranges_of_the_request_and_cuts_the_chain(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 4)
    wire.append(session_id, SMALL, chain)
    used = wire.state()["DRAM bytes"]

    cut = wire.truncate(session_id, SMALL, 1, (0, 4), (40, 24))
    assert (cut.revision, cut.token_count, cut.slice_count, cut.cuts, cut.tail_tokens) == (2, 28, 3, 1, 0)
    assert cut.tip == cut_key(chain.keys[-1], [(0, 4), (40, 24)])
    answer = wire.get_session(session_id, SMALL)
    assert columns(answer.session) == [
        (chain.keys[0], 0, 4, 16, 0),
        (chain.keys[2], 8, 8, 16, 40),
        (chain.keys[3], 0, 16, 16, 48),
    ]
    assert answer.stored_slices == 3
    assert wire.state()["DRAM bytes"] == used, "a truncation moves no byte"
    assert wire.has(SMALL, chain), "what it dropped may serve others"

    after = BlockChain(cut.tip, (block_key(cut.tip, range(16)),), (16,))
    assert wire.save(Upload.of(wire, SMALL, after).messages()).stored == 1
    wire.append(session_id, SMALL, after, 2)
    answer = wire.get_session(session_id, SMALL)
    assert columns(answer.session)[-1] == (after.keys[0], 0, 16, 16, 28)
    assert answer.stored_tokens == 44


def test_TruncateSession_never_lets_what_follows_a_cut_hit_as_an_ordinary_prefix(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 3)
    wire.append(session_id, SMALL, chain)
    cut = wire.truncate(session_id, SMALL, 1, (0, 16))
    tokens = list(range(100, 116))
    after = BlockChain(cut.tip, (block_key(cut.tip, tokens),), (16,))
    wire.save(Upload.of(wire, SMALL, after).messages())
    wire.append(session_id, SMALL, after, 2)

    ordinary = BlockChain(chain.parent, (chain.keys[0], block_key(chain.keys[0], tokens)), (16, 16))
    assert wire.lookup(SMALL, ordinary).hit_blocks == 1
    assert wire.get_session(session_id, SMALL).stored_slices == 2


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ([], "keep is empty"),
        ([(0, 49)], "tokens 0..49; the session has 48"),
        ([(48, 1)], "tokens 48..49"),
        ([(2**64 - 1, 2**64 - 1)], "the session has 48"),
        ([(0, 0)], "a range of keep is empty"),
        ([(20, 5), (0, 5)], "keep[1] descends"),
        ([(0, 5), (4, 5)], "keep[1] overlaps"),
        ([(0, 1)] * 9000, "keep has 9000 entries"),
    ],
    ids=["nothing", "past the end", "at the end", "overflow", "empty", "descending", "overlapping", "too many"],
)
def test_TruncateSession_refuses_ranges_that_make_no_sense(
    wire: Wire, daemon: DaemonProcess, session_id: str, keep: list[tuple[int, int]], why: str
) -> None:
    chain = saved(wire, 3)
    wire.append(session_id, SMALL, chain)
    with unharmed(daemon.address), refused(InvalidRequest, re.escape(why)):
        wire.truncate(session_id, SMALL, 1, *keep)

    answer = wire.get_session(session_id, SMALL)
    assert (answer.session.revision, answer.stored_slices) == (1, 3)


def test_TruncateSession_refuses_a_stale_revision_with_the_session_as_it_is(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 2)
    wire.append(session_id, SMALL, chain[:1])
    wire.append(session_id, SMALL, chain[1:], 1)

    with pytest.raises(grpc.RpcError) as caught:
        wire.truncate(session_id, SMALL, 1, (0, 5))
    assert attached_to(caught.value).revision == 2
    with refused(SessionNotFound, "never begun"):
        wire.truncate("unknown", SMALL, 1, (0, 5))


def test_TruncateSession_keeps_listed_positions_with_their_tokens(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 2)
    positions = (np.arange(32) * 3).tolist()
    wire.append(session_id, SMALL, chain, stored_positions=positions)

    wire.truncate(session_id, SMALL, 1, (10, 10))

    slices = wire.get_session(session_id, SMALL).session.slices
    assert list(slices.stored_position) == [-1, -1]
    assert [(each.slice, list(each.positions)) for each in slices.positions] == [
        (0, positions[10:16]),
        (1, positions[16:20]),
    ]


def test_ForkSession_copies_the_history_and_both_go_their_own_ways(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 3)
    wire.append(session_id, SMALL, chain[:2])
    named: dict[str, Any] = {"session_id": session_id, "layout_fingerprint": SMALL.fingerprint}

    def fork(new_id: str, revision: int = 0) -> pb.Session:
        request = pb.ForkSessionRequest(**named, new_session_id=new_id, expected_revision=revision)
        answer: pb.Session = wire.sessions.ForkSession(request).session
        return answer

    other = fork(f"{session_id}/fork", 1)
    assert (other.session_id, other.revision, other.tip) == (f"{session_id}/fork", 1, chain.keys[1])
    wire.append(other.session_id, SMALL, chain[2:], 1)
    assert wire.get_session(session_id, SMALL).session.slice_count == 2
    assert wire.get_session(other.session_id, SMALL).stored_slices == 3

    for new_id, revision, kind, why in (
        (other.session_id, 0, SessionChanged, "already"),
        ("new", 9, SessionChanged, "revision 9 was expected"),
        (session_id, 0, InvalidRequest, "own id"),
        ("a b", 0, InvalidRequest, "new_session_id"),
    ):
        with refused(kind, why):
            fork(new_id, revision)


def test_EndSession_forgets_it_and_drops_its_tail(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 2)
    header = new_chain(SMALL, 1)
    upload = Upload.of(wire, SMALL, header)
    upload.header.last_block_tokens = 4
    upload.header.parent_key = chain.keys[1]
    for frame in upload.frames:
        frame.payload = frame.payload[: len(frame.payload) // 4]
    upload.commit.checksums = np.array([checksum(frame.payload) for frame in upload.frames], "<u8").tobytes()
    assert wire.save(upload.messages()).stored == 1
    wire.append(session_id, SMALL, BlockChain(chain.parent, (*chain.keys, *header.keys), (16, 16, 4)))
    assert wire.get_session(session_id, SMALL).stored_slices == 3

    request = pb.EndSessionRequest(session_id=session_id, layout_fingerprint=SMALL.fingerprint)
    assert wire.sessions.EndSession(request).ended
    assert not wire.sessions.EndSession(request).ended

    with refused(SessionNotFound, "was ended"):
        wire.get_session(session_id, SMALL)
    until(lambda: wire.lookup(SMALL, header, 0).hit_blocks == 0)
    assert wire.has(SMALL, chain), "full blocks may serve others"


def test_GetSession_finds_it_after_SIGKILL_as_it_was(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon()
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        chain = saved(wire, 4)
        wire.append("kept", SMALL, chain[:3])
        wire.truncate("kept", SMALL, 1, (2, 40))
        wire.append("ended", SMALL, chain)
        wire.sessions.EndSession(pb.EndSessionRequest(session_id="ended", layout_fingerprint=SMALL.fingerprint))
        before = wire.get_session("kept", SMALL)
    daemon.kill()
    daemon.start()
    with Wire(daemon.address) as wire:
        after = wire.get_session("kept", SMALL)
        assert after.session.slices == before.session.slices
        assert (after.session.revision, after.session.tip) == (before.session.revision, before.session.tip)
        assert after.stored_slices == before.stored_slices == 3
        with refused(SessionNotFound, "ended"):
            wire.get_session("ended", SMALL)
    daemon.stop()
    assert daemon.check().returncode == 0


def test_GetSession_finds_nothing_once_the_session_expired(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon(session__ttl_s=1)
    with Wire(daemon.address) as wire:
        wire.attach()
        wire.open_layout(SMALL)
        wire.append("short", SMALL, new_chain(SMALL, 1))

        until(lambda: not wire.admin.ListSessions(admin_pb2.ListSessionsRequest()).sessions)
        with refused(SessionNotFound, "expired"):
            wire.get_session("short", SMALL)
        until(lambda: wire.status().counters["sessions_expired"] == 1)


def restore(wire: Wire, session: pb.Session, revision: int = 0) -> pb.RestoreSessionResponse:
    request = pb.RestoreSessionRequest(session=session, expected_revision=revision)
    answer: pb.RestoreSessionResponse = wire.sessions.RestoreSession(request)
    return answer


def test_RestoreSession_stores_a_manifest_as_another_daemon_had_it(wire: Wire, session_id: str) -> None:
    chain = saved(wire, 4)
    wire.append(session_id, SMALL, chain[:3], stored_positions=range(100, 148))
    cut = wire.truncate(session_id, SMALL, 1, (0, 4), (20, 20))
    tail = BlockChain(cut.tip, (block_key(cut.tip, [1, 2]),), (2,))
    wire.append(session_id, SMALL, tail, 2, stored_position=7)
    whole = wire.get_session(session_id, SMALL).session
    named: dict[str, Any] = {"session_id": session_id, "layout_fingerprint": SMALL.fingerprint}
    wire.sessions.EndSession(pb.EndSessionRequest(**named))

    answer = restore(wire, whole)

    assert (answer.changed, answer.session.revision, answer.session.cuts) == (True, 3, 1)
    now = wire.get_session(session_id, SMALL).session
    assert now.used_at.ToMilliseconds() >= whole.used_at.ToMilliseconds()
    for name in ("used_at", "expires_at"):
        now.ClearField(name)
        whole.ClearField(name)
    assert now == whole
    assert not restore(wire, whole).changed, "a call whose answer was lost may be repeated"
    fuller = BlockChain(cut.tip, (block_key(cut.tip, range(16)),), (16,))
    assert wire.append(session_id, SMALL, fuller, 3).revision == 4
    with pytest.raises(grpc.RpcError) as caught:
        restore(wire, whole)
    assert attached_to(caught.value).revision == 4
    assert restore(wire, whole, 4).session.revision == 3


def test_RestoreSession_refuses_a_manifest_that_contradicts_itself(
    wire: Wire, daemon: DaemonProcess, session_id: str
) -> None:
    chain = saved(wire, 2)
    wire.append(session_id, SMALL, BlockChain(chain.parent, (*chain.keys, bytes(32)), (16, 16, 5)))
    whole = wire.get_session(session_id, SMALL).session
    whole.session_id = f"{session_id}/other"
    changes: list[tuple[str, Callable[[pb.Session], object]]] = [
        ("tip has 3 bytes", lambda of: setattr(of, "tip", b"tip")),
        ("revision is 0", lambda of: setattr(of, "revision", 0)),
        ("slices has 0 bytes", lambda of: of.ClearField("slices")),
        ("slices has 95 bytes", lambda of: setattr(of.slices, "keys", of.slices.keys[1:])),
        ("first_token has 2 entries", lambda of: of.slices.first_token.pop()),
        ("the slices are 3 with 37 tokens", lambda of: setattr(of, "token_count", 38)),
        ("the slices are 3 with", lambda of: setattr(of, "slice_count", 2)),
        ("slice 1 is not within its block", lambda of: of.slices.first_token.__setitem__(1, 1)),
        ("slice 0 is not within its block", lambda of: of.slices.block_tokens.__setitem__(0, 17 * 2**20)),
        ("tail_tokens is 4; the last slice differs", lambda of: setattr(of, "tail_tokens", 4)),
        ("a slice of this layout has one position", lambda of: of.slices.ClearField("stored_position")),
        ("a position is too large", lambda of: of.slices.stored_position.__setitem__(0, 2**62)),
        ("positions of slice 9", lambda of: of.slices.positions.add(slice=9, positions=[1])),
        ("one position", lambda of: of.slices.positions.add(slice=2, positions=[1, 2, 3, 4, 5])),
        ("created_at is no time", lambda of: setattr(of.created_at, "seconds", 2**62)),
        ("created_at is no time", lambda of: setattr(of.created_at, "seconds", -(2**62))),
        ("created_at is no time", lambda of: setattr(of.created_at, "nanos", -1)),
    ]
    with unharmed(daemon.address):
        for why, change in changes:
            wrong = pb.Session.FromString(whole.SerializeToString())
            change(wrong)
            with refused(InvalidRequest, re.escape(why)):
                restore(wire, wrong)
        with refused(SessionNotFound, "never begun"):
            restore(wire, whole, 3)
        whole.session_id = "a b"
        with refused(InvalidRequest, "1 to 200 letters", field="session_id"):
            restore(wire, whole)
        whole.layout_fingerprint = bytes(32)
        whole.session_id = session_id
        with refused(UnknownLayout, "was opened here"):
            restore(wire, whole)
    assert not wire.admin.ListSessions(admin_pb2.ListSessionsRequest(session_id=f"{session_id}/other")).sessions
