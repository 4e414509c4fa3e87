"""The CPU as a device: a stream is one thread, and its copies release the interpreter's lock.

Copies are NumPy's. A stream never calls torch: an operation of some size would start a team of threads for each thread
that calls it, and a stream's team would compete with the engine's for the same cores.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.device.arrays import ArrayView, bits_of, view_of
from kvservice_adapter.device.base import Computed, Device, Event, Pages, Piece, Slices, Staging, Stream, StreamClosed
from kvservice_adapter.device.paged_runs import paged_runs
from kvservice_adapter.device.rotation import Rotation
from kvservice_api import copying
from kvservice_api.copying import Table
from kvservice_api.image import checksum
from kvservice_client.buffers import Bytes

_Bits = NDArray[Any]


class CpuDevice(Device):
    def stream(self, name: str) -> CpuStream:
        return CpuStream(self, name)

    def staging(self, size_bytes: int) -> Staging:
        return Staging(np.empty(size_bytes, np.uint8))

    def computed(self) -> Computed:
        return Computed()

    def wait_in_compute(self, event: Event, timeout_s: float) -> bool:
        return event.wait(timeout_s)

    def rotate(self, keys: Any, rotation: Rotation) -> None:
        view = view_of(keys)
        self.rotate_bits(self.bits(view), view.dtype, rotation, 0)

    # On a stream's thread. A device whose memory the host cannot touch has other means.

    def bits(self, view: ArrayView) -> _Bits:
        """An engine's elements, as integers of their size."""
        return bits_of(view)

    def copy(self, source: _Bits, target: _Bits) -> None:
        np.copyto(target, source)

    def rotate_bits(self, keys: _Bits, dtype: str, rotation: Rotation, first_token: int) -> None:
        rotation.rotate_bits(keys, dtype, first_token)


class CpuEvent(Event):
    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    @property
    def error(self) -> Exception | None:
        return self._error

    def wait(self, timeout_s: float) -> bool:
        return self._done.wait(timeout_s)

    def end(self, error: Exception | None) -> None:
        self._error = error
        self._done.set()


