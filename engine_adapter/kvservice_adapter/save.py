"""Asynchronous saves: the KV that the engine has computed is copied and sent while the engine computes on.

    job = saver.begin(chain)                    # None: there is no room for it now
    for layer in model:                         # in the engine's forward pass
        job.layer(layer, pages)                 # gathered on the write stream while the next layer computes
    job.commit()                                # sent from a thread of the saver's

Blocks wait for the sending thread in staging, whose size is bounded. If staging is full, a save is dropped and counted:
the engine never waits, and never sees an error of the daemon's.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

from kvservice_adapter.device.base import Computed, Device, Event, NotOrdered, Pages, StreamClosed
from kvservice_api import spans
from kvservice_api.errors import KVError
from kvservice_api.image import layer_starts
from kvservice_client import BlockCache, BlockChain, Durability, LayerGroup, SaveResult
from kvservice_client.buffers import Bytes
from kvservice_client.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

OnDone = Callable[["SaveResult | Exception"], None]
OnDropped = Callable[[str, int], None]  # Why blocks are not saved, and how many.


@dataclass(slots=True)
class SaverStats:
    """Counts since the saver was made. A save is one job; each ends as one of these."""

    saved: int = 0  # The daemon answered; single blocks may have been refused.
    dropped: int = 0  # Staging had no room.
    abandoned: int = 0  # By the engine.
    failed: int = 0  # The daemon could not be reached, or the copy failed.
    stored_blocks: int = 0
    already_stored_blocks: int = 0
    refused_blocks: int = 0
    dropped_blocks: int = 0
    failed_blocks: int = 0
    sent_bytes: int = 0  # Of the saves that were answered.


class LayerSaver:
    """Saves of one rank, one after another. Thread-safe. One thread gathers, another sends."""

    def __init__(
        self,
        device: Device,
        blocks: BlockCache,
        *,
        staging_bytes: int,
        on_dropped: OnDropped = lambda reason, blocks: None,
    ) -> None:
        """`on_dropped` is called on any thread, for saves without room, that failed, or that the daemon refused."""
        self._device = device
        self._blocks = blocks
        self._on_dropped = on_dropped
        self._staging = device.staging(staging_bytes)
        self._gathering = device.stream("kvservice-gather")
        self._sending = device.stream("kvservice-save")
        self._changed = threading.Condition()
        self._stats = SaverStats()
        self._jobs = 0  # That hold staging.
        self._ending = 0  # How many of them were committed or abandoned.
        self._closed = False
        self._lines = RateLimitedLog(log)

    @property
    def stats(self) -> SaverStats:
        with self._changed:
            return replace(self._stats)

    @property
    def staging_bytes(self) -> int:
        """The size of all staging: a save of more than this is always dropped."""
        return self._staging.size_bytes

    @property
    def staged_bytes(self) -> int:
        """Bytes of staging in use."""
        return self._staging.reserved_bytes

    def begin(self, chain: BlockChain) -> SaveJob | None:
        """Reserve staging for the blocks of a chain, of which only the last may be partial. Never waits.

        None where staging has no room, or the saver is closed: the save is dropped, and counted.
        """
        starts = layer_starts(self._blocks.layout, self._blocks.shard, chain.token_counts)
        ends = list(accumulate(of_layer[-1] for of_layer in starts))
        with self._changed:
            memory = None if self._closed else self._staging.reserve(ends[-1])
            if memory is None:
                self._count(dropped=1, dropped_blocks=len(chain))
                self._on_dropped("STAGING_FULL", len(chain))
                return None
            self._jobs += 1
        layers = [memory[start:end] for start, end in pairwise([0, *ends])]
        return SaveJob(self, chain, memory, layers)

    def group_of(self, layer: int) -> LayerGroup:
        """The geometry of a layer, counted from the shard's first."""
        return self._blocks.layout.group_of(self._blocks.shard.layer_begin + layer)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all jobs that were committed or abandoned so far have ended. Returns whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._ending, timeout_s)

    def close(self) -> None:
        """Take no more saves. What was begun may still be committed, and is sent: `flush` waits for that."""
        with self._changed:
            self._closed = True
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._closed and not self._jobs:
            self._gathering.close()
            self._sending.close()

    # A job's way through the threads

    def _gather(self, pages: Pages, chain: BlockChain, into: Bytes, computed: Computed | None) -> Event:
        try:
            self._gathering.after(self._device.computed() if computed is None else computed)
        except NotOrdered as error:
            return self._gathering.submit(partial(_fail, error))
        return self._gathering.gather(pages, chain.token_counts, into)

    def _end(self, work: _Work) -> None:
        """A job is given no more layers: once those it has are gathered, it is sent, or its staging is free."""
        with self._changed:
            self._ending += 1
        with suppress(StreamClosed):  # Only when the interpreter ends.
            self._gathering.submit(lambda: self._gathered(work))

    def _gathered(self, work: _Work) -> None:
        """On the write stream: nothing writes into the job's staging any more."""
        error = next((event.error for event in work.events.values() if event.error is not None), None)
        if not work.is_committed:
            self._ended(work, None)
        elif error is not None:
            self._ended(work, error)
        else:
            self._sending.submit(lambda: self._send(work))

    def _send(self, work: _Work) -> None:
        try:
            with spans.within(work.trace):
                result = self._blocks.save(work.chain, work.layers, work.durability)
        except Exception as error:  # Counted and logged by `_ended`; the engine never sees it.
            self._ended(work, error)
        else:
            self._ended(work, result)

    def _ended(self, work: _Work, outcome: SaveResult | Exception | None) -> None:
        self._staging.release(work.memory)
        if isinstance(outcome, SaveResult):
            self._count(
                saved=1,
                stored_blocks=outcome.stored,
                already_stored_blocks=outcome.already_stored,
                refused_blocks=len(outcome.refused),
                sent_bytes=work.memory.size,
            )
            for _, error in outcome.refused:
                self._on_dropped(error.reason, 1)
        elif outcome is not None:
            reason = outcome.reason if isinstance(outcome, KVError) else type(outcome).__name__
            self._lines.warning(
                "a save of %d blocks failed: %s: %s", len(work.chain), reason, outcome, kind=str(reason)
            )
            self._count(failed=1, failed_blocks=len(work.chain))
            self._on_dropped(outcome.reason if isinstance(outcome, KVError) else "INTERNAL", len(work.chain))
        else:
            self._count(abandoned=1)
        if work.on_done is not None and outcome is not None:
            try:
                work.on_done(outcome)
            except Exception:  # A callback's error must not end the sending thread, nor leak its staging.
                log.exception("the on_done callback of a save failed")
        with self._changed:
            self._jobs -= 1
            self._ending -= 1
            self._close_if_idle()
            self._changed.notify_all()

    def _count(self, **more: int) -> None:
        with self._changed:
            for name, value in more.items():
                setattr(self._stats, name, getattr(self._stats, name) + value)


