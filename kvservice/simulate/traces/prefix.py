"""The tree of prefixes that hash ids spell, as runs of blocks that are used alike."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Segments(NamedTuple):
    """See `Workload` for the three."""

    path_begins: NDArray[np.int64]
    path_items: NDArray[np.int32]
    item_blocks: NDArray[np.int32]


class Contradiction(ValueError):
    """One id stands for two prefixes.

    Attributes:
        first, second: Requests, by number, in which other ids are before it.
        hash_id: The id.
    """

    def __init__(self, first: int, second: int, hash_id: int) -> None:
        super().__init__(f"hash id {hash_id} follows other blocks in request {first} than in request {second}")
        self.first = first
        self.second = second
        self.hash_id = hash_id


def segments(begins: NDArray[np.int64], hash_ids: NDArray[np.int64]) -> Segments:
    """Maximal runs of blocks such that every request has either all of a run or nothing of it.

    Request `n` has the chain `hash_ids[begins[n] : begins[n + 1]]`; no chain is empty. Items are numbered by their
    first request. Raises Contradiction where an id's prefix is not the same everywhere, or an id comes twice in a
    chain.
    """
    known, first_at, block, uses = np.unique(hash_ids, return_index=True, return_inverse=True, return_counts=True)
    before = np.empty_like(block)
    before[1:] = block[:-1]
    before[begins[:-1]] = -1
    parent = before[first_at]
    wrong = np.flatnonzero(before != parent[block])
    if len(wrong):
        at = wrong[0]
        first, second = np.searchsorted(begins, [first_at[block[at]], at], side="right") - 1
        raise Contradiction(int(first), int(second), int(known[block[at]]))

    # A block's requests are some of its parent's. Where they are as many they are the same ones.
    joined = (parent >= 0) & (uses == uses[parent])
    heads = np.flatnonzero(~joined[block])
    _, first_head, item_of_head = np.unique(block[heads], return_index=True, return_inverse=True)
    order = np.argsort(first_head)
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    lengths = np.diff(heads, append=len(block))
    return Segments(
        path_begins=np.searchsorted(heads, begins),
        path_items=number[item_of_head],
        item_blocks=lengths[first_head[order]].astype(np.int32),
    )
