"""The saves of what one forward computes: blocks are begun before it, given layer by layer, and sent when it has ended.

An engine's connector says which blocks a forward completes, and where their tokens are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from kvservice_adapter.breaker import Breaker, answered
from kvservice_adapter.device.base import Pages
from kvservice_adapter.save import LayerSaver, SaveJob
from kvservice_api.errors import KVError
from kvservice_api.keys import BlockChain
from kvservice_client import SaveResult

_JOB_SHARE = 4  # Of the staging, at most, for one save: a long prefill is sent in several.

Place = TypeVar("Place")


class ForwardSaves(Generic[Place]):
    """The saves of one cache, whose forwards run one after another. A `Place` is where a token is, in the engine's
    terms.

    `wait` and `take_stored` may be called from any thread, the rest from the engine's; only `wait` waits.
    """

    def __init__(self, saver: LayerSaver, breaker: Breaker) -> None:
        self._saver = saver
        self._breaker = breaker
        self._jobs: list[tuple[SaveJob, Place]] = []
        self._changed = threading.Condition()
        self._unanswered = 0
        self._stored: set[bytes] = set()

    @property
    def is_any_open(self) -> bool:
        return bool(self._jobs)

    def open(self, chain: BlockChain, block_bytes: int, place_of_block: Callable[[int], Place]) -> None:
        """Begin to save whole blocks of `block_bytes` bytes. Where staging is full, the rest of them is left out."""
        if not self._breaker.allow():
            return
        per_job = max(1, self._saver.staging_bytes // _JOB_SHARE // block_bytes)
        for first in range(0, len(chain), per_job):
            job = self._saver.begin(chain[first : first + per_job])
            if job is None:  # The end of the turn saves what is left.
                return
            self._jobs.append((job, place_of_block(first)))

    def layer(self, index: int, pages_at: Callable[[Place], Pages]) -> None:
        """A layer is computed, or its computing is queued on the engine's stream: `pages_at` gives the pages of a
        place.

        The arrays must stay as they are until they are gathered.
        """
        for job, place in self._jobs:
            job.layer(index, pages_at(place))

    def commit(self) -> bool:
        """The forward has ended: send its blocks. False if a layer was not given: nothing of it is stored then."""
        jobs, self._jobs = self._jobs, []
        is_whole = True
        for job, _ in jobs:
            with self._changed:
                self._unanswered += 1
            try:
                job.commit(on_done=partial(self._done, job.chain.keys))
            except ValueError as error:
                self._done((), error)
                is_whole = False
        return is_whole

    def abandon(self) -> None:
        """Abandon all saves that are not committed."""
        for job, _ in self._jobs:
            job.abandon()
        self._jobs = []

    def wait(self, timeout_s: float) -> bool:
        """Block until all sent saves are answered, at most `timeout_s`. Returns whether they are answered."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unanswered, timeout_s)

    def take_stored(self, chain: BlockChain) -> int:
        """How many blocks of a chain were stored since the last call."""
        with self._changed:
            found = self._stored.intersection(chain.keys)
            self._stored -= found
        return len(found)

    def _done(self, keys: Sequence[bytes], outcome: SaveResult | Exception) -> None:
        """On a thread of the saver's."""
        self._breaker.record(answered(outcome if isinstance(outcome, KVError) else None))
        with self._changed:
            if isinstance(outcome, SaveResult):
                refused = {block for block, _ in outcome.refused}
                kept = [key for block, key in enumerate(keys) if block not in refused]
                if outcome.stored:
                    self._stored.update(kept[len(kept) - outcome.stored :])
            self._unanswered -= 1
            self._changed.notify_all()
