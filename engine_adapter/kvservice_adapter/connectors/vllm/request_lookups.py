"""Lookups of the requests that vLLM queues: begun when a request arrives, answered when vLLM asks."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from kvservice_adapter.breaker import Breaker, answered
from kvservice_adapter.connectors.vllm.request_progress import RequestProgress
from kvservice_adapter.connectors.vllm.settings import ConnectorSettings
from kvservice_adapter.engine.prefix_lookup import tier_of
from kvservice_api import spans
from kvservice_api.errors import DeadlineExceeded, KVError
from kvservice_api.keys import ChainBuilder
from kvservice_client import FoundPrefix, Outcome, PendingLookup
from kvservice_client.background import THREADS_MAX
from kvservice_client.block_cache import BlockCache
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import Clock

log = logging.getLogger(__name__)


class LookedUpRequest(Protocol):
    """What a lookup needs to know of a request, and changes."""

    request: Any
    builder: ChainBuilder
    session_id: str
    progress: RequestProgress
    lookup: PendingLookup | None
    found: FoundPrefix | None
    asked_at_s: float
    looked_up_at_s: float
    tier: str
    is_answered: bool
    saved_tokens: int


class RequestLookups:
    """The lookups of a scheduler. All methods are called on its thread, and none waits for the daemon."""

    def __init__(
        self,
        blocks: BlockCache,
        breaker: Breaker,
        clock: Clock,
        settings: ConnectorSettings,
        workers: int,
        count: Callable[[str], None],
    ) -> None:
        """`workers` may adopt the ticket of each hit. `count` is called with the name of a counter."""
        self._blocks, self._breaker, self._clock, self._settings = blocks, breaker, clock, settings
        self._workers, self._count = workers, count
        self._late: list[PendingLookup] = []  # They still run, and no request waits for them.
        self._begun: deque[PendingLookup] = deque()  # Without the first ones, if they have ended.
        self._answered_at_s = 0.0  # When the daemon's last answer was seen.
        self._lines = RateLimitedLog(log)

    def begin(self, state: LookedUpRequest, *, is_daemon_away: bool) -> None:
        """Begin to look up the request's prefix, unless it is known to have none, or the daemon does not answer."""
        state.looked_up_at_s, state.asked_at_s, state.is_answered = self._clock.now_s(), 0.0, False
        state.saved_tokens = 0  # Blocks that are not found may have been removed: if they are computed, they are saved.
        state.progress.begins()
        if not self._breaker.allow() or is_daemon_away:
            state.is_answered = True
            state.progress.ends_as(Outcome.BREAKER_OPEN)
            return
        self._count("lookups")
        local = self._blocks.peek(state.builder)
        if local is not None and not local.blocks and local.may_have_tail is False:
            state.is_answered = True
            state.progress.looked_up(self._clock.now_s())
            return
        while self._begun and self._begun[0].wait(0.0):
            self._begun.popleft()
        turns = 1 + len(self._begun) / THREADS_MAX  # Of a burst, each lookup has its time after those before it.
        with spans.within(spans.of_headers(state.request.trace_headers)):
            state.lookup = self._blocks.begin_lookup(
                state.builder,
                self._settings.ticket_s,
                self._settings.lookup_wait_s * 5 * turns,
                request_id=state.progress.request_id,
                session_id=state.session_id,
                adoptions=self._workers,
                ticket_ttl_s=self._settings.ticket_s,
            )
        self._begun.append(state.lookup)

    def poll(self, state: LookedUpRequest) -> bool:
        """Take the answer. False if there is none yet, and the time to wait for it is not over.

        That time begins again with each answer to another lookup: the daemon answers one after another.
        """
        now_s, lookup = self._clock.now_s(), state.lookup
        assert lookup is not None
        state.asked_at_s = state.asked_at_s or now_s
        answer = self._answer_of(lookup)
        if answer is None:
            if now_s - max(state.asked_at_s, self._answered_at_s) < self._settings.lookup_wait_s:
                time.sleep(0)  # vLLM asks again at once. Without this its thread would keep the interpreter's lock.
                return False
            self._count("late_lookups")
            self._late.append(lookup)
            state.lookup = None
            answer = DeadlineExceeded(f"the lookup had no answer in {self._settings.lookup_wait_s:g} s")
        state.is_answered = True
        state.progress.looked_up(now_s)
        if isinstance(answer, KVError):
            state.progress.ends_as(Outcome.FAILED_OVER, f"{answer.reason}: {answer.message}")
        elif answer.ticket:
            state.found = answer
            state.tier = tier_of(answer.lease.residency)
            state.saved_tokens = max(state.saved_tokens, answer.lease.hit_tokens)
            state.progress.found(answer.lease.hit_tokens, state.tier)
            return True
        self.drop(state)
        return True

    def is_too_old(self, state: LookedUpRequest) -> bool:
        """Whether the ticket of what was found may end before the workers adopt it: the request waited for long in
        vLLM's queue, also before vLLM first asked, or the daemon was restarted.
        """
        assert state.found is not None
        remaining_s, half_s = state.found.lease.remaining_s, self._settings.ticket_s / 2
        return not remaining_s or (remaining_s < half_s < self._clock.now_s() - state.looked_up_at_s)

    def drop(self, state: LookedUpRequest, *, is_ticket_used: bool = False) -> None:
        """The answer is not used any more: its lease ends, and so does its ticket unless the workers get it."""
        if state.lookup is not None:
            state.lookup.cancel(with_ticket=not is_ticket_used)
        state.lookup = state.found = None

    def end_late(self) -> None:
        """End those that no request waits for any more. How they end says whether the daemon answers."""
        late, self._late = self._late, []
        for lookup in late:
            if self._answer_of(lookup) is None:
                self._late.append(lookup)
            else:
                lookup.cancel(with_ticket=True)

    def _answer_of(self, lookup: PendingLookup) -> FoundPrefix | KVError | None:
        """What a lookup has found, or how it failed. None while it runs."""
        try:
            found = lookup.poll()
        except KVError as error:
            self._breaker.record(answered(error))
            if answered(error):
                self._answered_at_s = self._clock.now_s()
            self._lines.warning("a request is computed: %s: %s", error.reason, error.message, kind=str(error.reason))
            return error
        if found is not None:
            self._breaker.record(True)
            self._answered_at_s = self._clock.now_s()
        return found
