"""Sequences of a batch, padded on the left so that all end in the same column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvservice_adapter.connectors.transformers.model_layout import UnsupportedModel
from kvservice_api.errors import InvalidRequest

_TOKEN_ID_MAX = 2**32 - 1

TokenIds = Sequence[int] | NDArray[Any] | torch.Tensor


class Sequences(NamedTuple):
    """Token ids ``[row, column]``, and how many columns of each row are padding."""

    ids: NDArray[Any]
    pads: tuple[int, ...]

    def tokens(self, row: int, columns: int | None = None) -> NDArray[Any]:
        """A row's, from its first token to before column `columns`."""
        ids: NDArray[Any] = self.ids[row, self.pads[row] : columns]
        return ids

    @property
    def columns(self) -> int:
        return int(self.ids.shape[1])


def sequences(token_ids: TokenIds, attention_mask: Any = None) -> Sequences:
    """Token ids and padding, as they are given.

    `token_ids` are one sequence, or ``[row, column]``; the mask has their shape, with 0 for padding.

    Raises InvalidRequest for what are no token ids; UnsupportedModel for a batch without a mask, and for padding
    that is not on the left.
    """
    ids = np.atleast_2d(_array(token_ids))
    if ids.ndim != 2:
        raise UnsupportedModel(f"token ids are [row, column], not {ids.ndim}-dimensional")
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > _TOKEN_ID_MAX):
        raise InvalidRequest(f"token ids are integers from 0 to {_TOKEN_ID_MAX}", field="token_ids")
    if attention_mask is None:
        if len(ids) != 1:
            raise UnsupportedModel(f"a batch of {len(ids)} sequences needs its attention_mask")
        return Sequences(ids, (0,))
    mask = np.atleast_2d(_array(attention_mask))
    if mask.shape[0] != ids.shape[0] or mask.shape[1] > ids.shape[1]:
        raise UnsupportedModel(f"the attention mask is {mask.shape}; the token ids are {ids.shape}")
    is_token = mask != 0
    if not is_token[:, -1:].all() or (is_token[:, 1:] < is_token[:, :-1]).any():
        raise UnsupportedModel("sequences of a batch are padded on the left")
    return Sequences(ids, tuple((mask.shape[1] - is_token.sum(1)).tolist()))


def common_tokens(first: NDArray[Any], second: NDArray[Any]) -> int:
    """How many leading tokens two sequences share."""
    count = min(len(first), len(second))
    differ = np.flatnonzero(first[:count] != second[:count])
    return int(differ[0]) if len(differ) else count


def _array(values: Any) -> NDArray[Any]:
    """A copy: the caller may write other tokens into the same memory, before these are used for the last time."""
    return np.array(values.numpy(force=True) if isinstance(values, torch.Tensor) else values)
