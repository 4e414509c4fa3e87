"""Saves of blocks from an engine's pages: copied out while the pages are valid, and sent in the background.

Where the daemon can, it copies them out itself. Otherwise, on the daemon's host, blocks are copied straight into space
that the daemon reserved in shared memory. Elsewhere they are copied into staging, and sent from there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from kvservice_adapter.breaker import Breaker, answered
from kvservice_adapter.device.base import Computed, Device, Event, StreamClosed
from kvservice_adapter.engine.device_copies import NEXT_TRANSPORT
from kvservice_adapter.engine.metrics import reason_of
from kvservice_adapter.engine.page_loads import PagedLayers
from kvservice_adapter.engine.save_spans import SaveSpans
from kvservice_adapter.layer_source import COPIED_S
from kvservice_adapter.save import LayerSaver, OnDropped, SaveJob
from kvservice_api import spans
from kvservice_api.errors import DeadlineExceeded, KVError, NotShared
from kvservice_api.keys import BlockChain
from kvservice_client import BlockCache, Clock, Durability, SaveResult
from kvservice_client.device_memory import DeviceMemory, PageIds, SavePlace
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.transports.reservation import Reservation

log = logging.getLogger(__name__)

_JOB_SHARE = 4  # Of the staging, at most, for one job: what is gathered is sent while the rest is gathered.
_RESERVED_BLOCKS = 32  # In one call; the next ones are gathered while it is committed.
_SILENT_S = 1.0  # After a reservation without an answer in time.


class PageSave(NamedTuple):
    """Blocks of one sequence. The first begins at `first_token` of the sequence whose pages these are."""

    chain: BlockChain
    first_token: int
    page_ids: PageIds
    trace: spans.TraceContext | None = None  # Of its request.
    request_id: str = ""


class Gathering:
    """Blocks that are being copied out of an engine's pages."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.is_abandoned = False
        self.unanswered_s = 0.0  # How long it has waited for a reservation that the daemon did not answer in time.

    def wait(self, timeout_s: float) -> bool:
        """Block until the pages may be written again, at most that long.

        If it returns False, nothing of it that is not sent yet will be: the pages may be written all the same.
        """
        if not self._done.wait(timeout_s):
            self.is_abandoned = True
        return self._done.is_set()

    def end(self) -> None:
        self._done.set()


