"""A lookup that runs on a thread of the client, while the caller does other work and polls for the result."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from kvservice_api import spans
from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, KVError, LeaseExpired
from kvservice_api.keys import BlockChain, ChainBuilder
from kvservice_client import arguments, forks
from kvservice_client.background import Background
from kvservice_client.lease import Lease
from kvservice_client.retry import Deadline

if TYPE_CHECKING:
    from kvservice_client.block_cache import BlockCache


class LookupOrder(NamedTuple):
    """What `BlockCache.begin_lookup` was asked for."""

    chain: BlockChain | ChainBuilder
    lease_ttl_s: float
    request_id: str
    session_id: str
    adoptions: int
    ticket_ttl_s: float
    trace: spans.TraceContext | None  # The caller's.


class FoundPrefix(NamedTuple):
    """The result of a lookup: the lease, and a ticket for it. Without `adoptions`, or without a hit, it is empty."""

    lease: Lease
    ticket: bytes


class PendingLookup:
    """A lookup that has begun. Made by `BlockCache.begin_lookup`. Thread-safe; only `wait` waits.

    The result belongs to the caller once `poll` has returned it. If the lookup is cancelled or dropped before that,
    its lease is released in the background, and its ticket is used up.
    It belongs to the process that made it: in a forked child, `poll` raises DaemonUnavailable.
    """

    def __init__(self, blocks: BlockCache, background: Background, order: LookupOrder, deadline: Deadline) -> None:
        self._blocks = blocks
        self._background = background
        self._order = order
        self._deadline = deadline
        self._generation = forks.generation
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        self._found: FoundPrefix | None = None
        self._is_taken = False
        self._error: Exception | None = None

    def begin(self) -> None:
        """Queue the lookup. The queue does not keep it alive: a dropped lookup does not run."""
        itself = weakref.ref(self)

        def run() -> None:
            if (pending := itself()) is not None:
                pending._run()

        self._background.submit(run)

    def poll(self) -> FoundPrefix | None:
        """The result, the same each time; None while the lookup runs. Does not wait.

        Raises the KVError that the lookup failed with; DeadlineExceeded once the time that `begin_lookup` allowed is
        over, also if no thread was free to run it; LeaseExpired after `cancel`.
        """
        self._check_process()
        if not self._has_ended.is_set():
            if self._deadline.remaining_s:
                return None
            self._give_up(self._late(), only_unfinished=True)
        with self._lock:
            if self._error is not None:
                raise self._error
            self._is_taken = True
            return self._found

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the lookup, at most `timeout_s`. Whether `poll` now returns its result, or raises."""
        arguments.seconds(timeout_s, "timeout_s")
        self._check_process()
        deadline = self._deadline
        return deadline.clock.wait(self._has_ended, min(timeout_s, deadline.remaining_s)) or not deadline.remaining_s

    def cancel(self, *, with_ticket: bool = False) -> None:
        """The result is not wanted. Does not wait.

        The lease, if it was or will be granted, is released in the background, also if `poll` has returned it. A ticket
        that `poll` has returned stays valid, except `with_ticket`: then it is used up in the background.
        """
        if self._generation == forks.generation:
            self._give_up(LeaseExpired("this lookup was cancelled; begin another one"), with_ticket=with_ticket)

    def __del__(self) -> None:
        if self._found is not None and not self._is_taken:
            self.cancel()

    def _run(self) -> None:
        """Look up, on a thread of the client."""
        try:
            if self._has_ended.is_set():
                return
            if not self._deadline.remaining_s:
                raise self._late()
            with spans.within(self._order.trace):
                found = self._look_up()
        except Exception as error:
            self._give_up(error)
            return
        with self._lock:
            is_wanted = self._error is None
            if is_wanted:
                self._found = found
                self._has_ended.set()
        if not is_wanted:
            _release(self._blocks, found, self._order.adoptions)

    def _look_up(self) -> FoundPrefix:
        order, deadline = self._order, self._deadline
        names = {"request_id": order.request_id, "session_id": order.session_id}
        lease = self._blocks.lookup(order.chain, order.lease_ttl_s, deadline.remaining_s, **names)
        if not order.adoptions or not lease.hit_blocks or self._has_ended.is_set():
            return FoundPrefix(lease, b"")
        try:
            return FoundPrefix(lease, lease.export(order.ticket_ttl_s, order.adoptions, deadline.remaining_s))
        except BaseException:
            lease.release()
            raise

    def _give_up(self, error: Exception, *, only_unfinished: bool = False, with_ticket: bool = False) -> None:
        """Let `poll` raise the error, and release what was found."""
        with self._lock:
            if self._error is not None or (only_unfinished and self._has_ended.is_set()):
                return
            found, self._found = self._found, None
            self._error = error
            self._has_ended.set()
        if found is not None:
            adoptions = 0 if self._is_taken and not with_ticket else self._order.adoptions
            self._background.submit(partial(_release, self._blocks, found, adoptions))

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the {self._deadline.allowed_s:.3g} s allowed for this lookup have passed")

    def _check_process(self) -> None:
        if self._generation != forks.generation:
            raise DaemonUnavailable("this lookup was begun before fork(), in the parent: begin it again here")


def _release(blocks: BlockCache, found: FoundPrefix, adoptions: int) -> None:
    """Release the lease. The ticket holds the blocks too, until it has been adopted so many times."""
    found.lease.release()
    if found.ticket:
        with suppress(KVError):
            for _ in range(adoptions):
                blocks.adopt(found.ticket).release()
