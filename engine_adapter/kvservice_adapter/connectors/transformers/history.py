"""The KV that a cache begins with: loaded from the daemon, and recomputed if it does not arrive in time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvservice_adapter.device.base import Pages
from kvservice_adapter.load import LayerLoader, LoadFailed, LoadReport
from kvservice_api.errors import InvalidRequest, KVError
from kvservice_api.layout import Layout
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_ROOM_TOKENS_MIN = 64

Tensors = tuple[torch.Tensor, torch.Tensor]
Recompute = Callable[[], Sequence[Tensors]]


def room(columns: int) -> int:
    """How many spare columns a buffer of `columns` should have, so that it need not grow with every token."""
    return max(_ROOM_TOKENS_MIN, columns // 8)


def empty_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A normal tensor also in inference mode: outside of that mode, inference tensors cannot be written to.
    with torch.inference_mode(False):
        return torch.empty(*shape, dtype=dtype, device=device)


def grown(states: torch.Tensor, columns: int, columns_needed: int) -> torch.Tensor:
    """The first columns of ``[row, head, column, dim]`` in a buffer with `columns_needed` columns, and some spare
    ones.
    """
    rows, heads, _, dim = states.shape
    buffer = empty_buffer((rows, heads, columns_needed + room(columns_needed), dim), states.dtype, states.device)
    buffer[..., :columns, :].copy_(states[..., :columns, :])
    return buffer


class Buffers:
    """Each layer's keys and values ``[row, head, column, dim]``, made when its first bytes are there, or by `make`.
    Thread-safe.
    """

    def __init__(
        self, layout: Layout, pads: Sequence[int], columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`columns` are those that loads fill, at most; a row's first `pads` stay zero. There is room for more after
        them. The buffers are on `device`, where the model computes.
        """
        self._layout = layout
        self._pads = pads
        self._columns = columns
        self._dtype = dtype
        self._device = device
        self._lock = threading.Lock()
        self._layers: dict[int, Tensors] = {}
        self._raw: dict[int, torch.Tensor] = {}

    def make(self, *, with_raw_keys: bool) -> None:
        """Make all of them now, on the engine's thread: another stream may write to them once that has computed what
        used their memory before.
        """
        for index in range(self._layout.layers):
            self.of(index)
            if with_raw_keys:
                self.raw_keys(index)

    def of(self, index: int) -> Tensors:
        with self._lock:
            if index not in self._layers:
                group = self._layout.group_of(index)
                self._layers[index] = self._new(index, group.k_head_dim), self._new(index, group.v_head_dim)
            return self._layers[index]

    def raw_keys(self, index: int) -> torch.Tensor:
        """Keys before rotation, for layouts that keep those."""
        with self._lock:
            if index not in self._raw:
                self._raw[index] = self._new(index, self._layout.group_of(index).k_head_dim)
            return self._raw[index]

    def take_raw_keys(self, index: int) -> torch.Tensor | None:
        with self._lock:
            return self._raw.pop(index, None)

    def take(self, index: int) -> Tensors:
        """Give a layer's buffers to the caller, who owns them from now on."""
        buffers = self.of(index)
        with self._lock:
            del self._layers[index]
        return buffers

    def pages(self, row: int, column: int, index: int) -> Pages:
        """A row's of a layer, from a column on."""
        keys, values = self.of(index)
        return Pages(keys, values, [row], column)

    def raw_pages(self, row: int, column: int, index: int) -> Pages:
        """As `pages`, for a layer as it is stored: keys before rotation."""
        return Pages(self.raw_keys(index), self.of(index)[1], [row], column)

    def _new(self, index: int, dim: int) -> torch.Tensor:
        columns = self._columns + room(self._columns)
        shape = len(self._pads), self._layout.group_of(index).kv_heads, columns, dim
        buffer = empty_buffer(shape, self._dtype, self._device)
        for row, pad in enumerate(self._pads):
            buffer[row, :, :pad].zero_()
        return buffer


class Head(NamedTuple):
    """What was computed of the history, while the rest of it was loaded: its first tokens."""

    layers: dict[int, Tensors]  # Each is forgotten once it is joined with the rest.
    tokens: int


class History:
    """The initial contents of a cache: nothing, if it is not a `LoadedHistory`. For the engine's thread."""

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.columns = columns
        self.dtype, self.device = dtype, device
        self.lost_s = 0.0  # How long forwards waited for it so far.
        self.recompute_s = 0.0  # How long it took to compute it in place of loading it; 0 if it was loaded.
        self.error: BaseException | None = None  # Why some of it was computed again.

    @property
    def load_reports(self) -> Sequence[LoadReport]:
        """One per load, so far."""
        return ()

    def begin(self) -> None:
        """The request runs: the model will take the layers one after another."""

    def compute_masked(self, visible: NDArray[np.bool_]) -> bool:
        """Compute it under another attention mask ``[row, column]`` than it was stored with.

        Returns False, without effect, if a layer was taken before, or the history was cut.
        """
        return True

    def layer(self, index: int) -> Tensors:
        """A layer's buffers; the history is their first `columns` columns. Waits for a bounded time; raises no
        KVError.
        """
        raise AssertionError("there is nothing to wait for")

    def raw_keys(self, index: int) -> torch.Tensor | None:
        """As `layer`, after it: the keys before rotation, if the layout keeps those."""
        return None

    def close(self) -> None:
        """End the loads: later layers are not requested. Does not wait."""


