"""The tree of prefixes in a trace of hash ids, as runs of blocks that the same requests use."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Segments(NamedTuple):
    """Three arrays of `Workload`, which describes them."""

    path_begins: NDArray[np.int64]
    path_items: NDArray[np.int32]
    item_blocks: NDArray[np.int32]


class Contradiction(ValueError):
    """One id names two prefixes.

    Attributes:
        first, second: Numbers of two requests with different ids before it.
        hash_id: The id.
    """

    def __init__(self, first: int, second: int, hash_id: int) -> None:
        super().__init__(f"hash id {hash_id} follows other blocks in request {first} than in request {second}")
        self.first = first
        self.second = second
        self.hash_id = hash_id


def segments(begins: NDArray[np.int64], hash_ids: NDArray[np.int64]) -> Segments:
    """The longest runs of blocks for which every request has either all blocks or none.

    Request `n` has the chain `hash_ids[begins[n] : begins[n + 1]]`; no chain is empty. Items are numbered by their
    first request. Raises Contradiction if an id has different prefixes, or occurs twice in a chain.
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

    # The requests of a block are a subset of its parent's. With equal counts they are the same requests.
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