class Worker:
    """Runs work in order, on a thread that exists only while there is work. It holds no reference to its stream.

    Work may be given from a destructor, wherever the garbage collector runs it, and after the collector has
    dropped the stream: it runs destructors last. The lock is reentrant, because a destructor may run while
    its thread holds it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()
        self._queue: SimpleQueue[tuple[Callable[[], None], CpuEvent] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = self._dropped = False
        _workers.add(self)

    def give(self, work: Callable[[], None], event: CpuEvent) -> None:
        with self._lock:
            if self._closed:
                raise StreamClosed(f"the stream {self._name} takes no more work")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    thread.start()  # Before the work is queued: work that is refused must not be done later.
                except RuntimeError as error:
                    raise StreamClosed(f"the stream {self._name} takes no work: {error}") from error
                self._thread = thread
            self._queue.put((work, event))
            if self._dropped:
                self._queue.put(None)

    def close(self) -> None:
        """Refuse later work, and end the thread when all earlier work is done."""
        with self._lock:
            self._closed = True
            self.drop()

    def drop(self) -> None:
        """End the thread whenever there is no work: only destructors may still submit some."""
        with self._lock:
            self._dropped = True
            if self._thread is not None:
                self._queue.put(None)

    def join(self, timeout_s: float) -> bool:
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return self._thread is None

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                with self._lock:
                    self._thread = None
                    if self._queue.empty() or self._thread is not None:
                        return
                    self._thread = threading.current_thread()
                continue
            work, event = item
            error = None
            try:
                work()
            except Exception as raised:
                error = raised
            del item, work  # An event that is kept keeps no array.
            event.end(error)


class CpuStream(Stream):
    """One thread, from the first work on until the stream is closed or dropped."""

    sums_slices = True

    def __init__(self, device: CpuDevice, name: str) -> None:
        self._device = device
        self._worker = Worker(name)
        weakref.finalize(self, self._worker.drop).atexit = False

    def submit(self, work: Callable[[], None], *, waits: bool = True) -> CpuEvent:
        event = CpuEvent()
        self._worker.give(work, event)
        return event

    def after(self, computed: Computed) -> None:
        computed.check()

    def scatter(
        self,
        slices: Slices,
        token_counts: Sequence[int],
        pages: Pages,
        rotation: Rotation | None = None,
        then: Callable[[], None] | None = None,
        verify: Callable[[NDArray[np.uint64]], None] | None = None,
    ) -> CpuEvent:
        def work() -> None:
            keys, values = self._device.bits(pages.key_view), self._device.bits(pages.value_view)
            stored = _Stored(slices, token_counts, pages)
            sums = self._copied_at_once(stored, keys, values, summed=verify is not None)
            is_copied = sums is not None
            if sums is None and verify is not None:
                sums = stored.sums()
            if verify is not None and sums is not None:
                verify(sums)
            for piece, source_keys, source_values in () if is_copied and rotation is None else stored.pieces():
                if not is_copied:
                    self._device.copy(source_keys, _paged(keys, piece))
                    self._device.copy(source_values, _paged(values, piece))
                if rotation is not None:
                    tokens = piece.blocks * piece.tokens
                    turned = keys[piece.page_id, :, piece.token_of_page : piece.token_of_page + tokens]
                    self._device.rotate_bits(turned, pages.key_view.dtype, rotation, stored.first_token(piece))
            if then is not None:
                then()

        return self.submit(work)

    def _copied_at_once(
        self, stored: _Stored, keys: _Bits, values: _Bits, *, summed: bool
    ) -> NDArray[np.uint64] | None:
        """Copy all blocks in one call, and return their checksums. None if they must be copied piece by piece."""
        if copying.native is None or type(self._device).copy is not CpuDevice.copy or stored.sources is None:
            return None
        tables = stored.tables()
        if tables is None:
            return None
        streamed = stored.size_bytes >= copying.STREAMED_BYTES_MIN
        return copying.copy_slices(stored.sources, [keys, values], *tables, streamed=streamed, summed=summed)

    def gather(
        self,
        pages: Pages,
        token_counts: Sequence[int],
        into: Slices,
        on_block: Callable[[int], None] | None = None,
    ) -> CpuEvent:
        def work() -> None:
            keys, values = self._device.bits(pages.key_view), self._device.bits(pages.value_view)
            done = 0  # Blocks.
            for piece, target_keys, target_values in _Stored(into, token_counts, pages).pieces():
                while on_block is not None and done < piece.block:
                    on_block(done)
                    done += 1
                self._device.copy(_paged(keys, piece), target_keys)
                self._device.copy(_paged(values, piece), target_values)
            if on_block is not None:
                for block in range(done, len(token_counts)):
                    on_block(block)

        return self.submit(work)

    def close(self) -> None:
        self._worker.close()

    def join(self, timeout_s: float) -> bool:
        """Wait for a closed stream's thread to end, at most that long. Whether it has."""
        return self._worker.join(timeout_s)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_EXIT_S = 1.0


@atexit.register
def _end_all() -> None:
    """A thread that still works while the interpreter shuts down may crash it: wait a bounded time for each to end."""
    end_s = time.monotonic() + _EXIT_S
    workers = list(_workers)
    for worker in workers:
        worker.close()
    for worker in workers:
        worker.join(max(0.0, end_s - time.monotonic()))


def _paged(states: _Bits, piece: Piece) -> _Bits:
    """A piece's keys or values where the engine has them: ``[head, token, dim]``, or ``[head, block, token, dim]``."""
    _, blocks, _, tokens, page_id, first = piece
    part: _Bits = states[page_id, :, first : first + blocks * tokens]
    return part if blocks == 1 else part.reshape(len(part), blocks, tokens, -1)


