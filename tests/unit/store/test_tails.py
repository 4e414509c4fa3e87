"""Tails: the partial blocks that a lookup finds behind its last hit."""

from __future__ import annotations

from dataclasses import replace

from kvservice.blocks import TierName
from kvservice.store.caller import Caller, Tenant
from kvservice.store.leases import Client
from kvservice.store.prefix_match import TAILS_MAX, Tail
from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Shard
from tests.stores import CALLER, LAYOUT, WHOLE, OpenStore, at_once, caller_of, some_chain, some_images

LEFT, RIGHT = Shard(0, 2, 0, 1), Shard(0, 2, 1, 2)
HISTORY = some_chain(2)


def a_tail(number: int, *, of: bytes = HISTORY.keys[-1]) -> BlockChain:
    """One partial block of `number` tokens that continues a key."""
    return block_chain(LAYOUT, [number] * number, with_partial=True, parent=of)


async def saved(
    opened: OpenStore, client: Client, chain: BlockChain, *, shard: Shard = WHOLE, caller: Caller | None = None
) -> None:
    images = some_images(chain, shard=shard)
    assert not (await opened.save(client, chain, images, shard=shard, caller=caller)).refused


def tails_of(
    opened: OpenStore, chain: BlockChain = HISTORY, *, shard: Shard = WHOLE, caller: Caller = CALLER
) -> list[Tail]:
    asked = opened.store.lookups.lookup(caller, LAYOUT.fingerprint, shard, chain.keys, 0, parent_key=chain.parent)
    return list(at_once(asked).tails)


async def evict(opened: OpenStore, tail: BlockChain) -> None:
    """From every tier."""
    await opened.settle()
    for tier in (TierName.DRAM, TierName.SSD):
        assert (await opened.store.moves.evict(CALLER, tail.keys, tier)).evicted == 1


def named(*tails: BlockChain) -> list[Tail]:
    return [(tail.keys[0], tail.token_counts[0]) for tail in tails]


async def test_a_lookup_lists_what_continues_its_last_hit(opened: OpenStore, client: Client) -> None:
    first, second, other = a_tail(3), a_tail(5), a_tail(7, of=HISTORY.keys[0])
    for chain in (HISTORY, first, second, other):
        await saved(opened, client, chain)

    assert tails_of(opened) == named(second, first)
    assert tails_of(opened, HISTORY[:1]) == named(other)
    await opened.store.operators.discard(CALLER, HISTORY.keys[1:])
    assert tails_of(opened) == named(other), "the last hit is the first block now"


async def test_a_lookup_that_hits_nothing_lists_what_continues_its_parent(opened: OpenStore, client: Client) -> None:
    tail, nothing = a_tail(3, of=HISTORY.parent), BlockChain(HISTORY.parent, (), ())
    await saved(opened, client, tail)

    assert tails_of(opened) == tails_of(opened, nothing) == named(tail)


async def test_a_lookup_without_a_parent_key_lists_nothing(opened: OpenStore, client: Client) -> None:
    for chain in (HISTORY, a_tail(3)):
        await saved(opened, client, chain)

    hit = at_once(opened.store.lookups.lookup(caller_of(client), LAYOUT.fingerprint, WHOLE, HISTORY.keys, 30))
    assert (hit.blocks, hit.tails) == (2, ())


async def test_the_newest_tails_are_listed(opened: OpenStore, client: Client) -> None:
    tails = [a_tail(number) for number in range(1, TAILS_MAX + 3)]
    for tail in (HISTORY, *tails):
        await saved(opened, client, tail)

    newest_first = tails[::-1]
    assert tails_of(opened) == named(*newest_first[:TAILS_MAX])
    await evict(opened, newest_first[0])
    await opened.store.operators.discard(CALLER, newest_first[1].keys)
    assert tails_of(opened) == named(*newest_first[2 : 2 + TAILS_MAX]), "older ones take the place of those that went"


async def test_whole_blocks_are_no_tails(opened: OpenStore, client: Client) -> None:
    await saved(opened, client, HISTORY)

    assert tails_of(opened, HISTORY[:1]) == []
    assert len(opened.block_lifecycle.tails) == 0


async def test_nothing_is_remembered_of_tails_that_are_gone(opened: OpenStore, client: Client) -> None:
    first, second = a_tail(3), a_tail(5)
    for chain in (first, second):
        await saved(opened, client, chain)

    await evict(opened, first)
    await opened.store.operators.discard(CALLER, second.keys)
    assert len(opened.block_lifecycle.tails) == 0


async def test_tails_are_the_same_after_a_restart(opened: OpenStore, client: Client) -> None:
    for number in (7, 3, 5):
        await saved(opened, client, a_tail(number))
        opened.files.clock.advance(seconds=1)
    parent, tails = BlockChain(HISTORY.keys[-1], (), ()), named(a_tail(5), a_tail(3), a_tail(7))
    assert tails_of(opened, parent) == tails
    await opened.close()

    again = opened.files.open()
    assert tails_of(again, parent) == tails
    await again.close()


async def test_a_tail_must_cover_the_shard(opened: OpenStore, client: Client) -> None:
    both, left = a_tail(3), a_tail(5)
    for tail, shard in ((both, LEFT), (both, RIGHT), (left, LEFT)):
        await saved(opened, client, tail, shard=shard)

    parent = BlockChain(HISTORY.keys[-1], (), ())
    assert tails_of(opened, parent, shard=LEFT) == named(left, both)
    assert tails_of(opened, parent, shard=RIGHT) == named(both)
    assert tails_of(opened, parent, shard=WHOLE) == named(both), "the two halves are a whole"


async def test_a_tenant_does_not_see_the_tails_of_another(opened: OpenStore, client: Client) -> None:
    caller = caller_of(client)
    other = replace(caller, tenant=Tenant(1, "other"))
    mine, theirs = a_tail(3), a_tail(5)
    await saved(opened, client, mine)
    await saved(opened, client, theirs, caller=other)

    parent = BlockChain(HISTORY.keys[-1], (), ())
    assert tails_of(opened, parent) == named(mine)
    assert tails_of(opened, parent, caller=other) == named(theirs)


async def test_listed_tails_are_neither_leased_nor_used(opened: OpenStore, client: Client) -> None:
    tail = a_tail(3)
    for chain in (HISTORY, tail):
        await saved(opened, client, chain)
    row = opened.blocks.row_of(tail.keys[0], WHOLE)
    before = (opened.blocks.access_seq[row], opened.blocks.hits[row], opened.blocks.leases[row])

    asked = opened.store.lookups.lookup(
        caller_of(client), LAYOUT.fingerprint, WHOLE, HISTORY.keys, 30, parent_key=HISTORY.parent
    )
    assert at_once(asked).tails == named(tail)
    assert (opened.blocks.access_seq[row], opened.blocks.hits[row], opened.blocks.leases[row]) == before
