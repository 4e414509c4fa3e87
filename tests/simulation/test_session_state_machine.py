"""Sessions beside a plain model of them: for every order of events, both give the same answers.

The store is a real one, and the model knows a history as a list of tokens. Turns are saved or not,
blocks go missing, sessions are truncated, forked, ended and forgotten, and the store is closed, or
killed, and opened again.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvservice.index.session_records import Manifest
from kvservice.store.leases import Client
from kvservice.store.sessions.manifests import SessionAppend
from kvservice.store.sessions.sessions import SessionLimits
from kvservice.store.store import StoreLimits
from kvservice_api.errors import InvalidRequest, SessionChanged, SessionNotFound, SessionsFull
from kvservice_api.image import block_geometry
from kvservice_api.keys import BlockChain, block_chain, block_key, root_key
from kvservice_api.layout import Layout, Shard
from tests.stores import CALLER, KIB, StoreFiles, caller_of, layers_of, until

T = TypeVar("T")

LAYOUT = Layout(model_id="talk", dtype="int8", layers=2, kv_heads=2, k_head_dim=8, v_head_dim=8, block_tokens=4)
WHOLE = Shard.whole(LAYOUT)
IDS = ("chat", "other/chat:2", "third@x")
SESSIONS_MAX, SLICES_MAX = 2, 24
TTL_S = 100


class Token(NamedTuple):
    """One token of a history: its id, its block, and the position of its rotation."""

    token_id: int
    key: bytes
    number: int
    position: int


@dataclass(frozen=True)
class Talk:
    """The model of a session."""

    tokens: tuple[Token, ...]
    tip: bytes
    tail: int  # Tokens of the open tail.
    cuts: int
    revision: int
    expires_s: float
    on_disk_s: float  # Its expiry according to the disk.

    @property
    def partial_keys(self) -> set[bytes]:
        return {token.key for token in self.tokens if PARTIAL.get(token.key)}


PARTIAL: dict[bytes, bool] = {}  # All keys of partial blocks, also of earlier ones.


def chain_from(parent: bytes, token_ids: Sequence[int]) -> BlockChain:
    size = LAYOUT.block_tokens
    parts = [token_ids[at : at + size] for at in range(0, len(token_ids), size)]
    keys, key = [], parent
    for part in parts:
        key = block_key(key, part)
        keys.append(key)
        PARTIAL[key] = len(part) < size
    return BlockChain(parent, tuple(keys), tuple(map(len, parts)))


def image_of(key: bytes, tokens: int) -> bytes:
    """The bytes of a block follow from its key."""
    seed = np.frombuffer(hashlib.sha256(key).digest(), np.uint64)
    return np.random.default_rng(seed).bytes(block_geometry(LAYOUT, WHOLE, tokens).payload_bytes)


class SessionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="kvservice-test-", dir="/dev/shm"))
        limits = StoreLimits(session=SessionLimits(ttl_s=TTL_S, sessions_max=SESSIONS_MAX, slices_max=SLICES_MAX))
        self.files = StoreFiles(self.folder, dram_bytes=2048 * KIB, ssd_bytes=0, limits=limits)
        self.talks: dict[str, Talk] = {}
        self.after_cuts: set[bytes] = set()  # Keys of all blocks that were saved after a cut.
        self.orphans: set[bytes] = set()  # Partial blocks that no session names: the store must drop them.
        self.next_token = 1

    @initialize()
    def first_start(self) -> None:
        self.do(self._open())

    async def _open(self) -> None:
        self.opened = self.files.open()
        self.store = self.opened.store
        await self.store.layouts.open(CALLER, LAYOUT)
        self.client: Client = self.opened.store.leases.attach(CALLER, "test")

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 120))

    def teardown(self) -> None:
        try:
            if hasattr(self, "opened"):
                if sys.exc_info()[0] is None:
                    self.do(self.opened.settle())
                self.do(self.opened.close())
        finally:
            self.loop.close()
            self.files.remove()
            shutil.rmtree(self.folder, ignore_errors=True)

    # The model

    @property
    def now_s(self) -> float:
        return self.files.clock.wall_ms() / 1000

    def alive(self, session_id: str) -> Talk | None:
        talk = self.talks.get(session_id)
        return talk if talk is not None and talk.expires_s > self.now_s else None

    def put(self, session_id: str, talk: Talk | None) -> None:
        """Replace the session. Partial blocks that no session names any more are orphans."""
        before = self.talks.pop(session_id, None)
        if talk is not None:
            self.talks[session_id] = talk
        named = set().union(*(each.partial_keys for each in self.talks.values()))
        if before is not None:
            self.orphans |= before.partial_keys - named
        self.orphans -= named

    def used(self, talk: Talk) -> Talk:
        return replace(talk, expires_s=self.now_s + TTL_S, on_disk_s=self.now_s + TTL_S)

    def is_full(self) -> bool:
        return sum(self.alive(name) is not None for name in self.talks) >= SESSIONS_MAX

    # Rules

    ids = st.sampled_from(IDS)
    counts = st.integers(1, 9)

    @rule(session_id=ids, count=counts, saved=st.booleans())
    def append(self, session_id: str, count: int, saved: bool) -> None:
        talk = self.alive(session_id)
        kept = talk.tokens[: len(talk.tokens) - talk.tail] if talk else ()
        old_tail = [token.token_id for token in talk.tokens[len(kept) :]] if talk else []
        new = [*old_tail, *range(self.next_token, self.next_token + count)]
        self.next_token += count
        parent = talk.tip if talk else root_key(LAYOUT.fingerprint, b"salt")
        chain = chain_from(parent, new)
        turn = SessionAppend(parent, chain.keys, chain.token_counts[-1])
        if saved:
            images = [image_of(key, tokens) for key, tokens in zip(chain.keys, chain.token_counts, strict=True)]
            assert not self.do(self.opened.save(self.client, chain, images, layout=LAYOUT)).refused
        work = self.opened.sessions.append(CALLER, LAYOUT.fingerprint, session_id, talk.revision if talk else 0, turn)
        if (talk is None and self.is_full()) or self.slice_count(kept) + len(chain) > SLICES_MAX:
            with pytest.raises(SessionsFull):
                self.do(work)
            return
        manifest, _ = self.do(work)
        tokens = list(kept)
        for key, token_count in zip(chain.keys, chain.token_counts, strict=True):
            for number in range(token_count):
                tokens.append(Token(new[len(tokens) - len(kept)], key, number, len(tokens)))
        tail = chain.token_counts[-1] if PARTIAL[chain.keys[-1]] else 0
        tip = chain.keys[-1] if not tail else chain.keys[-2] if len(chain) > 1 else parent
        cuts, revision = (talk.cuts, talk.revision + 1) if talk else (0, 1)
        if cuts:
            self.after_cuts.update(chain)
        self.put(session_id, self.used(Talk(tuple(tokens), tip, tail, cuts, revision, 0, 0)))
        self.compare(session_id, manifest)

    def slice_count(self, tokens: Sequence[Token]) -> int:
        """Runs of consecutive tokens of one block."""
        breaks = [one.key != other.key or one.number + 1 != other.number for one, other in pairwise(tokens)]
        return 1 + sum(breaks) if tokens else 0

    @rule(session_id=ids, data=st.data())
    def truncate(self, session_id: str, data: st.DataObject) -> None:
        talk = self.alive(session_id)
        if talk is None:
            with pytest.raises(SessionNotFound):
                self.do(self.opened.sessions.truncate(CALLER, LAYOUT.fingerprint, session_id, 1, [(0, 1)]))
            return
        total = len(talk.tokens)
        ends = sorted(data.draw(st.sets(st.integers(0, total), min_size=2, max_size=8)))
        keep = [(start, end - start) for start, end in zip(ends[::2], ends[1::2], strict=False)]
        tokens = tuple(token for first, count in keep for token in talk.tokens[first : first + count])
        work = self.opened.sessions.truncate(CALLER, LAYOUT.fingerprint, session_id, talk.revision, keep)
        if len(tokens) == total:
            manifest, _ = self.do(work)  # Nothing is cut: it counts as a use, which the next flush writes.
            self.put(session_id, replace(talk, expires_s=self.now_s + TTL_S))
        elif self.slice_count(tokens) > SLICES_MAX:
            with pytest.raises(SessionsFull):
                self.do(work)
            return
        else:
            manifest, _ = self.do(work)
            cut = replace(talk, tokens=tokens, tip=manifest.tip, tail=0, cuts=talk.cuts + 1, revision=talk.revision + 1)
            assert manifest.tip not in PARTIAL, "the key of a cut is no block's"
            self.put(session_id, self.used(cut))
        self.compare(session_id, manifest)

    @rule(session_id=ids, new_id=ids)
    def fork(self, session_id: str, new_id: str) -> None:
        talk = self.alive(session_id)
        work = self.opened.sessions.fork(CALLER, LAYOUT.fingerprint, session_id, new_id, 0)
        if session_id == new_id:
            with pytest.raises(InvalidRequest):
                self.do(work)
        elif talk is None:
            with pytest.raises(SessionNotFound):
                self.do(work)
        elif self.alive(new_id) is not None:
            with pytest.raises(SessionChanged):
                self.do(work)
        elif self.is_full():
            with pytest.raises(SessionsFull):
                self.do(work)
        else:
            manifest, _ = self.do(work)
            self.put(new_id, self.used(replace(talk, revision=1)))
            self.compare(new_id, manifest)

    @rule(session_id=ids)
    def end(self, session_id: str) -> None:
        ended = self.do(self.opened.store.sessions.end(CALLER, LAYOUT.fingerprint, session_id))
        assert ended == (self.alive(session_id) is not None)
        self.put(session_id, None)

    @rule(session_id=ids, off_by=st.sampled_from([-1, 1, 1000]))
    def change_from_another_revision(self, session_id: str, off_by: int) -> None:
        talk = self.alive(session_id)
        if talk is None:
            return
        turn = SessionAppend(talk.tip, [bytes(32)], LAYOUT.block_tokens)
        for work in (
            self.opened.sessions.append(CALLER, LAYOUT.fingerprint, session_id, talk.revision + off_by, turn),
            self.opened.sessions.truncate(CALLER, LAYOUT.fingerprint, session_id, talk.revision + off_by, [(0, 1)]),
        ):
            with pytest.raises(SessionChanged) as caught:
                self.do(work)
            now = caught.value.now.manifest
            assert (now.revision, now.tip, now.token_count) == (talk.revision, talk.tip, len(talk.tokens))

    @rule(session_id=ids, after_s=st.sampled_from([0, 10, 40]))
    def read(self, session_id: str, after_s: int) -> None:
        """The usable slices are those before the first missing block, and their bytes are right."""
        self.files.clock.advance(seconds=after_s)
        talk = self.alive(session_id)
        if talk is None:
            with pytest.raises(SessionNotFound):
                self.store.sessions.get(CALLER, LAYOUT.fingerprint, session_id, None)
            return
        (manifest, _), usable, _ = self.store.sessions.get(CALLER, LAYOUT.fingerprint, session_id, None)
        self.talks[session_id] = replace(talk, expires_s=self.now_s + TTL_S)
        self.compare(session_id, manifest)
        keys = manifest.slices["key"].tolist()
        stored = [self.opened.hits([key], layout=LAYOUT) for key in keys]
        assert usable == next((at for at, hit in enumerate(stored) if not hit), len(keys))
        if usable:
            lease = self.opened.lookup(self.client, keys, layout=LAYOUT)
            assert lease is not None
            sizes = manifest.slices["block_tokens"][:usable].tolist()
            expected = layers_of([image_of(key, size) for key, size in zip(keys, sizes, strict=False)], shard=WHOLE)
            assert self.do(self.opened.load(lease)) == expected
            self.opened.leases.begin_release(caller_of(self.client), lease.lease_id)

    @rule(session_id=ids, at=st.integers(0, 7))
    def lose_a_block(self, session_id: str, at: int) -> None:
        talk = self.talks.get(session_id)
        if talk is not None:
            keys = list(dict.fromkeys(token.key for token in talk.tokens))
            self.do(self.store.operators.discard(CALLER, [keys[at % len(keys)]]))

    @rule(seconds=st.sampled_from([1, 10, 40, 40, 2 * TTL_S]))
    def let_time_pass(self, seconds: int) -> None:
        self.files.clock.advance(seconds=seconds)

    @rule()
    def sweep(self) -> None:
        self.do(self.opened.sessions.expire())
        for session_id in list(self.talks):
            if self.alive(session_id) is None:
                self.put(session_id, None)

    @rule()
    def flush(self) -> None:
        self.do(self.opened.sessions.flush())
        self.talks = {name: replace(talk, on_disk_s=talk.expires_s) for name, talk in self.talks.items()}

    @rule()
    def restart(self) -> None:
        self.do(self.opened.close())
        self.talks = {name: replace(talk, on_disk_s=talk.expires_s) for name, talk in self.talks.items()}
        self.do(self._open())

    @rule()
    def kill(self) -> None:
        """A crash loses the uses since the last flush, and nothing else."""
        self.do(self.opened.kill())
        self.talks = {name: replace(talk, expires_s=talk.on_disk_s) for name, talk in self.talks.items()}
        self.orphans.clear()  # Their drop may have been interrupted; the policy evicts them later.
        self.do(self._open())

    # Invariants

    @invariant()
    def both_know_the_same_sessions(self) -> None:
        if not hasattr(self, "opened"):
            return
        found, following = self.do(self.opened.sessions.page(CALLER, 0, 100, "", None))
        assert following is None
        assert {each.session_id for each in found} == {name for name in self.talks if self.alive(name)}
        for each in found:
            self.compare(each.session_id, each)

    @invariant()
    def partial_blocks_that_no_session_names_are_dropped(self) -> None:
        if hasattr(self, "opened"):
            self.do(until(lambda: not any(self.opened.hits([key], layout=LAYOUT) for key in self.orphans)))

    @invariant()
    def what_was_said_after_a_cut_is_no_prefix(self) -> None:
        for talk in self.talks.values():
            ids = [token.token_id for token in talk.tokens]
            for start in range(LAYOUT.block_tokens):
                ordinary = block_chain(LAYOUT, ids[: len(ids) - start], salt=b"salt", with_partial=True)
                assert not self.after_cuts & set(ordinary)

    def compare(self, session_id: str, manifest: Manifest) -> None:
        talk = self.talks[session_id]
        assert (manifest.session_id, manifest.revision, manifest.tip) == (session_id, talk.revision, talk.tip)
        assert (manifest.cuts, manifest.tail_tokens) == (talk.cuts, talk.tail)
        tokens = [
            (each["key"].tobytes(), int(each["first_token"]) + number, int(each["stored_position"]) + number)
            for each in manifest.slices
            for number in range(int(each["token_count"]))
        ]
        assert tokens == [token[1:] for token in talk.tokens]
        assert manifest.expires_at_ms == pytest.approx(talk.expires_s * 1000, abs=1)


TestSessions = SessionMachine.TestCase
TestSessions.settings = settings(
    max_examples=15, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


@pytest.mark.slow
class TestSessionsDeeply(SessionMachine.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(TestSessions.settings, max_examples=500, stateful_step_count=80)
