"""Saves of blocks from an engine's pages: gathered while the pages are valid, sent in the background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvservice_adapter.breaker import Breaker, answered
from kvservice_adapter.device.base import Event
from kvservice_adapter.engine.page_loads import PagedLayers
from kvservice_adapter.save import LayerSaver
from kvservice_api.errors import KVError
from kvservice_api.keys import BlockChain
from kvservice_client import BlockCache, SaveResult

_JOB_SHARE = 4  # Of the staging, at most, for one job: what is gathered is sent while the rest is gathered.


@dataclass(frozen=True, slots=True)
class Gathering:
    """Blocks of one sequence that are being copied out of its pages."""

    events: Sequence[Event]
    dropped_from: int | None  # The first token of the blocks for which staging had no room.

    def wait(self, timeout_s: float) -> bool:
        """Block until the pages may be written again, at most that long. Returns whether they may."""
        return all(event.wait(timeout_s) for event in self.events)


class PageSaver:
    """The saves of one worker. `gather` is for the engine's thread, the rest for any."""

    def __init__(self, saver: LayerSaver, blocks: BlockCache, layers: PagedLayers, breaker: Breaker) -> None:
        self._saver = saver
        self._blocks = blocks
        self._layers = layers
        self._breaker = breaker
        token_bytes = sum(layers.pages(layer, (0,)).token_bytes for layer in range(blocks.shard.layers))
        block_bytes = token_bytes * blocks.layout.block_tokens
        self._job_blocks = max(1, saver.staging_bytes // _JOB_SHARE // block_bytes)

    def gather(self, chain: BlockChain, first_token: int, page_ids: Sequence[int]) -> Gathering:
        """Begin to copy a chain's blocks out of the pages, and to send them. Waits for nothing.

        The chain's first block begins at `first_token` of the sequence whose pages these are. The pages must not
        change until the result's events are done.
        """
        if not self._breaker.allow():
            return Gathering((), None)
        events: list[Event] = []
        for first in range(0, len(chain), self._job_blocks):
            part = chain[first : first + self._job_blocks]
            job = self._saver.begin(part)
            if job is None:
                return Gathering(events, first_token)
            events += [
                job.layer(layer, self._layers.pages(layer, page_ids, first_token))
                for layer in range(self._blocks.shard.layers)
            ]
            job.commit(on_done=self._done)
            first_token += part.token_count
        return Gathering(events, None)

    def close(self, timeout_s: float) -> None:
        """Take no more saves. Waits until those that were begun are answered, at most that long."""
        self._saver.flush(timeout_s)
        self._saver.close()

    def _done(self, outcome: SaveResult | Exception) -> None:
        """On a thread of the saver's."""
        self._breaker.record(answered(outcome if isinstance(outcome, KVError) else None))
