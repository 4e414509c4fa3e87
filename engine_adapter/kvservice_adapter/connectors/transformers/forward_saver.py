"""Saves the blocks of one cache while the model computes them.

Which tokens a forward computes is reported before it (`begin`). The blocks that it completes are given to the
saver layer by layer, as the layers are computed, and are sent when the forward has ended. So a prefill's
blocks are gathered one layer behind it, and while it decodes, each block as it fills.

The KV of a block must follow from the tokens in its key alone. So saving stops once the cache holds anything else:
tokens that were not reported, other positions or masks, or rows that were moved.

Keys are hashes of token ids, and masks say which tokens are hidden: these numbers are read on the host, a few bytes
per token. The KV never is: the device gathers it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvservice_adapter.breaker import Breaker
from kvservice_adapter.connectors.transformers.generation import Generation, running
from kvservice_adapter.connectors.transformers.mask_record import MaskRecord
from kvservice_adapter.device.arrays import view_of
from kvservice_adapter.device.base import Pages
from kvservice_adapter.engine.forward_saves import ForwardSaves
from kvservice_adapter.save import LayerSaver
from kvservice_adapter.session import Keys

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Forward:
    """The input of a forward: tokens ``[row, token]``, and their mask and positions, if given.

    The mask and the positions may have any form that a model accepts.
    """

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None  # In place of ids.
    attention_mask: Any
    position_ids: Any
    is_training: bool  # The model may drop states at random.


#: Called once a prompt's forward has begun: with its tokens ``[row, column]``, and which of them the mask hides.
OnPrompt = Callable[[NDArray[Any], NDArray[np.bool_]], None]


class _Place(NamedTuple):
    """The row and the column of a block's first token."""

    row: int
    column: int


@dataclass(slots=True)
class Row:
    """One sequence of the batch, and which of its blocks need not be saved any more."""

    pad: int  # Columns before its first token.
    first: int  # The column where the block after `parent` begins: the sequence's first, or after a cut.
    parent: bytes
    keys: list[bytes] = field(default_factory=list)  # Of the blocks from there on that are stored or are being saved.


@dataclass(frozen=True, slots=True)
class SaverParts:
    """The values that the savers of all caches of one connector share."""

    saver: LayerSaver
    breaker: Breaker
    keys: Callable[[], Keys]  # Raises ValueError if the model has changed.
    block_tokens: int
    dtype: torch.dtype
    tokens_max: int | None  # Rows with more tokens are not saved further: their keys are rotated in another way.
    may_hide: bool  # Whether saving continues after the attention mask has hidden tokens.
    on_prompt: OnPrompt


