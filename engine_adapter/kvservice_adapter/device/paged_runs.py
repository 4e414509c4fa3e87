"""The copies of stored slices into an engine's pages as tables of `kvservice_api.copying`: one call for a layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from kvservice_adapter.device.base import Pages
from kvservice_api.copying import Table


def paged_runs(pages: Pages, token_counts: Sequence[int], *, joined: bool) -> tuple[Table, Table] | None:
    """Slices and runs for `copy_slices` from the blocks to the targets (keys, values).

    The sources are one array of all blocks if `joined`, else one per block. None if the elements of a token are not
    side by side in the pages. Raises ValueError as `Pages.pieces`.
    """
    keys, values = pages.key_view, pages.value_view
    if any(view.shape[3] > 1 and view.strides[3] != view.item_bytes for view in (keys, values)):
        return None
    pieces = tuple(pages.pieces(token_counts, join_blocks=False))
    dims = tuple((view.shape[3] * view.item_bytes, view.strides) for view in (keys, values))
    return _tables(pieces, tuple(token_counts), keys.shape[1], dims, joined)


@lru_cache(maxsize=4)
def _tables(
    pieces: tuple[tuple[int, ...], ...],
    token_counts: tuple[int, ...],
    heads: int,
    dims: tuple[tuple[int, tuple[int, ...]], ...],
    joined: bool,
) -> tuple[Table, Table]:
    """Remembered, because they are the same for all layers of a load. `dims`: of K and V the bytes of a token in a
    head, and the pages' strides.
    """
    counts = np.array(token_counts, np.int64)
    block, _, token, tokens, page, at = np.array(pieces, np.int64).reshape(-1, 6).T[:, :, None]
    head = np.arange(heads, dtype=np.int64)
    tables, part_begin = [], np.zeros_like(block)
    for target, (row_bytes, (page_step, head_step, token_step, _)) in enumerate(dims):
        if not row_bytes:
            continue
        begin = part_begin + (head * counts[block] + token) * row_bytes
        offset = page * page_step + head * head_step + at * token_step
        is_one_row = token_step == row_bytes
        rows, size = (1, tokens * row_bytes) if is_one_row else (tokens, row_bytes)
        columns = (block, target, offset, begin, rows, size, token_step)
        tables.append(np.stack([np.broadcast_to(column, begin.shape) for column in columns], -1).reshape(-1, 7))
        part_begin = part_begin + heads * counts[block] * row_bytes
    runs = np.concatenate(tables)
    runs = runs[np.lexsort((runs[:, 3], runs[:, 0]))]  # By block, and by their place in it.
    sizes = counts * sum(row_bytes for row_bytes, _ in dims) * heads
    starts = np.array([0, *accumulate(sizes.tolist())][:-1], np.int64)
    numbers = np.arange(len(counts))
    sources = (np.zeros_like(numbers), starts) if joined else (numbers, np.zeros_like(starts))
    slices = np.stack([*sources, sizes, np.bincount(runs[:, 0], minlength=len(counts))], -1)
    return slices, np.ascontiguousarray(runs[:, 1:])
