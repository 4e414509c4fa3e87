"""Sessions: the manifest of each conversation, on disk before a change is answered.

A manifest names blocks and does not hold them: they are stored, moved and evicted like others, except for partial
blocks (``partial_blocks.py``).
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from kvservice.clock import Clock
from kvservice.counters import Counters
from kvservice.index.block_index import BlockIndex
from kvservice.index.session_records import Manifest
from kvservice.store.block_lifecycle import BlockLifecycle
from kvservice.store.caller import Caller
from kvservice.store.miss_reasons import Reason
from kvservice.store.operations.trace import TraceRecorder
from kvservice.store.prefix_match import Run, match_prefix, runs_of
from kvservice.store.sessions import manifests
from kvservice.store.sessions.manifests import SessionAppend, SessionContent, StoredSession
from kvservice.store.sessions.partial_blocks import NamedPartialBlocks
from kvservice.store.tasks import LoopBudget, Tasks
from kvservice_api.errors import InvalidRequest, KVError, SessionChanged, SessionNotFound, SessionsFull
from kvservice_api.layout import Shard
from kvservice_api.session_ids import checked_session_id

log = logging.getLogger(__name__)

_EXPIRED_AT_A_TIME = 256
_FLUSHED_AT_A_TIME = 64
POSITIONS_MAX = 65536  # Explicit positions in one session.
_NAMES_A_TURN = 4096
_KEYS_A_TURN = 8192  # They take a millisecond of the event loop.
_TICK_S = 1.0
_GONE_MAX = 4096  # Ended sessions in the history.

T = TypeVar("T")

Name = tuple[int, str]  # Layout and session id.


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Times in seconds. A session that was not used for `ttl_s` is deleted."""

    ttl_s: float = 3600.0
    sessions_max: int = 16384
    slices_max: int = 8192
    flush_s: float = 60.0


class SessionHistory(NamedTuple):
    """A session, how many of its leading slices are stored, and their tiers."""

    session: StoredSession
    usable: int
    runs: list[Run]


