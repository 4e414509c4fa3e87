"""Counts what lookups found, and why they found no more: for the metrics. Once per lookup, on the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvservice.blocks import BlockTable, Rows
from kvservice.counters import Counters
from kvservice.store.operations.explain import Explain
from kvservice.store.operations.requests import first_miss
from kvservice.store.prefix_match import Run
from kvservice_api import spans
from kvservice_api.layout import Layout


class LookupCounts:
    def __init__(
        self,
        blocks: BlockTable,
        layouts: Mapping[int, Layout],
        explain: Explain,
        counters: Counters,
    ) -> None:
        self._blocks = blocks
        self._layouts = layouts
        self._explain = explain
        self._counters = counters

    def note(self, layout_id: int, keys: Sequence[bytes], rows: Rows, runs: Sequence[Run], took_s: float) -> None:
        """A lookup of `keys` took `took_s` seconds and found `rows`, in the tiers that `runs` say."""
        counters, blocks = self._counters, self._blocks
        counters.lookup_blocks_asked += len(keys)
        counters.lookup_blocks_hit += len(rows)
        counters.asked_blocks[layout_id] += len(keys)
        if len(rows):
            full = (len(rows) - 1) * self._layouts[layout_id].block_tokens  # Only the last block may be partial.
            counters.hit_tokens[layout_id] += full + int(blocks.token_count[rows[-1]])
            in_first = sum(count for count, is_in_first, _ in runs if is_in_first)
            counters.hit_blocks[layout_id, blocks.first_tier] += in_first
            if in_first < len(rows):
                for tier, count in zip(blocks.tiers[1:], blocks.count_by_fastest(rows)[1:], strict=True):
                    counters.hit_blocks[layout_id, tier] += count
        reason = None
        if miss := first_miss(blocks, self._layouts, layout_id, keys, len(rows)):
            reason = self._explain.why_missed(miss)[0].name.lower()
            counters.misses[layout_id, reason] += 1
        counters.lookup_times.observe(took_s)
        if (trace := spans.current()) is not None:
            hits = zip(blocks.tiers, blocks.count_by_fastest(rows), strict=True)
            by_tier = {f"hit_blocks.{tier}": count for tier, count in hits if count}
            found = {"blocks": len(keys), "hit_blocks": len(rows), "miss_reason": reason, **by_tier}
            spans.record("kvservice.store.lookup", took_s, trace, **found)
