"""Which sequences a batch holds, and which batches are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvservice_adapter.connectors.transformers import UnsupportedModel
from kvservice_adapter.connectors.transformers.rows import common_tokens, sequences
from kvservice_api.errors import InvalidRequest


def test_a_batch_is_known_by_its_padding() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    given = sequences(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))

    assert given.pads == (2, 0)
    assert given.tokens(0).tolist() == [5, 6]
    assert given.tokens(1, 3).tolist() == [1, 2, 3]
    assert given.columns == 4


def test_one_sequence_needs_no_mask() -> None:
    for same in ([1, 2, 3], np.array([[1, 2, 3]]), torch.tensor([1, 2, 3])):
        assert sequences(same).tokens(0).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (None, "attention_mask"),
        ([[1, 1, 0], [1, 1, 1]], "left"),
        ([[0, 0, 0], [1, 1, 1]], "left"),
        ([[1, 1, 1]], "attention mask is"),
    ],
    ids=["none", "padded on the right", "nothing but padding", "of other rows"],
)
def test_what_is_padded_elsewhere_than_on_the_left_is_refused(mask: Any, why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        sequences(torch.tensor([[1, 2, 3], [4, 5, 6]]), mask)


def test_a_hole_in_the_mask_hides_a_token_and_what_is_masked_at_the_end_has_ended() -> None:
    given = sequences(torch.arange(12).view(2, 6), [[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]], may_have_ended=True)

    assert (given.pads, given.ends) == ((1, 0), (6, 4))
    assert given.tokens(0).tolist() == [1, 2, 3, 4, 5]
    assert given.hidden_tokens(0).tolist() == [False, True, False, False, False]
    assert given.tokens(1).tolist() == [6, 7, 8, 9]
    assert not given.hidden_tokens(1).any()
    assert given.visible(4).tolist() == [[False, True, False, True], [True] * 4]


@pytest.mark.parametrize("ids", [[1.5], [-1], [2**32], ["a"]], ids=str)
def test_what_is_no_token_id_is_refused(ids: Any) -> None:
    with pytest.raises(InvalidRequest):
        sequences(ids)


def test_common_tokens_are_counted_from_the_first_one() -> None:
    first = np.array([1, 2, 3, 4])
    assert common_tokens(first, first) == 4
    assert common_tokens(first, first[:2]) == 2
    assert common_tokens(first, np.array([1, 2, 9, 4])) == 2
    assert common_tokens(first, np.array([], np.int64)) == 0