class Sessions:
    """All sessions of the store. Manifests in memory equal those on disk, except for the times of use."""

    def __init__(
        self,
        index: BlockIndex,
        lifecycle: BlockLifecycle,
        clock: Clock,
        counters: Counters,
        tasks: Tasks,
        loop_budget: LoopBudget,
        trace: TraceRecorder,
        limits: SessionLimits,
    ) -> None:
        self._index = index
        self._trace = trace
        self._loop_budget = loop_budget
        self._lifecycle = lifecycle
        self._clock = clock
        self._counters = counters
        self._tasks = tasks
        self.limits = limits
        self._manifests: dict[Name, Manifest] = {}  # Ordered by time of use, the oldest first.
        self._serials: dict[Name, int] = {}  # In the order of creation, for the pages of a list.
        self._next_serial = 1
        self.changes = 0  # How often a session was begun, changed, used or deleted.
        self._arriving = 0  # New sessions that are not on disk yet.
        self._partial_blocks = NamedPartialBlocks(index, lifecycle, tasks)
        self._touched: dict[Name, None] = {}  # Sessions that were used since their times were written.
        self._gone: dict[str, tuple[int, str]] = {}  # Session id -> when and why it ended, for error messages.
        self._locks: WeakValueDictionary[Name, asyncio.Lock] = WeakValueDictionary()
        self._load()

    @property
    def count(self) -> int:
        return len(self._manifests)

    def start(self) -> None:
        """Delete expired sessions and write times of use, from now on."""
        self._tasks.start(self._tick_forever(), "session expiry")

    async def stop(self) -> None:
        """Write the times of use."""
        try:
            await self.flush()
        except KVError as error:
            log.warning("times of use of sessions were not written: %s", error.message)

    # Reading

    def get(self, caller: Caller, fingerprint: bytes, session_id: str, shard: Shard | None) -> SessionHistory:
        """A session, and how much of it is stored; counts as a use. Raises UnknownLayout, SessionNotFound."""
        _, layout = self._index.find_layout(fingerprint)
        wanted = Shard.whole(layout) if shard is None else shard.check(layout)
        name = self._name(fingerprint, session_id)
        return self.history(self._use(name, self._found(name)), wanted)

    async def keys(self, caller: Caller, names: Sequence[tuple[bytes, str]]) -> tuple[list[bytes], int]:
        """All keys of these sessions, pairs of a fingerprint and an id, and how many sessions do not exist."""
        keys: list[bytes] = []
        missing = 0
        for name in names:
            await self._loop_budget.slot()
            manifest = self.peek(caller, *name)
            missing += manifest is None
            keys += [] if manifest is None else manifest.slices["key"].tolist()
        return keys, missing

    def peek(self, caller: Caller, fingerprint: bytes, session_id: str) -> Manifest | None:
        """The session's manifest, if there is one. Does not count as a use."""
        layout_id = self._index.layout_id(fingerprint)
        return None if layout_id is None else self._current((layout_id, session_id))

    async def named_elsewhere(self, keys: Sequence[Sequence[bytes]], own: Set[tuple[bytes, str]]) -> set[bytes]:
        """The keys that occur in several of these lists, or that sessions name which are not among `own`: pairs of a
        layout's fingerprint and a session id.
        """
        counts = Counter(key for some in keys for key in set(some))
        found = {key for key, count in counts.items() if count > 1}
        wanted, examined = counts.keys() - found, 0
        if not wanted:
            return found
        own_names = {(self._index.layout_id(fingerprint), session_id) for fingerprint, session_id in own}
        for name in list(self._manifests):
            manifest = self._manifests.get(name)
            if manifest is not None and name not in own_names:
                found |= wanted.intersection(manifest.slices["key"].tolist())
                examined += len(manifest.slices)
            if examined > _KEYS_A_TURN:
                examined = 0
                await self._loop_budget.slot()
        return found

    def find_by_id(self, caller: Caller, session_id: str) -> list[Manifest]:
        """The sessions of this id in all layouts. Does not count as a use. Raises SessionNotFound, which says why."""
        found = [manifest for each in self._index.layouts if (manifest := self._current((each, session_id)))]
        if not found:
            here = (self._manifests.get((each, session_id)) for each in self._index.layouts)
            over = [manifest.expires_at_ms for manifest in here if manifest is not None]
            at_ms, why = (max(over), "expired") if over else self._gone.get(session_id, (0, ""))
            when = datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds") if why else ""
            reason = f"it {why} at {when}" if why else "it was never begun, or it ended before this daemon's start"
            raise SessionNotFound(f"there is no session {session_id!r}: {reason}", session_id=session_id)
        return found

    def stored(self, manifest: Manifest) -> StoredSession:
        return StoredSession(manifest, self._index.layouts[manifest.layout_id])

    def history(self, manifest: Manifest, wanted: Shard) -> SessionHistory:
        """How much of a session is stored, for this shard. Does not count as a use."""
        blocks = self._lifecycle.blocks
        hits = match_prefix(blocks, manifest.slices["key"].tolist(), manifest.layout_id, wanted).rows
        wrong = np.flatnonzero(blocks.token_count[hits] != manifest.slices["block_tokens"][: len(hits)])
        usable = int(wrong[0]) if len(wrong) else len(hits)
        return SessionHistory(self.stored(manifest), usable, runs_of(blocks, hits[:usable]))

    async def page(
        self, caller: Caller, start: int, size: int, session_id: str, layout_id: int | None
    ) -> tuple[list[Manifest], int | None]:
        """Up to `size` sessions from the serial number `start` on, in the order of creation, and the next number."""
        if session_id:
            names = [name for each in self._index.layouts if (name := (each, session_id)) in self._serials]
            names.sort(key=self._serials.__getitem__)
        else:
            names = list(self._serials)
        first = bisect.bisect_left(names, start, key=self._serials.__getitem__)
        found: list[Manifest] = []
        for count, name in enumerate(islice(names, first, None), start=1):
            if count % _NAMES_A_TURN == 0:
                await asyncio.sleep(0)
            manifest = self._current(name)
            if manifest is None or (layout_id is not None and name[0] != layout_id):
                continue
            if len(found) == size:
                return found, self._serials[name]
            found.append(manifest)
        return found, None

    # Changing

    async def append(
        self, caller: Caller, fingerprint: bytes, session_id: str, expected_revision: int, turn: SessionAppend
    ) -> StoredSession:
        """Add a turn; revision 0 begins the session. Returns once it is on disk.

        Raises InvalidRequest, UnknownLayout, SessionNotFound, SessionChanged, SessionsFull, StorageFailed, IndexFull.
        """
        name = self._name(fingerprint, session_id)
        layout = self._index.layouts[name[0]]

        def change(now: Manifest | None) -> Manifest:
            if now is None and not expected_revision:
                self._check_room()
                return manifests.begun(session_id, name[0], layout, turn, self._clock.wall_ms())
            return manifests.appended(self._expected(name, now, expected_revision), layout, turn)

        after = await self._change(name, change)
        self._trace.appended(turn)
        return after

    async def truncate(
        self,
        caller: Caller,
        fingerprint: bytes,
        session_id: str,
        expected_revision: int,
        keep: Sequence[tuple[int, int]],
    ) -> StoredSession:
        """Keep only these token ranges, (first, count) each. Raises as `append`."""
        name = self._name(fingerprint, session_id)
        return await self._change(
            name, lambda now: manifests.truncated(self._expected(name, now, expected_revision), keep)
        )

    async def fork(
        self, caller: Caller, fingerprint: bytes, session_id: str, new_id: str, expected_revision: int
    ) -> StoredSession:
        """A copy under `new_id`. `expected_revision` 0 accepts any revision. Raises as `append`."""
        name, new_name = self._name(fingerprint, session_id), self._name(fingerprint, new_id, "new_session_id")
        if name == new_name:
            raise InvalidRequest("new_session_id is the session's own id", field="new_session_id")

        def change(taken: Manifest | None) -> Manifest:
            source = self._found(name)
            if expected_revision:
                source = self._expected(name, source, expected_revision)
            if taken is not None:
                raise self._changed(taken, f"there is a session {new_id!r} already")
            self._check_room()
            return manifests.forked(source, new_id, self._clock.wall_ms())

        return await self._change(new_name, change)

    async def restore(
        self, caller: Caller, fingerprint: bytes, session_id: str, expected_revision: int, content: SessionContent
    ) -> tuple[StoredSession, bool]:
        """Store a session of another daemon; revision 0 if there is none here. Raises as `append`.

        Returns whether that changed anything: a session that has this content already stays as it is.
        """
        name = self._name(fingerprint, session_id)
        layout, is_new = self._index.layouts[name[0]], True

        def change(now: Manifest | None) -> Manifest:
            nonlocal is_new
            after = manifests.restored(session_id, name[0], layout, content, self._clock.wall_ms())
            if now is not None and manifests.is_same_history(now, after):
                is_new = False
                return now
            if now is None and not expected_revision:
                self._check_room()
            else:
                self._expected(name, now, expected_revision)
            return after

        return await self._change(name, change), is_new

    async def end(self, caller: Caller, fingerprint: bytes, session_id: str) -> bool:
        """Delete a session. False if there was none."""
        name = self._name(fingerprint, session_id)

        async def work() -> bool:
            async with self._lock(name):
                was_there = self._current(name) is not None
                if name in self._manifests:
                    await self._index.delete_sessions([self._manifests[name].name])
                    self._forget([name], Reason.DISCARDED if was_there else Reason.EXPIRED)
                    self._note_gone(name, "was ended" if was_there else "expired")
                return was_there

        return await self._shielded(work(), "end of a session")

    # Inside

    def _note_gone(self, name: Name, why: str) -> None:
        self._gone.pop(name[1], None)
        self._gone[name[1]] = self._clock.wall_ms(), why
        if len(self._gone) > _GONE_MAX:
            del self._gone[next(iter(self._gone))]

    async def _change(self, name: Name, change: Callable[[Manifest | None], Manifest]) -> StoredSession:
        """Replace a session by the result of `change`, on disk first. If that fails, the session is unchanged."""

        async def work() -> Manifest:
            async with self._lock(name):
                before = self._current(name)
                after = change(before)
                if after is before:
                    return self._use(name, after)
                if len(after.slices) > self.limits.slices_max:
                    raise SessionsFull(
                        f"the session would have {len(after.slices)} slices; at most {self.limits.slices_max} are "
                        "allowed: keep less of it, in fewer ranges"
                    )
                if len(after.positions) > POSITIONS_MAX:
                    raise SessionsFull(f"a session may list {POSITIONS_MAX} positions, not {len(after.positions)}")
                after = self._used(after, after.used_at_ms if before is None else self._clock.wall_ms())
                await self._put(name, after)
                return after

        return self.stored(await self._shielded(work(), "change of a session"))

    async def _shielded(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """Run a change to its end, also if its caller is cancelled, so that memory and disk stay equal."""
        return await asyncio.shield(self._tasks.start_quietly(work, what))

    async def _put(self, name: Name, after: Manifest) -> None:
        """Disk first, then memory. Blocks that `after` names count as named from now on, so that they are not
        dropped.
        """
        before = self._manifests.get(name)
        self._partial_blocks.add(after)
        is_new = self._current(name) is None
        self._arriving += is_new
        try:
            await self._index.put_session(after)
        except BaseException:
            self._partial_blocks.forget(after)
            raise
        finally:
            self._arriving -= is_new
        self._counters.sessions_begun += after.revision == 1
        self._install(name, after)
        self._touched.pop(name, None)
        if before is not None:
            self._partial_blocks.drop([before], Reason.DISCARDED)

    def _install(self, name: Name, manifest: Manifest) -> None:
        self.changes += 1
        self._manifests.pop(name, None)  # It moves to the end: it expires last.
        self._manifests[name] = manifest
        if name not in self._serials:
            self._serials[name] = self._next_serial
            self._next_serial += 1

    def _forget(self, names: Sequence[Name], why: Reason) -> None:
        """Delete sessions whose records are deleted."""
        self.changes += 1
        gone = []
        for name in names:
            gone.append(self._manifests.pop(name))
            del self._serials[name]
            self._touched.pop(name, None)
        self._partial_blocks.drop(gone, why)

    # Time

    async def expire(self) -> None:
        """Delete expired sessions."""
        while over := list(islice(self._expired(), _EXPIRED_AT_A_TIME)):
            locks = [self._lock(name) for name in over]
            for lock in locks:
                await lock.acquire()
            try:
                still = [name for name in over if name in self._manifests and self._current(name) is None]
                await self._index.delete_sessions([self._manifests[name].name for name in still])
                self._forget(still, Reason.EXPIRED)
                for name in still:
                    self._note_gone(name, "expired")
                self._counters.sessions_expired += len(still)
            finally:
                for lock in locks:
                    lock.release()

    def _expired(self) -> Iterator[Name]:
        for name in self._manifests:
            if self._current(name) is not None:
                return
            yield name

    async def flush(self) -> None:
        """Write the times of sessions that were used since the last write."""
        while names := list(islice(self._touched, _FLUSHED_AT_A_TIME)):
            written = {name: self._manifests[name] for name in names}
            for name in names:
                del self._touched[name]
            try:
                await asyncio.gather(*map(self._write_times, names, written.values()))
            except KVError:
                self._touched.update(dict.fromkeys(name for name in names if name in self._manifests))
                raise

    async def _write_times(self, name: Name, manifest: Manifest) -> None:
        async with self._lock(name):
            now = self._manifests.get(name)
            if now is not None and now.revision == manifest.revision:
                await self._index.put_session(now)

    async def _tick_forever(self) -> None:
        passed_s = 0.0
        while True:
            await self._clock.sleep(_TICK_S)
            passed_s += _TICK_S
            try:
                await self.expire()
                if passed_s >= self.limits.flush_s:
                    passed_s = 0.0
                    await self.flush()
            except KVError as error:
                log.warning("sessions could not be written: %s", error.message)

    def _use(self, name: Name, manifest: Manifest) -> Manifest:
        """Note a use of the session; it is written later."""
        manifest = self._used(manifest, self._clock.wall_ms())
        self._install(name, manifest)
        self._touched[name] = None
        return manifest

    def _used(self, manifest: Manifest, now_ms: int) -> Manifest:
        return dataclasses.replace(manifest, used_at_ms=now_ms, expires_at_ms=now_ms + round(self.limits.ttl_s * 1000))

    # Finding

    def _name(self, fingerprint: bytes, session_id: str, field: str = "session_id") -> Name:
        checked_session_id(session_id, field)
        return self._index.find_layout(fingerprint)[0], session_id

    def _current(self, name: Name) -> Manifest | None:
        manifest = self._manifests.get(name)
        return manifest if manifest is not None and manifest.expires_at_ms > self._clock.wall_ms() else None

    def _found(self, name: Name) -> Manifest:
        manifest = self._current(name)
        if manifest is None:
            raise SessionNotFound(
                f"there is no session {name[1]!r} of this layout: it was never begun, was ended, or has expired",
                session_id=name[1],
            )
        return manifest

    def _expected(self, name: Name, now: Manifest | None, expected_revision: int) -> Manifest:
        now = self._found(name) if now is None else now
        if now.revision != expected_revision:
            was = f"revision {expected_revision} was expected" if expected_revision else "it was to be begun"
            raise self._changed(now, f"the session {name[1]!r} is at revision {now.revision}; {was}")
        return now

    def _changed(self, now: Manifest, why: str) -> SessionChanged:
        self._counters.session_changes_refused += 1
        error = SessionChanged(why, session_id=now.session_id, revision=now.revision)
        error.now = self.stored(now)
        return error

    def _check_room(self) -> None:
        count = len(self._manifests) + self._arriving - sum(1 for _ in self._expired())
        if count >= self.limits.sessions_max:
            raise SessionsFull(f"there are {self.limits.sessions_max} sessions, the most that this daemon keeps")

    def _lock(self, name: Name) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _load(self) -> None:
        """The manifests in the index. Expiry times beyond the daemon's setting are reduced to it."""
        latest_ms = self._clock.wall_ms() + round(self.limits.ttl_s * 1000)
        found = [
            dataclasses.replace(manifest, expires_at_ms=min(manifest.expires_at_ms, latest_ms))
            for manifest in self._index.load_sessions()
        ]
        for manifest in sorted(found, key=lambda manifest: manifest.expires_at_ms):
            name = manifest.layout_id, manifest.session_id
            self._install(name, manifest)
            self._partial_blocks.add(manifest)
