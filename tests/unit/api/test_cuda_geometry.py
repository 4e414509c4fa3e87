"""The piece table that kernels read, against the pieces of the adapter's pages; and the span of an array of pages."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_adapter.device.base import Pages
from kvservice_api.cuda.geometry import LayerPages, PageArray, piece_table


@st.composite
def runs(draw: st.DrawFn) -> tuple[Pages, list[int], int]:
    """Pages that a run may or may not fit in, the token counts of its blocks, and how many pages there are."""
    page_tokens = draw(st.integers(1, 9))
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    first_token = draw(st.integers(-1, 2 * page_tokens))
    needed = -(-(max(first_token, 0) + sum(counts)) // page_tokens)
    page_count = draw(st.integers(1, 20))
    given_pages = max(0, needed + draw(st.integers(-2, 1)))
    ids = draw(st.lists(st.integers(0, page_count - 1), min_size=given_pages, max_size=given_pages))
    copied = draw(st.none() | st.tuples(st.integers(0, sum(counts)), st.integers(1, sum(counts) + 2)))
    states = np.empty((page_count, 1, page_tokens, 1), np.float16)
    return Pages(states, states, ids, first_token, copied=copied), counts, page_count


@given(runs())
def test_a_piece_table_has_the_pieces_of_the_adapters_pages(run: tuple[Pages, list[int], int]) -> None:
    pages, counts, page_count = run
    arguments = pages.page_ids, pages.page_tokens, pages.first_token, counts, pages.copied, page_count
    try:
        expected = list(pages.pieces(counts, join_blocks=False))
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            piece_table(*arguments)
        return

    table = piece_table(*arguments)

    fields = ["slice", "token_of_block", "tokens", "page", "token_of_page"]
    assert table[fields].tolist() == [
        (block, token_of_block, tokens, page, token_of_page)
        for block, _, token_of_block, tokens, page, token_of_page in expected
    ]
    assert table["block_tokens"].tolist() == [counts[piece.block] for piece in expected]
    starts = np.cumsum([0, *counts])
    assert table["first_token"].tolist() == [starts[piece.block] + piece.token_of_block for piece in expected]


@pytest.mark.parametrize("page", [-1, 4, 2**31, 2**40])
def test_a_page_that_is_not_there_is_refused_where_tokens_are_copied_to_it(page: int) -> None:
    with pytest.raises(ValueError, match=rf"page {page} is not one of 4 pages"):
        piece_table([0, page, 3], 8, 0, [8, 8, 8], None, 4)

    assert piece_table([0, page, 3], 8, 0, [8, 8, 8], (16, 24), 4)["page"].tolist() == [3]


def test_blocks_without_tokens_and_runs_without_blocks_have_no_pieces() -> None:
    assert piece_table([1, 2], 4, 3, [0, 2, 0, 3, 0], None, 3)["slice"].tolist() == [1, 1, 3]
    assert len(piece_table([], 4, 0, [], None, 0)) == 0


@pytest.mark.parametrize(("page_tokens", "counts"), [(0, [1]), (4, [3, -1])])
def test_sizes_that_cannot_be_are_refused(page_tokens: int, counts: list[int]) -> None:
    with pytest.raises(ValueError, match="are given"):
        piece_table([0, 1], page_tokens, 0, counts, None, 2)


def test_the_span_of_an_array_reaches_from_its_first_element_to_its_last() -> None:
    memory = np.zeros((3, 5, 2, 16), np.float16)  # [page, token, head, key and value]
    keys, values = (part.transpose(0, 2, 1, 3) for part in (memory[..., :12], memory[..., 12:]))
    first = memory.ctypes.data
    arrays = [
        PageArray(part.ctypes.data, 3, (part.strides[0], part.strides[1], part.strides[2], part.strides[3]), dim)
        for part, dim in ((keys, 12), (values, 4))
    ]
    layer = LayerPages(arrays[0], arrays[1], heads=2, page_tokens=5, item_bytes=2, dtype="float16")

    assert layer.span(layer.keys) == (first, first + memory.nbytes - 4 * 2)
    assert layer.span(layer.values) == (first + 12 * 2, first + memory.nbytes)
    assert (layer.token_bytes, layer.k_row_bytes, layer.v_row_bytes) == (64, 24, 8)
    nothing = PageArray(first, 3, (1, 1, 1, 1), 0)
    assert layer.span(nothing) == (first, first)


def test_the_contracts_cuda_package_is_imported_without_cupy() -> None:
    program = (
        "import sys, kvservice_api.cuda.geometry, kvservice_api.cuda.page_kernels, kvservice_api.cuda.runtime; "
        "assert 'cupy' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", program], check=True)
