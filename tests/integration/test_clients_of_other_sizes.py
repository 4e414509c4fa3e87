"""Another number of ranks finds the stored blocks: shards together give a whole, and a whole gives shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Layout, Shard
from kvservice_client import Client, Durability
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import LARGE, SMALL, slice_of

# All of 5 layers and 3 heads.
WHOLE = Shard(0, 5, 0, 3)
HEADS = [Shard(0, 5, 0, 1), Shard(0, 5, 1, 3)]
LAYERS = [Shard(0, 2, 0, 3), Shard(2, 5, 0, 3)]
QUARTERS = [Shard(0, 2, 0, 2), Shard(0, 2, 2, 3), Shard(2, 5, 0, 2), Shard(2, 5, 2, 3)]
OVERLAPPING = [Shard(0, 5, 0, 2), Shard(0, 5, 1, 3), Shard(1, 3, 0, 3)]
INNER = Shard(1, 4, 1, 2)

_salts = iter(range(10**6))


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.address) as client:
        yield client


def new_chain(layout: Layout) -> BlockChain:
    """Three blocks, the last of which is not full."""
    tokens = np.arange(3 * layout.block_tokens - 3)
    return block_chain(layout, tokens, salt=str(next(_salts)).encode(), with_partial=True)


def expected(layout: Layout, chain: BlockChain, shard: Shard) -> list[NDArray[np.uint8]]:
    """One buffer per layer of the shard, cut from the whole blocks by hand: ``[K, V][head][token][dim]``."""
    layers = []
    for layer in range(shard.layer_begin, shard.layer_end):
        blocks = []
        for key, tokens in zip(chain.keys, chain.token_counts, strict=True):
            whole = slice_of(key, layer, layout.slice_bytes(layout.kv_heads, tokens))
            k_end = layout.kv_heads * tokens * layout.k_head_dim * layout.groups[0].dtype_bytes
            for half in (whole[:k_end], whole[k_end:]):
                heads = half.reshape(layout.kv_heads, -1)
                blocks.append(heads[shard.head_begin : shard.head_end].reshape(-1))
        layers.append(np.concatenate(blocks))
    return layers


def store(client: Client, layout: Layout, chain: BlockChain, shard: Shard) -> None:
    blocks = client.open_layout(layout, shard)
    assert blocks.save(chain, expected(layout, chain, shard), Durability.SSD).stored == len(chain)


def finds(client: Client, layout: Layout, chain: BlockChain, shard: Shard) -> bool:
    """Whether the shard is found. Compares its bytes if so."""
    with client.open_layout(layout, shard).lookup(chain) as lease:
        if not lease.hit_blocks:
            return False
        assert lease.hit_blocks == len(chain)
        loaded = [layer.data for layer in lease.load()]
    wanted = expected(layout, chain, shard)
    assert len(loaded) == len(wanted)
    assert all(map(np.array_equal, loaded, wanted))
    return True


CASES = {
    "two head shards as a whole": (HEADS, [WHOLE]),
    "two layer shards as a whole": (LAYERS, [WHOLE]),
    "four quarters as a whole": (QUARTERS, [WHOLE]),
    "a whole as two head shards": ([WHOLE], HEADS),
    "a whole as two layer shards": ([WHOLE], LAYERS),
    "head shards as layer shards": (HEADS, LAYERS),
    "layer shards as head shards": (LAYERS, HEADS),
    "quarters as what overlaps them": (QUARTERS, [INNER, *OVERLAPPING]),
    "overlapping shards as a whole and as quarters": (OVERLAPPING, [WHOLE, *QUARTERS]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_stored_by_some_ranks_is_found_by_others(client: Client, case: str) -> None:
    stored, wanted = CASES[case]
    chain = new_chain(SMALL)
    assert not any(finds(client, SMALL, chain, shard) for shard in (*stored, *wanted))
    for shard in stored:
        store(client, SMALL, chain, shard)
    for shard in wanted:
        assert finds(client, SMALL, chain, shard)
    client.evict(chain, "dram")
    for shard in wanted:
        assert finds(client, SMALL, chain, shard)


def test_slices_that_begin_on_pages_are_put_together_too(client: Client) -> None:
    chain, (first, second) = new_chain(LARGE), (Shard(0, 3, 0, 2), Shard(0, 3, 2, 4))
    store(client, LARGE, chain, first)
    client.evict(chain, "dram")  # The first rank's part is on SSD only, the second one's in DRAM.
    store(client, LARGE, chain, second)
    with client.open_layout(LARGE).lookup(chain) as lease:
        assert lease.hit_blocks == 3
    assert finds(client, LARGE, chain, Shard.whole(LARGE))
    assert finds(client, LARGE, chain, Shard(1, 2, 1, 3))


def test_while_one_rank_has_not_saved_a_lookup_finds_only_what_all_ranks_saved(client: Client) -> None:
    chain = new_chain(SMALL)
    store(client, SMALL, chain, HEADS[0])
    store(client, SMALL, chain[:1], HEADS[1])
    for shard in (WHOLE, HEADS[1], *LAYERS):
        assert client.open_layout(SMALL, shard).contains(chain) == 1
    assert client.open_layout(SMALL, HEADS[0]).contains(chain) == 3
    store(client, SMALL, chain[1:], HEADS[1])
    assert finds(client, SMALL, chain, WHOLE)


def test_what_is_covered_by_a_larger_part_is_not_stored_again(client: Client) -> None:
    chain = new_chain(SMALL)
    store(client, SMALL, chain, WHOLE)
    result = client.open_layout(SMALL, INNER).save(chain, expected(SMALL, chain, INNER))
    assert (result.stored, result.already_stored) == (0, 3)
    assert finds(client, SMALL, chain, INNER)


def test_a_discarded_block_is_gone_in_all_its_parts(client: Client) -> None:
    chain = new_chain(SMALL)
    for shard in QUARTERS:
        store(client, SMALL, chain, shard)
    assert len(client.admin.inspect(chain.keys[0]).shards) == 4
    assert client.admin.discard(chain).discarded == 12
    assert not any(finds(client, SMALL, chain, shard) for shard in (WHOLE, *QUARTERS))
