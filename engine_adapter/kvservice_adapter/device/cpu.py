"""The CPU as a device: a stream is one thread, and its copies let go of the interpreter's lock.

Copies are NumPy's, not torch's. A torch operation of some size wants a team of threads for each thread
that calls it; a stream's team would spin beside the engine's, on the same cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvservice_adapter.device.base import Device, Event, Pages, Piece, Rotation, Staging, Stream, StreamClosed
from kvservice_client.buffers import Bytes

# Numbers are copied as integers of their size: NumPy has no bfloat16 or float8.
_TORCH_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY_BITS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}

_Bits = NDArray[Any]


class CpuDevice(Device):
    def stream(self, name: str) -> CpuStream:
        return CpuStream(self, name)

    def staging(self, size_bytes: int) -> Staging:
        return Staging(np.empty(size_bytes, np.uint8))

    def wait_in_compute(self, event: Event, timeout_s: float) -> bool:
        return event.wait(timeout_s)


class CpuEvent(Event):
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    @property
    def is_done(self) -> bool:
        return self._future.done()

    @property
    def error(self) -> Exception | None:
        error = self._future.exception() if self._future.done() else None
        assert error is None or isinstance(error, Exception)
        return error

    def wait(self, timeout_s: float) -> bool:
        return self._future.done() or bool(wait([self._future], timeout_s).done)


class CpuStream(Stream):
    """A thread that starts with the first work, and ends when the stream is closed or dropped."""

    def __init__(self, device: Device, name: str) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, work: Callable[[], None]) -> CpuEvent:
        try:
            return CpuEvent(self._thread.submit(work))
        except RuntimeError as error:  # Closed, or the interpreter ends.
            raise StreamClosed(str(error)) from None

    def scatter(
        self, slices: Bytes, token_counts: Sequence[int], pages: Pages, rotation: Rotation | None = None
    ) -> CpuEvent:
        def work() -> None:
            token = 0
            for piece in pages.pieces(token_counts):
                for stored, paged in zip(
                    _stored(slices, token_counts, pages, piece), _paged(pages, piece), strict=True
                ):
                    np.copyto(paged, stored)
                tokens = piece.blocks * piece.tokens
                if rotation is not None:
                    keys = pages.keys[piece.page_id, :, piece.token_of_page : piece.token_of_page + tokens]
                    self._device.rotate(keys, rotation, token)
                token += tokens

        return self.submit(work)

    def gather(
        self, pages: Pages, token_counts: Sequence[int], into: Bytes, rotation: Rotation | None = None
    ) -> CpuEvent:
        def work() -> None:
            for piece in pages.pieces(token_counts):
                stored = _stored(into, token_counts, pages, piece)
                for source, target in zip(_paged(pages, piece), stored, strict=True):
                    np.copyto(target, source)
            if rotation is not None:
                for first_token, keys in _stored_keys(into, token_counts, pages):
                    self._device.rotate(keys, rotation, first_token)

        return self.submit(work)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> CpuEvent:
        def work() -> None:
            if source.shape != target.shape or source.dtype != target.dtype:
                raise ValueError(f"{tuple(source.shape)} {source.dtype} is not {tuple(target.shape)} {target.dtype}")
            np.copyto(_bits(target), _bits(source))

        return self.submit(work)

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def _bits(tensor: torch.Tensor) -> _Bits:
    array: _Bits = tensor.detach().view(_TORCH_BITS[tensor.element_size()]).numpy()
    return array


def _paged(pages: Pages, piece: Piece) -> Iterator[_Bits]:
    """A piece's keys, then its values, where the engine has them: ``[head, block, token, dim]``."""
    for states in (pages.keys, pages.values):
        heads, _, dim = states.shape[1:]
        tokens = slice(piece.token_of_page, piece.token_of_page + piece.blocks * piece.tokens)
        yield _bits(states)[piece.page_id, :, tokens].reshape(heads, piece.blocks, piece.tokens, dim)


def _stored(slices: Bytes, token_counts: Sequence[int], pages: Pages, piece: Piece) -> Iterator[_Bits]:
    """A piece's keys, then its values, as they are stored: ``[head, block, token, dim]``."""
    _check_size(slices, token_counts, pages)
    count, heads = token_counts[piece.block], pages.keys.shape[1]
    start = sum(token_counts[: piece.block]) * pages.token_bytes
    end = start + piece.blocks * count * pages.token_bytes
    blocks = slices[start:end].view(_NUMPY_BITS[pages.keys.element_size()]).reshape(piece.blocks, -1)
    tokens = slice(piece.token_of_block, piece.token_of_block + piece.tokens)
    first = 0
    for states in (pages.keys, pages.values):
        size = heads * count * states.shape[3]
        part = blocks[:, first : first + size].reshape(piece.blocks, heads, count, states.shape[3])
        yield part[:, :, tokens].transpose(1, 0, 2, 3)
        first += size


def _stored_keys(slices: Bytes, token_counts: Sequence[int], pages: Pages) -> Iterator[tuple[int, torch.Tensor]]:
    """Each block's first token and its keys, ``[head, token, dim]``, as they are stored."""
    heads, dim = pages.keys.shape[1], pages.keys.shape[3]
    elements = torch.from_numpy(slices).view(pages.keys.dtype)
    token_elements = pages.token_bytes // pages.keys.element_size()
    for first_token, count in zip(accumulate(token_counts, initial=0), token_counts, strict=False):
        start = first_token * token_elements
        yield first_token, elements[start : start + heads * count * dim].view(heads, count, dim)


def _check_size(slices: Bytes, token_counts: Sequence[int], pages: Pages) -> None:
    expected = sum(token_counts) * pages.token_bytes
    if slices.size != expected:
        raise ValueError(f"{slices.size} bytes are given; these {sum(token_counts)} tokens have {expected}")
