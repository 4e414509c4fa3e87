"""Where a layer's pages are in device memory, and which tokens of which block are in which page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Consecutive tokens of one block that are in one page. The kernels read it (struct Piece of pages.cu).
PIECE = np.dtype(
    [
        ("slice", "<i8"),  # Number of the block; a copy replaces it by the byte offset of the block's stored slice.
        ("block_tokens", "<i4"),
        ("token_of_block", "<i4"),
        ("tokens", "<i4"),
        ("page", "<i4"),
        ("token_of_page", "<i4"),
        ("first_token", "<i4"),  # The piece's first token, counted from the first block's.
    ]
)


@dataclass(frozen=True, slots=True)
class PageArray:
    """An array ``[page, kv head, token, dim]`` in device memory: keys or values of one layer."""

    address: int
    pages: int
    strides: tuple[int, int, int, int]  # In bytes, of page, head, token and dim. Any order; none is negative.
    dim: int  # Elements. 0 for values without dims, which are neither read nor written.


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Keys and values of one layer. Their stored slice is ``[K, V][kv head][token][dim]`` of a block's tokens."""

    keys: PageArray
    values: PageArray
    heads: int
    page_tokens: int
    item_bytes: int
    dtype: str  # NumPy's name of the element type, or "bfloat16", "float8_e4m3fn", "float8_e5m2".

    @property
    def k_row_bytes(self) -> int:
        """Of one token's key in one head, as it is stored."""
        return self.keys.dim * self.item_bytes

    @property
    def v_row_bytes(self) -> int:
        return self.values.dim * self.item_bytes

    @property
    def token_bytes(self) -> int:
        """Of one token in this layer, as it is stored."""
        return self.heads * (self.k_row_bytes + self.v_row_bytes)

    def span(self, array: PageArray) -> tuple[int, int]:
        """The device addresses [begin, end) that hold the elements of `array`. Empty where it has none."""
        shape = array.pages, self.heads, self.page_tokens, array.dim
        if min(shape) <= 0:
            return array.address, array.address
        last = sum((size - 1) * stride for size, stride in zip(shape, array.strides, strict=True))
        return array.address, array.address + last + self.item_bytes


def piece_table(
    page_ids: Sequence[int] | NDArray[np.integer],
    page_tokens: int,
    first_token: int,
    token_counts: Sequence[int] | NDArray[np.integer],
    copied: tuple[int, int] | None,
    pages: int,
) -> NDArray[np.void]:
    """An array of PIECE: the blocks of a run of tokens, cut at the ends of the pages.

    Block b has `token_counts[b]` tokens. Token t of the run is in page ``page_ids[(first_token + t) // page_tokens]``,
    at ``(first_token + t) % page_tokens``. With `copied`, only the tokens ``[begin, end)`` of the run are listed; the
    pages need not hold the tokens after `end`. Pieces are in the order of the run.

    Raises ValueError where listed tokens are not within the pages, or a listed page is not in ``[0, pages)``.
    """
    counts, ids = np.asarray(token_counts, np.int64), np.asarray(page_ids, np.int64)
    if page_tokens <= 0 or (len(counts) and counts.min() < 0):
        raise ValueError(f"pages of {page_tokens} tokens and blocks of {counts.tolist()} tokens are given")
    starts = np.concatenate(([0], np.cumsum(counts)))
    tokens = int(starts[-1])
    begin, end = (0, tokens) if copied is None else (max(0, copied[0]), min(tokens, copied[1]))
    if first_token < 0 or first_token + end > len(ids) * page_tokens:
        raise ValueError(
            f"tokens {first_token}..{first_token + end} are not within {len(ids)} pages of {page_tokens} tokens"
        )
    if begin >= end:
        return np.empty(0, PIECE)
    # A piece begins where a block or a page begins, and where the copied tokens begin.
    first_page, last_page = (first_token + begin) // page_tokens, (first_token + end - 1) // page_tokens
    page_begins = np.arange(first_page + 1, last_page + 1, dtype=np.int64) * page_tokens - first_token
    inner = starts[(starts > begin) & (starts < end)]
    at = np.unique(np.concatenate(([begin], inner, page_begins)))
    block = np.searchsorted(starts, at, side="right") - 1
    page = (first_token + at) // page_tokens
    used = ids[first_page : last_page + 1]
    if used.min() < 0 or used.max() >= pages:
        raise ValueError(f"page {used[(used < 0) | (used >= pages)][0]} is not one of {pages} pages")
    table = np.empty(len(at), PIECE)
    table["slice"] = block
    table["block_tokens"] = counts[block]
    table["token_of_block"] = at - starts[block]
    table["tokens"] = np.append(at[1:], end) - at
    table["page"] = ids[page]
    table["token_of_page"] = (first_token + at) % page_tokens
    table["first_token"] = at
    return table
