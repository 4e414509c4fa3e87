"""Items are the edges of the tree of stored prefixes, in any order in which blocks come and leave."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvservice.blocks import NO_ROW, BlockTable, Extent, Rows, TierName
from kvservice.placement.block_events import BlockEvents
from kvservice.placement.block_items import BlockItems
from kvservice.policy import PLACEMENTS
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.foresight import ForesightPolicy
from kvservice.policy.items import Conditions, ItemTable
from kvservice.policy.lru import LruPolicy
from kvservice.policy.placement import Placement
from kvservice_api.keys import block_chain
from kvservice_api.layout import Layout, Shard

LAYOUT = Layout("items", "float32", layers=1, kv_heads=2, k_head_dim=8, v_head_dim=8, block_tokens=4)
WHOLE = Shard.whole(LAYOUT)
SIZE = 512
TIERS = (TierName.DRAM, TierName.SSD)
GIB = 2**30


class Store:
    """A block table and its items. Time is a number that a test sets."""

    def __init__(self, name: str = "lru", policy: Placement | None = None) -> None:
        self.now_s = 1000.0
        self.blocks = BlockTable(8)
        self.events = BlockEvents(self.blocks, lambda layout_id: 4, lambda: self.now_s)
        self._items = BlockItems(policy or PLACEMENTS[name](), Conditions(GIB, GIB, 1e9))

    @property
    def items(self) -> BlockItems:
        """The items, after all events so far."""
        for note in self.events.take():
            note(self._items)
        return self._items

    def use(self, rows: Sequence[int]) -> None:
        """A request looks the blocks up, and ends."""
        held = np.array(rows)
        self.events.looked_up(held)
        self.events.leased(held)
        self.events.released(held)

    def save(self, tokens: Sequence[int], shard: Shard = WHOLE) -> list[int]:
        """Store a prefix, with its partial block. Returns its rows."""
        blocks = self.blocks
        chain = block_chain(LAYOUT, tokens, with_partial=True)
        parents = [chain.parent, *chain.keys[:-1]]
        for key, parent, count in zip(chain.keys, parents, chain.token_counts, strict=True):
            if blocks.row_of(key, shard) != NO_ROW:
                continue
            row = blocks.add(
                key, shard, parent_key=parent, layout_id=1, tenant=0, token_count=count, size_bytes=SIZE,
                trailer_checksum=0, now_ms=0,
            )  # fmt: skip
            blocks.set_extent(row, TierName.DRAM, Extent(0, row * SIZE, SIZE))
            blocks.link(row)
        return [blocks.row_of(key, shard) for key in chain.keys]

    def discard(self, row: int) -> None:
        self.blocks.unlink(row)
        for tier in TIERS:
            self.blocks.set_extent(row, tier, None)
        self.blocks.free(row)

    def runs(self) -> set[tuple[int, ...]]:
        """The rows of each item."""
        return {tuple(self.items.rows_of(item).tolist()) for item in self.items.live_items().tolist()}


def test_a_conversation_is_one_item_and_grows() -> None:
    store = Store()
    store.save(range(10))
    rows = store.save(range(30))
    (item,) = store.items.live_items()
    assert set(rows) <= set(store.items.rows_of(item).tolist())  # And the partial block of the first turn.
    assert store.items.items.dram_bytes[item] == store.items.items.size_bytes[item] == 9 * SIZE


def test_conversations_share_the_item_of_their_prompt() -> None:
    store = Store()
    prompt = list(range(8))
    one, two = store.save([*prompt, *range(100, 108)]), store.save([*prompt, *range(200, 204)])
    three = store.save([*prompt, *range(300, 308)])
    assert store.runs() == {tuple(one[:2]), tuple(one[2:]), tuple(two[2:]), tuple(three[2:])}
    assert store.items.item_of(one[0]) not in {store.items.item_of(each[2]) for each in (one, two, three)}


def test_the_shards_of_a_block_are_in_its_item() -> None:
    store = Store()
    first, second = Shard(0, 1, 0, 1), Shard(0, 1, 1, 2)
    one, two = store.save(range(16), first), store.save(range(16), second)
    assert store.runs() == {tuple(row for pair in zip(one, two, strict=True) for row in pair)}


async def test_blocks_of_an_earlier_daemon_are_grouped() -> None:
    known = Store()
    prompt = list(range(12))
    for number in range(5):
        known.save([*prompt, *range(100 * number, 100 * number + 4 * number + 4)])
    listed = known.runs()
    events = BlockEvents(known.blocks, lambda layout_id: 4, lambda: 0.0)
    await events.fill(partial(asyncio.sleep, 0))
    items = BlockItems(PLACEMENTS["lru"](), Conditions(GIB, GIB, 1e9))
    for note in events.take():
        note(items)
    assert {tuple(items.rows_of(item).tolist()) for item in items.live_items()} == listed


async def test_a_block_whose_parent_is_saved_again_meanwhile_is_grouped() -> None:
    known = Store()
    known.discard(known.save(range(12))[0])
    known.blocks._free.clear()
    events = BlockEvents(known.blocks, lambda layout_id: 4, lambda: 0.0)
    begun = asyncio.Event()
    filling = asyncio.create_task(events.fill(begun.wait))
    await asyncio.sleep(0)
    rows = known.save(range(12))
    assert rows[0] == known.blocks.row_end - 1, "it is behind all others"
    begun.set()
    await filling
    items = BlockItems(PLACEMENTS["lru"](), Conditions(GIB, GIB, 1e9))
    for note in events.take():
        note(items)
    assert items.known()[1] == 3


def test_a_lease_that_names_a_block_several_times_ends_in_parts() -> None:
    store = Store()
    rows = np.array(store.save(range(4)) * 5)
    store.events.looked_up(rows)
    store.events.leased(rows)
    store.events.released(rows[:3])
    store.items.settle(store.now_s)
    assert store.items.items.in_use[store.items.item_of(0)] == 1
    store.events.released(rows[3:])
    store.items.settle(store.now_s)
    assert store.items.items.in_use[store.items.item_of(0)] == 0


def test_an_item_that_is_split_while_a_request_reads_its_front_is_free_afterwards() -> None:
    store = Store()
    rows = store.save(range(20))
    front = np.array(rows[:2])
    store.events.looked_up(front)
    store.events.leased(front)
    store.items.settle(store.now_s)
    store.save([*range(8), *range(100, 108)])
    store.items.settle(store.now_s)
    in_use = store.items.items.in_use
    assert [in_use[store.items.item_of(row)] for row in (rows[0], rows[2])] == [1, 0]
    store.events.released(front)
    store.items.settle(store.now_s)
    assert not in_use.any()


def test_blocks_that_leave_from_the_front_on_cost_one_pass_over_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    rows = store.save(range(400))
    passes, rows_of_each = list[Sequence[int]](), store.items.rows_of_each

    def counted(items: Sequence[int]) -> list[Rows]:
        passes.append(items)
        return rows_of_each(items)

    monkeypatch.setattr(store.items, "rows_of_each", counted)
    for row in rows[:-1]:
        store.discard(row)
    assert store.items.known()[1] == 1
    assert len(passes) <= 2
    assert store.runs() == {(rows[-1],)}


def test_a_session_may_end_before_its_blocks_are_settled() -> None:
    store = Store("foresight")
    store.use(store.save(range(8)))
    store.items.settle(store.now_s)
    rows = store.save(range(100, 108))
    store.events.hinted(np.array(rows), Hint.ENDED, 0)
    store.items.settle(store.now_s)
    assert store.items.items.ended[store.items.item_of(rows[0])]


def test_an_item_without_a_rate_of_return_has_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("foresight")
    store.use(store.save(range(8)))
    store.items.settle(store.now_s)
    policy = store.items.policy
    assert isinstance(policy, ForesightPolicy)
    monkeypatch.setattr(policy._scores._tables, "at_once", lambda in_class, price: (0.0, 0.0))
    store.save(range(100, 108))
    store.items.settle(store.now_s)
    _, scores = store.items.lowest(store.blocks.live_rows(), TierName.DRAM, 10, store.now_s)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", ["lru", "fifo", "s3fifo", "lookahead", "foresight"])
def test_the_end_of_an_item_leaves_before_its_front(name: str) -> None:
    store = Store(name)
    rows = [store.save(range(100 * number, 100 * number + 20)) for number in range(20)]
    for each in rows[::3]:
        store.use(each)
    store.now_s += 30
    store.items.settle(store.now_s)
    for tier in TIERS:
        ranked, scores = store.items.lowest(store.blocks.live_rows(), tier, 1000, store.now_s)
        assert sorted(ranked.tolist()) == store.blocks.live_rows().tolist()
        assert np.isfinite(scores).all() and (np.diff(scores) >= 0).all()
        place_of = {row: place for place, row in enumerate(ranked.tolist())}
        for each in rows:
            assert [place_of[row] for row in each] == sorted((place_of[row] for row in each), reverse=True)


def test_what_was_used_longest_ago_leaves_first_by_lru() -> None:
    store = Store("lru")
    rows = [store.save(range(100 * number, 100 * number + 8)) for number in range(4)]
    for number in (2, 0, 3, 1):
        store.use(rows[number])
    ranked, _ = store.items.lowest(store.blocks.live_rows(), TierName.DRAM, 5, store.now_s)
    assert ranked.tolist() == [*reversed(rows[2]), *reversed(rows[0]), rows[3][-1]]


def test_the_rate_of_a_queue_is_measured_while_requests_wait() -> None:
    store = Store("foresight")
    rows = [store.save(range(100 * number, 100 * number + 8)) for number in range(40)]
    for number, each in enumerate(rows):
        store.events.queued([np.array(later) for later in rows[number : number + 8]], len(rows) - number)
        store.now_s += 0.5
        store.use(each)
    assert store.items.items.conditions.turns_per_s == pytest.approx(2.0)
    store.events.queued([], 0)
    store.use(rows[0])
    store.now_s += 1000
    store.use(rows[1])
    assert store.items.items.conditions.turns_per_s == pytest.approx(2.0, rel=0.2), "no queue, no rate"


def test_the_length_of_an_answer_is_what_was_stored_during_the_lease_or_what_the_engine_reports() -> None:
    store = Store("foresight")
    prompt = store.save(range(40))
    store.items.settle(store.now_s)
    item, items = store.items.item_of(prompt[0]), store.items.items
    assert items.answer_tokens[item] == 0, "of the first turn, only the prompt and the answer together are known"

    store.events.looked_up(np.array(prompt))
    store.events.leased(np.array(prompt))
    rows = store.save(range(48))
    store.events.released(np.array(prompt))
    store.items.settle(store.now_s)
    assert items.answer_tokens[item] == 8

    store.events.answered(np.array(rows), 5)
    store.items.settle(store.now_s + 0.1)
    assert items.answer_tokens[item] == 5, "the report came after the end of the lease"
    store.use(rows)
    store.now_s += 60
    store.events.answered(np.array(rows), 3)
    store.items.settle(store.now_s)
    assert items.answer_tokens[item] == 3, "and this one before it was handled"
    age_s = items.used_at_s[item]
    store.now_s += 60
    store.events.answered(np.array(rows), 7)
    store.items.settle(store.now_s)
    assert (items.answer_tokens[item], items.used_at_s[item]) == (3, age_s), "a late report changes nothing"


def test_repeated_reports_of_an_answer_make_no_item_younger() -> None:
    store = Store("foresight")
    rows = store.save(range(40))
    store.use(rows)
    store.items.settle(store.now_s)
    item, items, ended_s = store.items.item_of(rows[0]), store.items.items, store.now_s
    for _ in range(20):
        store.now_s += 4
        store.events.answered(np.array(rows), 100)
        store.items.settle(store.now_s)
    assert items.used_at_s[item] == ended_s
    assert items.answer_tokens[item] == 100
    assert not store.items._answers


def test_a_discarded_block_does_not_count_as_evicted_from_ssd_and_an_evicted_one_does() -> None:
    for evicts in (False, True):
        store = Store("foresight")
        rows = store.save(range(18))  # The last block is partial.
        for row in rows:
            store.blocks.set_extent(row, TierName.SSD, Extent(0, row * SIZE, SIZE))
        item = store.items.item_of(rows[0])
        if evicts:
            store.blocks.unwanted[1, rows[-1]] = True
        store.discard(rows[-1])
        assert store.items.items.unwanted_on_ssd[item] == evicts


def test_of_many_blocks_that_leave_at_once_each_counts_as_evicted() -> None:
    store = Store("foresight")
    rows = [store.save(range(100 * number, 100 * number + 8)) for number in range(150)]
    for each in rows:
        for row in each:
            store.blocks.set_extent(row, TierName.SSD, Extent(0, row * SIZE, SIZE))
    items = [store.items.item_of(each[0]) for each in rows]
    for each in rows:
        store.blocks.unwanted[1, each[1]] = True
        store.blocks.unlink(each[1])  # Its bytes leave later.
    assert store.items.items.unwanted_on_ssd[items].all()


def test_what_no_policy_has_scored_yet_is_wanted_on_ssd() -> None:
    store = Store("foresight")
    rows = np.array(store.save(range(16)))
    store.events.looked_up(rows)
    store.events.leased(rows)
    store.items.settle(store.now_s)
    assert store.items.wanted_on_ssd(rows, store.now_s).all(), "it is leased already, and has no age yet"


class OneRead(LruPolicy):
    """Wants one read at its first look, and nothing at later ones."""

    _started = False

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> list[Promotion]:
        self.look_at_s, is_first = now_s, not self._started
        self._started = True
        return [Promotion(0, now_s + 5, 1.0)] if is_first else []


def test_a_read_stays_wanted_until_it_begins_or_its_item_is_used() -> None:
    def wanting() -> tuple[Store, list[int]]:
        store = Store(policy=OneRead())
        rows = store.save(range(16))
        for row in rows:
            store.blocks.set_extent(row, TierName.SSD, Extent(0, row * SIZE, SIZE))
            store.blocks.set_extent(row, TierName.DRAM, None)
        store.items.ask_again(store.now_s)
        assert [read.row for read in store.items.reads(store.now_s) or ()] == [0]
        return store, rows

    store, rows = wanting()
    for _ in range(3):
        assert store.items.reads(store.now_s, 1) is None, "nothing new, and the read is still wanted"
    store.events.coming(np.array(rows), True)
    assert not store.items.reads(store.now_s), "it has begun"

    store, rows = wanting()
    store.use(rows)
    assert not store.items.reads(store.now_s), "the request reads it itself"

    def discard(store: Store, rows: list[int]) -> None:
        for row in rows:
            store.discard(row)

    def be_late(store: Store, rows: list[int]) -> None:
        store.now_s += 6

    ends: list[Callable[[Store, list[int]], None]] = [
        discard,
        be_late,
        lambda store, rows: store.events.evicted(np.array(rows)),
        lambda store, rows: store.events.hinted(np.array(rows), Hint.ENDED, 0),
    ]
    for end in ends:
        store, rows = wanting()
        end(store, rows)
        assert store.items.reads(store.now_s) == []


class ManyReads(LruPolicy):
    """Wants to read each item, the first one first, and does not say so again."""

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> list[Promotion]:
        self.look_at_s = math.inf
        return [Promotion(item, now_s + 5 + item, 1.0) for item in range(200)]


def test_of_many_reads_the_most_urgent_are_given_and_the_next_ones_when_half_of_them_are_done() -> None:
    store = Store(policy=ManyReads())
    rows = [store.save(range(100 * number, 100 * number + 4)) for number in range(200)]
    store.items.ask_again(store.now_s)
    assert [read.row for read in store.items.reads(store.now_s) or ()] == list(range(64))
    for item in range(33):
        assert store.items.reads(store.now_s, 64 - item) is None
        store.events.coming(np.array(rows[item]), True)
    assert [read.row for read in store.items.reads(store.now_s, 31) or ()] == list(range(33, 97))


class Anything(RuleBasedStateMachine):
    """Prefixes of a small tree come, are looked up, change their tier and leave, in any order."""

    policy: ClassVar[str] = "foresight"

    @initialize()
    def begin(self) -> None:
        self.store = Store(self.policy)
        self.only_saved = True

    @rule(path=st.lists(st.integers(0, 1), min_size=1, max_size=5), partial=st.integers(0, 3))
    def save(self, path: list[int], partial: int) -> None:
        self.store.save([token for branch in path for token in (branch, 0, 0, 0)] + [9] * partial)

    @rule(seconds=st.floats(0, 500))
    def wait(self, seconds: float) -> None:
        self.store.now_s += seconds
        self.store.items.settle(self.store.now_s)
        items = self.store.items
        for wanted in items.reads(self.store.now_s) or ():
            assert items.items.live[wanted.row]

    @precondition(lambda self: self.store.blocks.live_count)
    @rule(data=st.data())
    def look_up(self, data: st.DataObject) -> None:
        blocks = self.store.blocks
        row = data.draw(st.sampled_from(blocks.live_rows().tolist()))
        chain = np.array([*reversed(blocks.ancestors(row)), row])
        self.store.use(chain.tolist())

    @precondition(lambda self: self.store.blocks.live_count)
    @rule(data=st.data(), tier=st.sampled_from(TIERS), is_there=st.booleans())
    def change_tier(self, data: st.DataObject, tier: TierName, is_there: bool) -> None:
        row = data.draw(st.sampled_from(self.store.blocks.live_rows().tolist()))
        self.store.blocks.set_extent(row, tier, Extent(0, row * SIZE, SIZE) if is_there else None)

    @precondition(lambda self: self.store.blocks.live_count)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        self.only_saved = False
        self.store.discard(data.draw(st.sampled_from(self.store.blocks.live_rows().tolist())))

    @invariant()
    def every_block_is_in_one_item(self) -> None:
        blocks = self.store.blocks
        listed = [row for run in self.store.runs() for row in run]
        assert sorted(listed) == blocks.live_rows().tolist()
        assert all(self.store.runs())

    @invariant()
    def bytes_are_those_of_the_blocks(self) -> None:
        blocks, items = self.store.blocks, self.store.items
        for item in items.live_items().tolist():
            rows = items.rows_of(item)
            assert items.items.size_bytes[item] == SIZE * len(rows)
            assert items.items.dram_bytes[item] == SIZE * int(blocks.lie_in(rows, TierName.DRAM).sum())
            assert items.items.ssd_bytes[item] == SIZE * int(blocks.lie_in(rows, TierName.SSD).sum())

    @invariant()
    def items_are_the_edges_of_the_tree(self) -> None:
        """A whole block is in its parent's item exactly if the parent has no other continuation."""
        if not self.only_saved:
            return
        blocks, items = self.store.blocks, self.store.items
        whole = [row for row in blocks.live_rows().tolist() if blocks.token_count[row] == 4]
        parents = [blocks.parent_row(row) for row in whole]
        for row, parent in zip(whole, parents, strict=True):
            if parent != NO_ROW:
                joined = items.item_of(row) == items.item_of(parent)
                assert joined == (parents.count(parent) == 1)

    @invariant()
    def every_block_is_ranked(self) -> None:
        rows = self.store.blocks.live_rows()
        ranked, scores = self.store.items.lowest(rows, TierName.DRAM, 1000, self.store.now_s)
        assert sorted(ranked.tolist()) == rows.tolist() and np.isfinite(scores).all()


_SOME = settings(max_examples=20, stateful_step_count=30)

TestForesight = Anything.TestCase
TestForesight.settings = _SOME


class AnythingForS3Fifo(Anything):
    policy: ClassVar[str] = "s3fifo"


TestS3Fifo = AnythingForS3Fifo.TestCase
TestS3Fifo.settings = _SOME


class AnythingForLookahead(Anything):
    policy: ClassVar[str] = "lookahead"


TestLookahead = AnythingForLookahead.TestCase
TestLookahead.settings = _SOME
