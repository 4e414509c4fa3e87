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
    """Token ids ``[row, column]``, how many columns of each row are padding, and which tokens the mask hides."""

    ids: NDArray[Any]
    pads: tuple[int, ...]
    ends: tuple[int, ...]  # The column after each row's last token.
    hidden: NDArray[np.bool_]  # ``[row, column]``, padding not included.

    def tokens(self, row: int, columns: int | None = None) -> NDArray[Any]:
        """A row's, from its first token to before column `columns`."""
        end = self.ends[row] if columns is None else min(columns, self.ends[row])
        ids: NDArray[Any] = self.ids[row, self.pads[row] : end]
        return ids

    def hidden_tokens(self, row: int) -> NDArray[np.bool_]:
        """Which of a row's tokens are hidden, from its first token on."""
        return self.hidden[row, self.pads[row] : self.ends[row]]

    def visible(self, columns: int | None = None) -> NDArray[np.bool_]:
        """The attention mask of the first `columns` columns, ``[row, column]``."""
        after_pad = np.arange(self.columns)[None] >= np.asarray(self.pads)[:, None]
        shown: NDArray[np.bool_] = (after_pad & ~self.hidden)[:, :columns]
        return shown

    def hiding(self, token: int | None) -> Sequences:
        """The same, with every occurrence of a token hidden; None hides nothing more."""
        if token is None:
            return self
        after_pad = np.arange(self.columns)[None] >= np.asarray(self.pads)[:, None]
        return self._replace(hidden=self.hidden | ((self.ids == token) & after_pad))

    @property
    def columns(self) -> int:
        return int(self.ids.shape[1])


def sequences(token_ids: TokenIds, attention_mask: Any = None, *, may_have_ended: bool = False) -> Sequences:
    """Token ids and padding, as they are given.

    `token_ids` are one sequence, or ``[row, column]``; the mask has their shape, or fewer columns, with 0 for padding
    on the left and for tokens that are hidden. With `may_have_ended`, rows may also be padded on the right: they have
    ended there.

    Raises InvalidRequest for invalid token ids; UnsupportedModel for a batch without a mask, and for padding
    on the right.
    """
    ids = np.atleast_2d(_array(token_ids))
    if ids.ndim != 2:
        raise UnsupportedModel(f"token ids are [row, column], not {ids.ndim}-dimensional")
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > _TOKEN_ID_MAX):
        raise InvalidRequest(f"token ids are integers from 0 to {_TOKEN_ID_MAX}", field="token_ids")
    if attention_mask is None:
        if len(ids) != 1:
            raise UnsupportedModel(f"a batch of {len(ids)} sequences needs its attention_mask")
        return Sequences(ids, (0,), (ids.size,), np.zeros(ids.shape, bool))
    mask = np.atleast_2d(_array(attention_mask))
    if mask.shape[0] != ids.shape[0] or mask.shape[1] > ids.shape[1]:
        raise UnsupportedModel(f"the attention mask is {mask.shape}; the token ids are {ids.shape}")
    is_token: NDArray[np.bool_] = np.ones(ids.shape, bool)
    is_token[:, : mask.shape[1]] = mask != 0
    if not is_token.any(1).all() or not (may_have_ended or is_token[:, -1:].all()):
        raise UnsupportedModel("sequences of a batch are padded on the left, and have at least one token")
    pads = is_token.argmax(1)
    ends = is_token.shape[1] - is_token[:, ::-1].argmax(1)
    columns = np.arange(ids.shape[1])
    hidden = ~is_token & (columns >= pads[:, None]) & (columns < ends[:, None])
    return Sequences(ids, tuple(pads.tolist()), tuple(ends.tolist()), hidden)


def common_tokens(first: NDArray[Any], second: NDArray[Any]) -> int:
    """How many leading tokens two sequences share."""
    count = min(len(first), len(second))
    differ = np.flatnonzero(first[:count] != second[:count])
    return int(differ[0]) if len(differ) else count


def _array(values: Any) -> NDArray[Any]:
    """A copy: the caller may write other tokens into the same memory, before these are used for the last time."""
    return np.array(values.numpy(force=True) if isinstance(values, torch.Tensor) else values)