class PageSaver:
    """The saves of one worker. No method but `close` waits; any thread may call it."""

    def __init__(
        self,
        device: Device,
        blocks: BlockCache,
        layers: PagedLayers,
        breaker: Breaker,
        clock: Clock,
        *,
        staging_bytes: int,
        on_saved: Callable[[SaveResult], None] = lambda result: None,
        on_dropped: OnDropped = lambda reason, blocks: None,
        on_lost: Callable[[PageSave], None] = lambda save: None,
        memory: DeviceMemory | None = None,
    ) -> None:
        """`memory` are the pages, if the daemon may open them. `on_saved` is called on a thread of the saver's,
        `on_dropped` on any thread: why blocks are not stored. `on_lost` too is called on any thread: with blocks that
        the daemon may store if they are saved again, because staging was full, or the daemon did not answer.
        """
        self._device = device
        self._blocks, self._layers, self._breaker, self._clock = blocks, layers, breaker, clock
        self._on_saved, self._on_dropped, self._on_lost = on_saved, on_dropped, on_lost
        self._staged = LayerSaver(device, blocks, staging_bytes=staging_bytes, on_dropped=on_dropped)
        self._working = device.stream("kvservice-save-pages")
        self._gathering = device.stream("kvservice-gather-pages")
        self._committing = device.stream("kvservice-commit")
        self._lines = RateLimitedLog(log)
        self._is_shared = True
        self._memory = memory
        self._silent_until_s = 0.0
        self._job_blocks = max(1, staging_bytes // _JOB_SHARE // (layers.token_bytes * blocks.layout.block_tokens))

    @property
    def is_silent(self) -> bool:
        """Whether a reservation was not answered in time just now. Until later none is made, and saves are staged."""
        return self._clock.now_s() < self._silent_until_s

    def gather(self, saves: Sequence[PageSave], reserve_s: float) -> Gathering:
        """Begin to copy blocks out of the pages, and then to store them. To be called on the engine's thread: what its
        computing was given before is in the pages.

        `reserve_s` bounds the wait for a reservation; without an answer there is no second one. The pages must not
        change until the result's `wait` has returned.
        """
        gathering = Gathering()
        if not saves or not self._breaker.allow():
            self._not_asked(saves)
            gathering.end()
            return gathering
        try:
            self._working.submit(partial(self._work, saves, gathering, reserve_s, self._device.computed()))
        except StreamClosed:
            gathering.end()
        return gathering

    def close(self, timeout_s: float) -> None:
        """Take no more saves. Waits until those that were begun are answered, at most that long."""
        with suppress(StreamClosed):
            self._working.submit(lambda: None).wait(timeout_s)
        self._working.close()
        with suppress(StreamClosed):
            self._committing.submit(lambda: None).wait(timeout_s)
        for stream in (self._gathering, self._committing):
            stream.close()
        self._staged.flush(timeout_s)
        self._staged.close()

    # On the working stream's thread

    def _work(self, saves: Sequence[PageSave], gathering: Gathering, reserve_s: float, computed: Computed) -> None:
        try:
            for part in _parts(saves):
                if gathering.is_abandoned:
                    return
                self._save(part, gathering, reserve_s, computed)
        finally:
            gathering.end()

    def _save(self, part: Sequence[PageSave], gathering: Gathering, reserve_s: float, computed: Computed) -> None:
        try:
            if self._is_saved_by_daemon(part, gathering, reserve_s, computed):
                return
            self._gathering.after(computed)
            reserved = self._reserved(part, gathering, reserve_s) if self._may_reserve else None
            if reserved is not None:
                self._write(part, reserved, gathering)
            elif self._breaker.allow():
                for save in part:
                    with spans.within(save.trace):
                        self._stage(save, gathering, computed)
            else:
                self._not_asked(part)
        except Exception as error:
            self._on_dropped(reason_of(error), sum(len(save.chain) for save in part))
            self._lines.warning("blocks are not saved: %s: %s", type(error).__name__, error, kind=type(error).__name__)

    def _is_saved_by_daemon(
        self, saves: Sequence[PageSave], gathering: Gathering, answer_s: float, computed: Computed
    ) -> bool:
        """Have the daemon copy blocks out of the pages, if it can. False if they are to be saved in another way."""
        memory = self._memory
        if memory is None or not self._may_ask or not memory.is_ready:
            return False
        if not computed.wait(COPIED_S):
            return False
        places = [(save.chain, SavePlace(save.first_token, save.page_ids)) for save in saves]
        began_s, saving, span = self._clock.now_s(), None, _span_of(saves)
        try:
            with _within(span):
                saving = memory.save(places, Durability.DRAM, answer_s=answer_s)
                saving.gather()
            if not gathering.is_abandoned:
                blocks = sum(len(save.chain) for save in saves)
                self._committing.submit(partial(self._commit, _Copied(saving.commit, saves, blocks, span)))
                return True
        except Exception as error:
            _end(span, error)
            if saving is not None:
                saving.close()
            if not isinstance(error, KVError):
                raise
            if isinstance(error, NEXT_TRANSPORT):
                memory.fell_back(error)
            else:
                self._not_reserved(error, began_s, gathering)
            return False
        saving.close()  # The pages may have changed meanwhile.
        _end(span, _TooLate())
        return True

    def _reserved(self, saves: Sequence[PageSave], gathering: Gathering, reserve_s: float) -> _Reserved | None:
        began_s, chains = self._clock.now_s(), [save.chain for save in saves]
        span = _span_of(saves)
        try:
            with _within(span):
                return _Reserved(self._blocks.reserve(chains, timeout_s=reserve_s), span)
        except Exception as error:
            _end(span, error)
            if not isinstance(error, KVError):
                raise
            if isinstance(error, NotShared):
                log.info("blocks are saved by a copy, not in place: %s", error.message)
                self._is_shared = False
            else:
                self._not_reserved(error, began_s, gathering)
        return None

    def _not_reserved(self, error: KVError, began_s: float, gathering: Gathering) -> None:
        if isinstance(error, DeadlineExceeded):  # Or another engine is saving the same blocks: no failure then.
            now_s = self._clock.now_s()
            gathering.unanswered_s, self._silent_until_s = now_s - began_s, now_s + _SILENT_S
        else:
            self._breaker.record(answered(error))
        self._lines.info("blocks are saved by a copy, not in place: %s", error.message, kind=str(error.reason))

    @property
    def _may_ask(self) -> bool:
        return self._breaker.allow() and not self.is_silent

    @property
    def _may_reserve(self) -> bool:
        return self._is_shared and self._may_ask

    def _write(self, saves: Sequence[PageSave], reserved: _Reserved, gathering: Gathering) -> None:
        """Copy the reserved blocks to their places. Each slice is sealed while the processor's cache has it."""
        reservation, span = reserved
        try:
            runs = list(_runs(saves, reservation.blocks))
            written = []
            for layer in range(self._blocks.shard.layers):
                slices = reservation.slices(layer)
                for run in runs:
                    pages = self._layers.pages(layer, run.page_ids, run.first_token)
                    into = slices[run.begin : run.begin + len(run.token_counts)]
                    seal = partial(_seal, reservation, layer, run.begin)
                    written.append(self._gathering.gather(pages, run.token_counts, into, seal))
            _finish(written)
            if gathering.is_abandoned:
                _end(span, _TooLate())
                return
            if span is not None:
                span.copied(reservation)
            copied = _Copied(reservation.commit, saves, len(reservation.blocks), span)
            self._committing.submit(partial(self._commit, copied))
        except Exception as error:
            _end(span, error)
            raise

    def _stage(self, save: PageSave, gathering: Gathering, computed: Computed) -> None:
        first_token = save.first_token
        for first in range(0, len(save.chain), self._job_blocks):
            part = save.chain[first : first + self._job_blocks]
            job = self._staged.begin(part)
            if job is None:
                self._on_lost(save._replace(chain=save.chain[first:], first_token=first_token))
                return
            self._gather_job(job, save.page_ids, first_token, computed)
            if gathering.is_abandoned:
                job.abandon()
                return
            job.commit(on_done=partial(self._done, [save._replace(chain=part, first_token=first_token)]))
            first_token += part.token_count

    def _gather_job(self, job: SaveJob, page_ids: PageIds, first_token: int, computed: Computed) -> None:
        layers = range(self._blocks.shard.layers)
        _finish([job.layer(layer, self._layers.pages(layer, page_ids, first_token), computed) for layer in layers])

    # On the threads that send

    def _commit(self, copied: _Copied) -> None:
        span = copied.span
        try:
            with _within(span):
                results = copied.commit()
        except Exception as error:
            _end(span, error)
            self._on_dropped(reason_of(error), copied.blocks)
            self._done(copied.saves, error)
            return
        if span is not None:
            span.stored(results)
        for result in results:
            for _, refusal in result.refused:
                self._on_dropped(refusal.reason, 1)
            self._done((), result)

    def _not_asked(self, saves: Sequence[PageSave]) -> None:
        """The daemon did not answer lately. On any thread."""
        if saves:
            self._on_dropped("BREAKER_OPEN", sum(len(save.chain) for save in saves))
        for save in saves:
            self._on_lost(save)

    def _done(self, saves: Sequence[PageSave], outcome: SaveResult | Exception) -> None:
        is_answered = answered(outcome if isinstance(outcome, KVError) else None)
        self._breaker.record(is_answered)
        for save in () if is_answered else saves:
            self._on_lost(save)
        if isinstance(outcome, SaveResult):
            self._on_saved(outcome)
        else:
            kind = type(outcome).__name__
            self._lines.warning("blocks were not saved: %s: %s", kind, outcome, kind=kind)


class _Reserved(NamedTuple):
    reservation: Reservation
    span: SaveSpans | None  # From the reservation to the commit; None if no request is traced.


class _Copied(NamedTuple):
    """Blocks that were copied out of the pages, and are to be made visible."""

    commit: Callable[[], list[SaveResult]]
    saves: Sequence[PageSave]
    blocks: int  # Of them, those that were not stored.
    span: SaveSpans | None


class _TooLate(TimeoutError):
    """Why a span of a save ends."""

    def __init__(self) -> None:
        super().__init__("the pages were needed before all was copied")


def _span_of(saves: Sequence[PageSave]) -> SaveSpans | None:
    if all(save.trace is None for save in saves):
        return None
    return SaveSpans([(len(save.chain), save.trace) for save in saves])


def _within(span: SaveSpans | None) -> AbstractContextManager[None]:
    return spans.within(None if span is None else span.context)


def _end(span: SaveSpans | None, error: Exception) -> None:
    if span is not None:
        span.end(error)


def _seal(reservation: Reservation, layer: int, begin: int, block: int) -> None:
    """Seal a block of a run, whose slices begin at `begin`."""
    reservation.seal(layer, begin + block)


class _Run(NamedTuple):
    """Consecutive blocks of one sequence, which are consecutive in the reservation too."""

    page_ids: PageIds
    first_token: int
    token_counts: Sequence[int]
    begin: int  # Of its slices, among those of all reserved blocks.


def _runs(saves: Sequence[PageSave], blocks: Sequence[tuple[int, int]]) -> Iterator[_Run]:
    """The reserved blocks, in runs. `blocks` are (position of the save, position of the block in its chain)."""
    begin = 0
    while begin < len(blocks):
        number, block = blocks[begin]
        end = begin + 1
        while end < len(blocks) and blocks[end] == (number, block + end - begin):
            end += 1
        save = saves[number]
        starts = list(accumulate(save.chain.token_counts, initial=save.first_token))
        counts = save.chain.token_counts[block : block + end - begin]
        yield _Run(save.page_ids, starts[block], counts, begin)
        begin = end


def _parts(saves: Sequence[PageSave]) -> Iterator[list[PageSave]]:
    """The saves, in lists of at most `_RESERVED_BLOCKS` blocks."""
    part: list[PageSave] = []
    space = _RESERVED_BLOCKS
    for save in saves:
        chain, first_token = save.chain, save.first_token
        while len(chain):
            some = chain[:space]
            part.append(save._replace(chain=some, first_token=first_token))
            space -= len(some)
            first_token += some.token_count
            chain = chain[len(some) :]
            if not space:
                yield part
                part, space = [], _RESERVED_BLOCKS
    if part:
        yield part


def _finish(events: Sequence[Event]) -> None:
    """Wait until everything is copied. Raises what a copy raised."""
    for event in events:
        if not event.wait(COPIED_S):
            raise TimeoutError("the copies out of the engine's pages are not done in time")
        if event.error is not None:
            raise event.error