class LoadedHistory(History):
    """A history that is loaded, or recomputed if it does not arrive in time."""

    def __init__(
        self,
        buffers: Buffers,
        columns: int,
        loaders: Sequence[LayerLoader],
        recompute: Recompute,
        *,
        layer_count: int,
        wait_s: float,
        clock: Clock = SYSTEM_CLOCK,
        dtype: torch.dtype,
        device: torch.device,
        head: Head | None,
        recompute_masked: Callable[[NDArray[np.bool_]], Sequence[Tensors]] | None,
        unrotate: Callable[[int, torch.Tensor], torch.Tensor] | None,
        on_end: Callable[[LoadedHistory], None],
        lines: RateLimitedLog,
    ) -> None:
        """`recompute` gives every layer's keys and values, ``[row, head, column, dim]`` of `columns` columns.

        `recompute_masked` gives the same under an attention mask ``[row, column]``; None if that is not known.
        `wait_s` bounds the wait for a layer, of all rows together, by `clock`.
        `unrotate` is for layouts that keep keys before rotation: it gives those of a layer whose keys were computed.
        `on_end` is called once: when the last layer has arrived, or the first has failed. `lines` is shared by
        histories, so that their log lines are limited together.
        """
        super().__init__(columns, dtype, device)
        self._buffers = buffers
        self.loaders = loaders
        self._recompute = recompute
        self._recompute_masked = recompute_masked
        self._is_taken = False  # Some layer was given to the cache.
        self._layer_count = layer_count
        self._wait_s = wait_s
        self._clock = clock
        self._head = head
        self._unrotate = unrotate
        self._on_end = on_end
        self._lines = lines
        self._recomputed: dict[int, Tensors] | None = None  # Computed layers that the cache has not taken yet.
        self._recomputed_raw: dict[int, torch.Tensor] = {}

    @property
    def load_reports(self) -> Sequence[LoadReport]:
        return [loader.report for loader in self.loaders]

    def begin(self) -> None:
        for loader in self.loaders:
            loader.request_runs()

    def compute_masked(self, visible: NDArray[np.bool_]) -> bool:
        if self._is_taken or self._recompute_masked is None:
            return False
        self._recompute = partial(self._recompute_masked, visible)
        self.error = InvalidRequest(
            "the attention mask hides tokens of the history that the call of restore does not name: it is computed"
        )
        self._compute(0)
        return True

    def layer(self, index: int) -> Tensors:
        self._is_taken = True
        if self._recomputed is None:
            begin_s = self._clock.now_s()
            try:
                for loader in self.loaders:  # One per row. Each row's columns of the same buffers.
                    loader.wait(index, max(0.0, begin_s + self._wait_s - self._clock.now_s()))
            except LoadFailed as error:
                self.error = error.__cause__ or error
                self.lost_s += self._clock.now_s() - begin_s
                self._compute(index)
            else:
                self.lost_s += self._clock.now_s() - begin_s
                return self._loaded(index)
        assert self._recomputed is not None
        keys, values = self._recomputed.pop(index)
        if self._unrotate is not None:
            self._recomputed_raw[index] = self._unrotate(index, keys)
        return keys, values

    def raw_keys(self, index: int) -> torch.Tensor | None:
        if self._recomputed is None:
            return self._buffers.take_raw_keys(index)
        return self._recomputed_raw.pop(index, None)

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()

    def _loaded(self, index: int) -> Tensors:
        keys, values = self._buffers.take(index)
        if self._head is not None:
            head_keys, head_values = self._head.layers.pop(index)
            keys[:, :, : self._head.tokens].copy_(head_keys)
            values[:, :, : self._head.tokens].copy_(head_values)
        if index == self._layer_count - 1:
            self._on_end(self)
        return keys, values

    def _compute(self, index: int) -> None:
        """Recompute all layers from this one on, into other memory, because a late load may still write into the
        buffers.
        """
        why = self.error.reason if isinstance(self.error, KVError) else type(self.error).__name__
        self._lines.warning(
            "the history is computed from layer %d on, not loaded: %s: %s", index, why, self.error, kind=str(why)
        )
        self.close()
        begin_s = self._clock.now_s()
        self._recomputed = dict(enumerate(self._recompute()))
        self.recompute_s = self._clock.now_s() - begin_s
        self.lost_s += self.recompute_s
        self._on_end(self)