class _Stored:
    """The blocks of one layer as they are stored: in one array, or in an array or two per block."""

    def __init__(self, slices: Slices, token_counts: Sequence[int], pages: Pages) -> None:
        """Raises ValueError where sizes do not agree."""
        self._pages, self._token_counts = pages, token_counts
        self._starts = [0, *accumulate(token_counts)]
        self._heads = pages.key_view.shape[1]
        self._dims = pages.key_view.shape[3], pages.value_view.shape[3]
        self._element = f"u{pages.key_view.item_bytes}"  # Elements are copied as integers.
        self._joined = slices if isinstance(slices, np.ndarray) else None
        self._per_block = [] if isinstance(slices, np.ndarray) else [_arrays(each) for each in slices]
        tokens = self._starts[-1]
        size_bytes = slices.size if isinstance(slices, np.ndarray) else 0
        if self._joined is None:
            if len(self._per_block) != len(token_counts):
                raise ValueError(f"{len(self._per_block)} slices are given for {len(token_counts)} blocks")
            size_bytes = sum(array.size for arrays in self._per_block for array in arrays)
        if size_bytes != tokens * pages.token_bytes:
            raise ValueError(f"{size_bytes} bytes are given; these {tokens} tokens have {tokens * pages.token_bytes}")
        self.size_bytes = size_bytes
        # One array of all blocks, or one per block; None if a block's keys and values are apart.
        self.sources: Sequence[Bytes] | None = None
        if self._joined is not None:
            self.sources = [self._joined]
        elif all(len(arrays) == 1 for arrays in self._per_block):
            self.sources = [arrays[0] for arrays in self._per_block]

    def tables(self) -> tuple[Table, Table] | None:
        """How all blocks are copied in one call; None if they cannot."""
        return paged_runs(self._pages, self._token_counts, joined=self._joined is not None)

    def sums(self) -> NDArray[np.uint64]:
        """The xxh3-64 of each block's slice, which is in one array."""
        assert self._joined is None and self.sources is not None
        return np.array([checksum(source.data) for source in self.sources], np.uint64)

    def pieces(self) -> Iterator[tuple[Piece, _Bits, _Bits]]:
        """Each piece, its keys and its values, in the shapes of `_paged`."""
        block = -1
        for piece in self._pages.pieces(self._token_counts, join_blocks=self._joined is not None):
            number, blocks, first, tokens, _, _ = piece
            if blocks > 1:
                keys, values = self._states(number, blocks)
                yield piece, keys.swapaxes(0, 1), values.swapaxes(0, 1)
                continue
            if number != block:
                (keys, values), block = self._states(number, 1), number
            yield piece, keys[0, :, first : first + tokens], values[0, :, first : first + tokens]

    def first_token(self, piece: Piece) -> int:
        """The piece's first token, counted from the first block's."""
        return self._starts[piece.block] + piece.token_of_block

    def _states(self, first: int, count: int) -> tuple[_Bits, _Bits]:
        """Keys and values of whole, equally long blocks: ``[block, head, token, dim]``."""
        tokens, (k_dim, v_dim) = self._token_counts[first], self._dims
        arrays: tuple[Bytes, ...]
        if self._joined is None:
            arrays = self._per_block[first]
        else:
            begin, size = self._starts[first], count * tokens
            arrays = (self._joined[begin * self._pages.token_bytes : (begin + size) * self._pages.token_bytes],)
        if len(arrays) == 2:
            keys, values = (array.view(self._element) for array in arrays)
        else:
            blocks, edge = arrays[0].view(self._element).reshape(count, -1), self._heads * tokens * k_dim
            keys, values = blocks[:, :edge], blocks[:, edge:]
        heads = self._heads
        return keys.reshape(count, heads, tokens, k_dim), values.reshape(count, heads, tokens, v_dim)


def _arrays(slices: Bytes | Sequence[Bytes]) -> tuple[Bytes, ...]:
    return (slices,) if isinstance(slices, np.ndarray) else tuple(slices)
