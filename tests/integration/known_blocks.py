"""Blocks whose bytes follow from their keys, so that tests can identify and compare them anywhere."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from kvservice_client import BlockChain, Client, Durability, Layout, Lease, SaveResult, block_chain

# Slices of 64 KiB begin on pages, and those of 3 KiB follow one another. No extent is larger than its image.
LARGE = Layout("known/large", "float16", layers=3, kv_heads=4, k_head_dim=64, v_head_dim=64, block_tokens=64)
SMALL = Layout("known/small", "float16", layers=5, kv_heads=3, k_head_dim=16, v_head_dim=16, block_tokens=16)

_salts = itertools.count()


def new_chain(layout: Layout, blocks: int = 1, salt: str = "") -> BlockChain:
    """A chain that differs from that of every other call, except a call with the same salt."""
    salt = salt or f"chain {next(_salts)}"
    return block_chain(layout, np.arange(blocks * layout.block_tokens), salt=salt.encode())


def slice_of(key: bytes, layer: int, size_bytes: int) -> NDArray[np.uint8]:
    """The bytes of one layer of a block."""
    seed = int.from_bytes(key[:15], "big") << 8 | layer
    return np.frombuffer(np.random.Generator(np.random.PCG64(seed)).bytes(size_bytes), np.uint8)


def slice_bytes(layout: Layout) -> int:
    return layout.slice_bytes(layout.kv_heads, layout.block_tokens)


def layers_of(layout: Layout, chain: BlockChain) -> list[list[NDArray[np.uint8]]]:
    """Layer by layer the slices of a chain's blocks."""
    sizes = [layout.slice_bytes(layout.kv_heads, count) for count in chain.token_counts]
    named = list(zip(chain.keys, sizes, strict=True))
    return [[slice_of(key, layer, size) for key, size in named] for layer in range(layout.layers)]


def save(
    client: Client, layout: Layout, chain: BlockChain, durability: Durability = Durability.DRAM, **options: float
) -> SaveResult:
    return client.open_layout(layout).save(chain, layers_of(layout, chain), durability, **options)


def compare(lease: Lease, layout: Layout, chain: BlockChain) -> None:
    """Load the hits of the chain, and compare every byte."""
    expected = layers_of(layout, chain[: lease.hit_blocks])
    for layer, slices in zip(lease.load(), expected, strict=True):
        assert np.array_equal(layer.data, np.concatenate(slices)), f"wrong bytes in layer {layer.index}"


def verify(client: Client, layout: Layout, chain: BlockChain) -> None:
    """The whole chain is stored, with the right bytes."""
    with client.open_layout(layout).lookup(chain) as lease:
        assert lease.hit_blocks == len(chain)
        compare(lease, layout, chain)


def tiers_of(client: Client, layout: Layout, chain: BlockChain) -> list[str]:
    """The tiers of each leading block: ``dram``, ``ssd``, ``dram+ssd``."""
    with client.open_layout(layout).lookup(chain) as lease:
        names = {(True, False): "dram", (False, True): "ssd", (True, True): "dram+ssd"}
        return [names[run.dram, run.ssd] for run in lease.residency for _ in range(run.count)]
