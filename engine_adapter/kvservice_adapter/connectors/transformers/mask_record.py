"""Which tokens the attention masks of one cache's forwards have hidden."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROOM_COLUMNS_MIN = 64


class MaskRecord:
    """The attention mask that a cache's columns were computed with, ``[row, column]``; padding on the left is hidden.

    A forward adds its new columns to a buffer that has room for more, so that a decoding step costs one comparison
    with the mask it is given. For one thread at a time.
    """

    def __init__(self, pads: Sequence[int], hidden: NDArray[np.bool_]) -> None:
        """`pads`: columns of padding per row. `hidden`: ``[row, column]``, other tokens that the mask hides."""
        self._pads = np.asarray(pads, np.int64)[:, None]
        self._buffer: NDArray[np.bool_] = np.empty((len(pads), 0), bool)
        self.columns = 0
        self.counts: NDArray[np.int64] = np.zeros(len(pads), np.int64)  # Visible columns per row.
        self.extend(self.after_padding(0, hidden.shape[1]) & ~hidden)

    def visible(self, columns: int) -> NDArray[np.bool_]:
        """The mask of the first `columns` columns, valid until the next change. Columns that no mask named count as
        visible.
        """
        if columns > self.columns:
            self.extend(self.after_padding(self.columns, columns))
        return self._buffer[:, :columns]

    def hidden(self, columns: int) -> NDArray[np.bool_]:
        """Which of the first `columns` columns are hidden, padding not included."""
        return ~self.visible(columns) & self.after_padding(0, columns)

    @property
    def has_hidden(self) -> bool:
        """Whether any column is hidden, padding not included."""
        return bool((self.counts < self.columns - self._pads[:, 0]).any())

    def after_padding(self, first: int, end: int) -> NDArray[np.bool_]:
        """Which of columns `first` to `end` are after their row's padding."""
        shown: NDArray[np.bool_] = np.arange(first, end) >= self._pads
        return shown

    def extend(self, visible: NDArray[np.bool_]) -> None:
        """Add the mask of the next columns."""
        end = self.columns + visible.shape[1]
        if end > self._buffer.shape[1]:
            buffer = np.empty((len(self._buffer), end + max(_ROOM_COLUMNS_MIN, end // 8)), bool)
            buffer[:, : self.columns] = self._buffer[:, : self.columns]
            self._buffer = buffer
        self._buffer[:, self.columns : end] = visible
        self.counts = self.counts + visible.sum(1)
        self.columns = end

    def crop(self, columns: int) -> None:
        """Drop the columns from this one on."""
        if columns < self.columns:
            self.columns = columns
            self.counts = self._buffer[:, :columns].sum(1)