@dataclass(slots=True)
class _Work:
    """The part of a job that exists until its staging is free."""

    chain: BlockChain
    memory: Bytes  # Of the staging, which releases it at the end.
    layers: list[Bytes]  # The same memory, cut into layers.
    events: dict[int, Event]
    trace: spans.TraceContext | None  # Of the thread that began it.
    is_committed: bool = False
    durability: Durability = Durability.DRAM
    on_done: OnDone | None = None


class SaveJob:
    """One save: staging for some blocks of a chain. A job that is dropped is abandoned."""

    def __init__(self, saver: LayerSaver, chain: BlockChain, memory: Bytes, layers: list[Bytes]) -> None:
        self._saver = saver
        self._work = _Work(chain, memory, layers, {}, spans.current())
        self._abandon = weakref.finalize(self, saver._end, self._work)
        self._abandon.atexit = False

    @property
    def chain(self) -> BlockChain:
        return self._work.chain

    def layer(self, index: int, pages: Pages, computed: Computed | None = None) -> Event:
        """Have a layer gathered: the chain's tokens are in `pages`. Takes no time; each layer once.

        It is gathered once `computed` is; if that is None, what the engine's computing was given so far: call it on the
        engine's thread then.

        The job refers to the tensors until the event is done. An engine that writes into the same pages again
        must not do so before; one whose tensors stay as they are need not look at it. Raises ValueError where
        the pages have another element type or other head dims than the layer's group.
        """
        if index in self._work.events:
            raise ValueError(f"layer {index} was given before")
        pages.check(self._saver.group_of(index))
        event = self._saver._gather(pages, self._work.chain, self._work.layers[index], computed)
        self._work.events[index] = event
        return event

    def commit(self, durability: Durability = Durability.DRAM, on_done: OnDone | None = None) -> None:
        """All layers are given: send them. Waits for nothing.

        `on_done` is called on a thread of the saver's, with the daemon's answer or what went wrong. Raises
        ValueError where a layer is missing; the job is abandoned then.
        """
        work = self._work
        if not self._abandon.alive:
            raise ValueError("the job has ended")
        if len(work.events) != len(work.layers):
            self.abandon()
            raise ValueError(f"{len(work.events)} of {len(work.layers)} layers were given")
        work.durability, work.on_done = durability, on_done
        work.is_committed = True
        self._abandon()

    def abandon(self) -> None:
        """Forget the save; nothing of it is sent. Once it has ended, nothing happens."""
        self._abandon()


def _fail(error: Exception) -> None:
    raise error
