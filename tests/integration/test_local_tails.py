"""Certain misses of short histories: the residency directory says whether a partial block may continue a hit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from kvservice_client import BlockCache, ChainBuilder, Durability, LocalHit, Tier, block_chain
from tests.daemon import DaemonProcess, until
from tests.integration.known_blocks import SMALL, layers_of

BLOCK = SMALL.block_tokens
_seeds = itertools.count()


@pytest.fixture
def blocks(daemon: DaemonProcess) -> Iterator[BlockCache]:
    with daemon.client() as client:
        cache = client.open_layout(SMALL)
        until(lambda: cache.peek(builder([1])) is not None)
        yield cache


def some_tokens(count: int) -> list[int]:
    """Tokens with which no other history begins."""
    tokens: list[int] = np.random.default_rng((1, next(_seeds))).integers(0, 50_000, count).tolist()
    return tokens


def builder(tokens: list[int], salt: bytes | None = None) -> ChainBuilder:
    """Of the tokens and, by default, a salt that other histories do not have: all tails of a root are one answer."""
    made = ChainBuilder(SMALL, salt=str(tokens[:1]).encode() if salt is None else salt)
    made.extend(tokens)
    return made


def save(blocks: BlockCache, tokens: list[int], durability: Durability = Durability.DRAM) -> list[bytes]:
    """Keys of the saved blocks, the partial one last."""
    chain = builder(tokens).prefix(len(tokens))
    assert blocks.save(chain, layers_of(SMALL, chain), durability).is_complete
    return list(chain.keys)


def peeked(blocks: BlockCache, tokens: list[int]) -> tuple[int, bool | None]:
    hit = blocks.peek(builder(tokens))
    assert hit is not None
    return hit.blocks, hit.may_have_tail


@pytest.mark.parametrize("stored", [5, BLOCK + 5, 3 * BLOCK - 1])
def test_a_history_is_seen_to_have_a_tail_and_a_lookup_finds_it(blocks: BlockCache, stored: int) -> None:
    said = some_tokens(stored + 2 * BLOCK)
    assert peeked(blocks, said) == (0, False)
    save(blocks, said[:stored])
    assert peeked(blocks, said) == (stored // BLOCK, True)
    with blocks.lookup(builder(said)) as lease:
        assert lease.hit_tokens == stored


def test_whole_blocks_alone_have_no_tail(blocks: BlockCache) -> None:
    said = some_tokens(3 * BLOCK)
    save(blocks, said[: 2 * BLOCK])
    assert peeked(blocks, said) == (2, False)


def test_a_history_without_more_tokens_needs_no_tail(blocks: BlockCache) -> None:
    said = some_tokens(BLOCK + 5)
    save(blocks, said)
    assert peeked(blocks, said[:BLOCK]) == (1, False)
    assert peeked(blocks, said) == (1, True)


def test_a_tail_of_another_conversation_is_seen_too_because_only_a_lookup_compares_it(blocks: BlockCache) -> None:
    common = some_tokens(BLOCK)
    save(blocks, [*common, 1, 2, 3])
    assert peeked(blocks, [*common, 4, 5, 6]) == (1, True)


def test_the_answer_for_a_chain_says_nothing_of_tails(blocks: BlockCache) -> None:
    assert blocks.peek(block_chain(SMALL, some_tokens(BLOCK))) == LocalHit(0, 0, 0, None)


def test_a_tail_is_seen_while_any_tier_has_it_and_not_after_its_last_copy_is_gone(
    daemon: DaemonProcess, blocks: BlockCache
) -> None:
    said = some_tokens(BLOCK + 9)
    *_, tail = save(blocks, said[:-2], Durability.SSD)
    with daemon.client() as client:
        client.evict([tail], Tier.DRAM)
        assert peeked(blocks, said) == (1, True)
        client.evict([tail], Tier.SSD)
    assert peeked(blocks, said) == (1, False)


def test_a_discarded_tail_is_withdrawn_and_another_one_of_the_same_parent_stays(
    daemon: DaemonProcess, blocks: BlockCache
) -> None:
    said = some_tokens(BLOCK + 9)
    *_, first = save(blocks, said[: BLOCK + 3])
    *_, second = save(blocks, said[: BLOCK + 7])
    with daemon.client() as client:
        client.admin.discard([first])
        assert peeked(blocks, said) == (1, True)
        client.admin.discard([second])
    assert peeked(blocks, said) == (1, False)


def test_tails_are_seen_after_a_restart(tmp_path_factory: pytest.TempPathFactory) -> None:
    with DaemonProcess(tmp_path_factory.mktemp("store")) as own, own.client() as client:
        blocks = client.open_layout(SMALL)
        histories = [some_tokens(BLOCK + 9) for _ in range(40)]
        for said in histories:
            save(blocks, said[:-2])
        own.kill()
        own.start()
        until(lambda: blocks.peek(builder(some_tokens(3))) is not None)
        assert [peeked(blocks, said) for said in histories] == [(1, True)] * len(histories)
        assert peeked(blocks, some_tokens(BLOCK + 9)) == (0, False)