class ForwardSaver:
    """The saves of one cache, whose forwards run one after another. `saves` has the outcomes."""

    def __init__(
        self, parts: SaverParts, rows: Sequence[Row], token_ids: NDArray[Any], hidden: NDArray[np.bool_]
    ) -> None:
        """`token_ids`, ``[row, column]``, are what the cache holds already; `hidden`, of that shape, marks those that
        the attention mask hides, padding not included.
        """
        self.saves: ForwardSaves[_Place] = ForwardSaves(parts.saver, parts.breaker)
        self._parts = parts
        self._rows = rows
        self._known: list[Any] = [np.asarray(token_ids)]  # [row, some columns], one after another.
        self._mask = MaskRecord([row.pad for row in rows], hidden)
        self._generation: Generation | None = None
        self._prompt_columns = -1  # Until the first forward. What follows these columns was generated.
        self._columns = token_ids.shape[1]
        self._forward: tuple[int, int] | None = None  # The columns of the one that runs.
        self._stopped = ""
        self._misplaced = ""

    @property
    def stopped(self) -> str:
        """Why saving has stopped. Empty while it continues."""
        return self._stopped

    @property
    def misplaced(self) -> str:
        """Why the cache's KV does not follow from its tokens alone. Empty if no reason is known."""
        return self._misplaced

    def token_ids(self, row: int) -> NDArray[Any]:
        """The reported tokens of a row, from its first token on."""
        self._known = [np.concatenate([_on_host(each) for each in self._known], axis=1)]
        ids: NDArray[Any] = self._known[0][row, self._rows[row].pad :]
        return ids

    @property
    def has_hidden(self) -> bool:
        """Whether the attention mask hides tokens, padding not included."""
        return self._mask.has_hidden

    def hidden_tokens(self, row: int) -> NDArray[np.bool_]:
        """Which of a row's tokens are hidden, ``[token]`` from its first one on."""
        return self._mask.hidden(max(self._columns, self._mask.columns))[row, self._rows[row].pad :]

    def end_of_row(self, row: int) -> int | None:
        """The column after the tokens of a row that are kept, where `generate` has ended it and pads it; else None."""
        if self._generation is None or self._stopped or len(self._rows) < 2:
            return None
        prompt = self._prompt_columns - self._rows[row].pad
        kept = self._generation.kept(self.token_ids(row)[prompt:])
        return None if kept is None else self._prompt_columns + kept

    # The cache calls these on the engine's thread, before the model computes or in the order of its work

    def other_mask(self, forward: Forward, first: int) -> NDArray[np.bool_] | None:
        """A forward's mask of the `first` columns before it, if it is not the one they were computed with."""
        given = forward.input_ids if forward.input_ids is not None else forward.inputs_embeds
        if given is None or given.ndim < 2 or len(given) != len(self._rows) or not first:
            return None
        mask = forward.attention_mask
        if mask is None:
            visible = np.ones((len(self._rows), first + given.shape[1]), bool)
        elif _is_2d(mask, len(self._rows), first + given.shape[1]):
            visible = _read(mask)
        else:
            return None
        before = visible[:, :first]
        if np.array_equal(before, self._mask.visible(first)):
            return None
        is_counted = _are_counted(forward.position_ids, visible[:, first:], before.sum(1), or_none=True)
        return before if is_counted else None

    def adopt(self, visible: NDArray[np.bool_]) -> None:
        """The columns so far were computed again under this mask."""
        columns = visible.shape[1]
        visible = visible & self._mask.after_padding(0, columns)
        differs = (visible != self._mask.visible(columns)).any(0)
        first = int(differs.argmax()) if differs.any() else columns
        self._mask.crop(0)
        self._mask.extend(visible)
        for row in self._rows:  # Keys of blocks from there on name other KV.
            del row.keys[max(0, first - row.first) // self._parts.block_tokens :]

    def begin(self, forward: Forward, first: int) -> None:
        """A forward begins; its first token will be in column `first`."""
        self._misplaced = self._misplaced or self._mismatch(forward, first)
        if self._misplaced:
            self.stop(self._misplaced)
        elif self._forward is not None:
            self.stop("a forward was broken off")  # The forward before was interrupted, such as by KeyboardInterrupt.
        ids = forward.input_ids
        if ids is None or ids.ndim != 2 or len(ids) != len(self._rows) or first != self._columns:
            self.stop("the tokens of a forward are not known")
        if self._stopped:
            return
        assert ids is not None
        end = first + ids.shape[1]
        self._known.append(ids.clone())  # Engines may write the next tokens into the same tensor.
        self._columns = end
        self._forward = (first, end)
        if self._prompt_columns < 0 or ids.shape[1] > 1:
            is_first = self._prompt_columns < 0
            self._generation, self._prompt_columns = running(), end
            if is_first:
                self._known = [np.concatenate([_on_host(each) for each in self._known], axis=1)]
                self._parts.on_prompt(self._known[0], self._mask.hidden(end))
        try:
            for number, row in enumerate(self._rows):
                self._open(number, row, end)
        except ValueError as error:
            self.stop(str(error))

    def layer(self, index: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """A layer's buffers have the KV of new tokens, from column `first` on. Returns at once."""
        if self._stopped:
            return
        if self._forward is None or self._forward[0] != first:
            self.stop("states were added outside a forward of the model")
            return
        if not self.saves.is_any_open:
            return
        if {keys.dtype, values.dtype} != {self._parts.dtype}:
            self.stop("states are not of the layout's dtype")  # Those of autocast, for one.
        key_view, value_view = view_of(keys), view_of(values)  # Once for all rows.
        self.saves.layer(index, lambda place: Pages(key_view, value_view, [place.row], place.column))

    def end(self, *, is_whole: bool) -> None:
        """The forward has ended; `is_whole` where it raised nothing."""
        self._forward = None
        if not is_whole:
            self.stop("a forward failed")
        if not self._stopped and not self.saves.commit():  # The model has layers of other kinds.
            self.stop("not every layer of a forward was given")

    def crop(self, columns: int) -> None:
        """Columns from this one on were dropped from a layer."""
        self._mask.crop(columns)
        if self._stopped or columns >= self._columns:
            return
        self._known = [np.concatenate([_on_host(each) for each in self._known], axis=1)[:, :columns]]
        self._columns = columns
        self._prompt_columns = min(self._prompt_columns, columns)
        for row in self._rows:
            if columns < row.first:
                self.stop("the cache was cropped to before its last cut")
                return
            del row.keys[(columns - row.first) // self._parts.block_tokens :]

    def stop(self, reason: str) -> None:
        """From now on the cache's KV depends on more than its tokens."""
        if not self._stopped:
            log.info("nothing more of this cache is saved while it grows: %s", reason)
            self._stopped = reason
        self.saves.abandon()

    # Called by the connector

    def continues(self, row: int, column: int, parent: bytes) -> bool:
        """Whether a chain that begins in a column of a row, after `parent`, is of what the cache holds."""
        return (self._rows[row].first, self._rows[row].parent) == (column, parent)

    def _mismatch(self, forward: Forward, first: int) -> str:
        """Why the forward's KV does not follow from its tokens alone. Empty if it does."""
        if forward.is_training:
            return "the model is in training mode, in which it may drop states at random"
        given = forward.input_ids if forward.input_ids is not None else forward.inputs_embeds
        if given is None or given.ndim < 2:
            return "what a forward computes is not known"
        if not self._is_placed_as_expected(forward, len(given), first, first + given.shape[1]):
            return "tokens were masked or placed in another way than the call of restore says"
        longest = first + given.shape[1] - min(row.pad for row in self._rows)
        if self._parts.tokens_max is not None and longest > self._parts.tokens_max:
            return f"from {self._parts.tokens_max} tokens on the model rotates its keys in another way"
        return ""

    def _is_placed_as_expected(self, forward: Forward, rows: int, first: int, end: int) -> bool:
        """Whether tokens are placed as the history's are: each row after its padding, one position after another, and
        hidden where they were hidden before. Records which of the forward's tokens are hidden. Reads the mask once.
        """
        mask, positions = forward.attention_mask, forward.position_ids
        if mask is not None and not _is_2d(mask, rows, end):
            return False
        shown = _read(mask) if mask is not None else None
        if rows != len(self._rows):
            if any(row.pad for row in self._rows) or self.has_hidden or not (shown is None or shown.all()):
                return False
            return _are_counted(positions, np.ones((rows, end - first), bool), np.full(rows, first), or_none=True)
        before, after_padding = self._mask.visible(first), self._mask.after_padding(first, end)
        self._mask.crop(first)
        are_all = bool((self._mask.counts == first).all())
        if shown is None:
            new = np.ones((rows, end - first), bool)
            if not are_all:
                return False
        else:
            new = shown[:, first:]
            if not np.array_equal(shown[:, :first], before):
                return False
        if (new & ~after_padding).any():
            return False
        if not self._parts.may_hide and (self.has_hidden or not np.array_equal(new, after_padding)):
            return False
        if not _are_counted(positions, new, self._mask.counts, or_none=are_all and bool(new.all())):
            return False
        self._mask.extend(new)
        return True

    def _open(self, number: int, row: Row, end: int) -> None:
        """Begin to save the blocks of a row that this forward completes."""
        keys = self._parts.keys()
        tokens = self._parts.block_tokens
        column = row.first + len(row.keys) * tokens
        count = (end - column) // tokens
        if count < 1:
            return
        row_end = self.end_of_row(number)
        if row_end is not None:
            count = (row_end - column) // tokens
            if count < 1:
                return
        part = slice(column - row.pad, column - row.pad + count * tokens)
        hidden = self.hidden_tokens(number)[part] if self.has_hidden else None
        chain = keys.chain(self.token_ids(number)[part], row.keys[-1] if row.keys else row.parent, hidden=hidden)
        row.keys.extend(chain.keys)
        block_bytes = tokens * keys.layout.bytes_per_token
        self.saves.open(chain, block_bytes, lambda block: _Place(number, column + block * tokens))


def _is_2d(mask: Any, rows: int, columns: int) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and tuple(mask.shape) == (rows, columns)


def _read(mask: torch.Tensor) -> NDArray[np.bool_]:
    shown: NDArray[np.bool_] = mask.bool().numpy(force=True)
    return shown


def _are_counted(positions: Any, visible: NDArray[np.bool_], before: NDArray[np.int64], *, or_none: bool) -> bool:
    """Whether positions count the visible tokens of each row on from `before`, as `generate` does.

    `visible` is ``[row, token]``. `or_none`: what it is if there are no positions, and the model counts columns.
    """
    if positions is None:
        return or_none
    rows, tokens = visible.shape
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != tokens:
        return False
    if len(positions) not in (1, rows):
        return False
    given = positions.numpy(force=True)
    counted = before[:, None] + visible.cumsum(1) - 1
    return bool(((given == counted) | ~visible).all())


def _on_host(token_ids: Any) -> NDArray[Any]:
    return token_ids.numpy(force=True) if isinstance(token_ids, torch.Tensor) else token_ids
