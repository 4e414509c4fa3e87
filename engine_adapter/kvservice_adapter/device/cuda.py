"""A CUDA device as the pipelines need it, with CuPy: copies run on streams of ours, beside the engine's.

The engine's thread only records events on its own stream, and has that stream wait for others. A stream's thread queues
copies, and another one learns of their end. What CUDA reports is in events, and never raised into the engine's calls.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.device.arrays import CUDA, ArrayView, view_of
from kvservice_adapter.device.base import Computed, Device, Event, NotTurned, Pages, Slices, Staging, Stream
from kvservice_adapter.device.cpu import CpuEvent, Worker
from kvservice_adapter.device.rotation import Rotation
from kvservice_api.cuda.geometry import LayerPages, PageArray
from kvservice_api.cuda.host_memory import HostMemory, Range, host_memory_of_process
from kvservice_api.cuda.layer_copies import SLOT_BYTES, LayerCopies
from kvservice_api.cuda.page_kernels import PageKernels
from kvservice_api.cuda.runtime import Gpu, why_unavailable
from kvservice_client.buffers import Bytes
from kvservice_client.retry import SYSTEM_CLOCK

log = logging.getLogger(__name__)

_CAPTURING = "the engine's work is being captured in a CUDA graph, in which no event of others may be"
_CAPTURE_IMPLICIT = 906  # The legacy default stream while another one captures.
_ASK_S, _ASK_MAX_S = 0.0002, 0.005  # Between two questions whether an event is done.
_FOREVER_S = 1e9
_BROKEN = "the CUDA device has failed for this process"

_opened: weakref.WeakValueDictionary[int, CudaDevice] = weakref.WeakValueDictionary()
_lock = threading.Lock()


class CudaUnavailable(Exception):
    """The GPU cannot be used through CuPy. The message says why."""


def open_device(ordinal: int, current_stream: Callable[[], int]) -> CudaDevice:
    """The device of a GPU: one object while it is used, so that its staging is there once. Raises CudaUnavailable."""
    if why := why_unavailable():
        raise CudaUnavailable(why)
    with _lock:
        device = _opened.get(ordinal)
        if device is None or device.gpu.is_broken:
            try:
                device = _opened[ordinal] = CudaDevice(Gpu(ordinal), current_stream)
            except Exception as error:  # No memory, or no compiler: of CuPy's many kinds.
                raise CudaUnavailable(f"{type(error).__name__}: {error}") from error
        return device


class CudaDevice(Device):
    """Of one GPU. All its streams share the staging of a direction, which one of them uses at a time."""

    layers_under_way = 16  # Queued, while the GPU may still compute what the engine gave it before.

    def __init__(
        self,
        gpu: Gpu,
        current_stream: Callable[[], int],
        *,
        host_memory: HostMemory | None = None,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        """`current_stream` gives the engine's current stream, a cudaStream_t, on the engine's thread.

        Compiles the kernels and allocates all staging, which takes seconds. Raises CUDARuntimeError if there is no
        memory for it.
        """
        self.gpu = gpu
        self._current_stream = current_stream
        with gpu.current():
            self.host_memory = host_memory or host_memory_of_process(gpu)
            self.kernels = PageKernels(gpu)
            self.loads = _Direction(LayerCopies(gpu, self.host_memory, self.kernels, slot_bytes=slot_bytes))
            self.saves = _Direction(LayerCopies(gpu, self.host_memory, self.kernels, slot_bytes=slot_bytes))
        self.arena_observer = self.host_memory
        self._spare: list[Any] = []  # Events that nothing refers to any more.
        self._is_reported = False

    @property
    def reads_in_place(self) -> bool:
        """Where memory is not registered the processor copies it, and can verify it before."""
        return self.host_memory.is_registered

    def stream(self, name: str) -> CudaStream:
        return CudaStream(self, name)

    def staging(self, size_bytes: int) -> Staging:
        """In pinned memory; in plain memory where that is refused."""
        try:
            return Staging(self.host_memory.pinned(size_bytes))
        except Exception as error:
            self.note(error)
            log.warning("saves are staged in memory that is not pinned: %s", error)
            return Staging(np.empty(size_bytes, np.uint8))

    def computed(self) -> Computed:
        """Records an event on the engine's current stream; nothing where that is capturing a graph."""
        try:
            self.gpu.check()
            with self.gpu.current():
                stream = self._current_stream()
                if _is_capturing(stream):
                    return Computed(_CAPTURING)
                try:
                    event = self._spare.pop()
                except IndexError:
                    event = self.gpu.event()
                _record(event, stream)
        except Exception as error:
            self.note(error)
            return Computed(_BROKEN)
        return CudaComputed(recorded=_Recorded(self.gpu, event, stream, self._spare))

    def wait_in_compute(self, event: Event, timeout_s: float) -> bool:
        if not isinstance(event, CudaEvent) or event.ends_on_host:
            return event.wait(timeout_s)
        try:
            with self.gpu.current():
                stream = self._current_stream()
                if _is_capturing(stream):
                    return event.wait(timeout_s)
                if not event.queued.wait(timeout_s):
                    return False
                if not event.is_done:
                    _wait(stream, event.end)
        except Exception as error:
            self.note(error)
            return False
        return True

    def rotate(self, keys: Any, rotation: Rotation) -> None:
        """The first use of a rotation waits until its tables are on the GPU, but not for the engine's computing."""
        import cupy

        view = view_of(keys)
        try:
            self.gpu.check()
            with self.gpu.current():
                if _is_capturing(stream := self._current_stream()):
                    raise NotTurned(_CAPTURING)
                engine = cupy.cuda.Stream.from_external(_EngineStream(stream))
                self.kernels.rotate(engine, view, self.kernels.rotation(rotation))
        except (ValueError, NotTurned):
            raise
        except Exception as error:  # Of CuPy's many kinds. One launch turns all keys, or none.
            self.note(error)
            raise NotTurned(f"{type(error).__name__}: {error}") from error

    def note(self, error: BaseException) -> None:
        """Remember it if it has ended this process's use of the device. Logged once; loads and saves then fail."""
        if self.gpu.note(error) and not self._is_reported:
            self._is_reported = True
            log.error("the CUDA device fails: from now on nothing is loaded or saved: %s", error)


class _EngineStream:
    """An engine's stream, by CUDA's protocol for Python."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream  # The protocol's version, and the cudaStream_t.


class _Recorded:
    """An event on the engine's stream. Once nothing refers to it any more, it is recorded again for another."""

    def __init__(self, gpu: Gpu, event: Any, stream: int, spare: list[Any]) -> None:
        self.gpu = gpu
        self.event = event
        self.stream = stream
        weakref.finalize(self, spare.append, event).atexit = False


@dataclass(frozen=True, slots=True)
class CudaComputed(Computed):
    recorded: _Recorded | None = None

    def wait(self, timeout_s: float) -> bool:
        """Asks again and again: CUDA has no wait that is bounded."""
        self.check()
        if self.recorded is None:
            return True
        pause_s, end_s = _ASK_S, SYSTEM_CLOCK.now_s() + timeout_s
        with self.recorded.gpu.relaxed():  # On any thread: a wait must not end a capture of the engine's.
            while not self.recorded.event.done:
                if SYSTEM_CLOCK.now_s() >= end_s:
                    return False
                SYSTEM_CLOCK.sleep(pause_s)
                pause_s = min(2 * pause_s, _ASK_MAX_S)
        return True


class _Direction:
    """The copies of one direction, and the lock of the thread that queues some."""

    def __init__(self, copies: LayerCopies) -> None:
        self.copies = copies
        self.lock = threading.Lock()


class CudaEvent(Event):
    """Copies that are on the device, or are not queued there yet."""

    def __init__(self, *, ends_on_host: bool = False) -> None:
        """`ends_on_host`: the host does something after the copies, for which the GPU cannot wait."""
        self.ends_on_host = ends_on_host
        self.queued = CpuEvent()
        self.done = CpuEvent()
        self.end: Any = None  # The CUDA event, once it is queued.

    @property
    def is_done(self) -> bool:
        return self.done.is_done

    @property
    def error(self) -> Exception | None:
        return self.done.error

    def wait(self, timeout_s: float) -> bool:
        return self.done.wait(timeout_s)


class CudaStream(Stream):
    """A thread that queues copies in order, and one that waits for them; both from their first work on."""

    def __init__(self, device: CudaDevice, name: str) -> None:
        self._device = device
        self._queueing, self._ending = Worker(name), Worker(f"{name}-end")
        # For the stream's thread: the end of the copies so far, and their direction; then what the engine had computed,
        # by its stream, that the next copies of a direction wait for.
        self._last: tuple[CudaEvent, _Direction] | None = None
        self._computed: dict[_Direction, dict[int, _Recorded]] = {device.loads: {}, device.saves: {}}
        self._thread = threading.local()
        for worker in (self._queueing, self._ending):
            weakref.finalize(self, worker.drop).atexit = False

    def submit(self, work: Callable[[], None], *, waits: bool = True) -> CpuEvent:
        def run() -> None:
            if waits and self._last is not None:
                self._last[0].done.wait(_FOREVER_S)
            with suppress(Exception):  # The work may ask CUDA, on this thread. If that fails, so does its question.
                self._use_gpu()
            work()

        event = CpuEvent()
        self._queueing.give(run, event)
        return event

    def after(self, computed: Computed) -> None:
        computed.check()
        if isinstance(computed, CudaComputed) and computed.recorded is not None:
            self._queueing.give(partial(self._wait_for, computed.recorded), CpuEvent())

    def scatter(
        self,
        slices: Slices,
        token_counts: Sequence[int],
        pages: Pages,
        rotation: Rotation | None = None,
        then: Callable[[], None] | None = None,
        verify: Callable[[NDArray[np.uint64]], None] | None = None,
    ) -> CudaEvent:
        assert verify is None, "a GPU's copies take no checksums"

        def queue(copies: LayerCopies) -> None:
            runs, layer = _runs(slices, token_counts, pages), _layer_pages(pages, self._device.gpu)
            turning = None if rotation is None else self._device.kernels.rotation(rotation)
            copies.scatter(runs, token_counts, layer, pages.page_ids, pages.first_token, pages.copied, turning)

        return self._copy(self._device.loads, queue, (slices, pages, rotation), then)

    def gather(
        self,
        pages: Pages,
        token_counts: Sequence[int],
        into: Slices,
        on_block: Callable[[int], None] | None = None,
    ) -> CudaEvent:
        def queue(copies: LayerCopies) -> None:
            runs, layer = _runs(into, token_counts, pages), _layer_pages(pages, self._device.gpu)
            copies.gather(layer, pages.page_ids, pages.first_token, pages.copied, token_counts, runs, on_block)

        return self._copy(self._device.saves, queue, (into, pages))

    def close(self) -> None:
        self._queueing.close()
        self._ending.drop()

    def join(self, timeout_s: float) -> bool:
        """Wait for a closed stream's threads to end, at most that long for each. Whether they have."""
        return self._queueing.join(timeout_s) and self._ending.join(timeout_s)

    def _copy(
        self,
        direction: _Direction,
        queue: Callable[[LayerCopies], None],
        kept: object,
        then: Callable[[], None] | None = None,
    ) -> CudaEvent:
        """`kept` stays alive until the copies are done."""
        event = CudaEvent(ends_on_host=then is not None)

        def run() -> None:
            try:
                self._use_gpu()
                with direction.lock:
                    self._order(direction)
                    queue(direction.copies)
                    event.end = direction.copies.record()
                try:
                    self._ending.give(partial(self._wait_for_end, event.end, kept, then), event.done)
                except Exception:  # There are no more threads: the copies end here, and not after their event.
                    event.end.synchronize()
                    raise
            except Exception as error:
                self._device.note(error)
                event.done.end(error)
            else:
                self._last = event, direction

        self._queueing.give(run, event.queued)
        return event

    def _order(self, direction: _Direction) -> None:
        """What the engine had computed, and what this stream copied in the other direction, is done first."""
        for recorded in self._computed[direction].values():
            direction.copies.after(recorded.event)
        self._computed[direction].clear()
        if self._last is not None and self._last[1] is not direction and not self._last[0].is_done:
            direction.copies.after(self._last[0].end)

    def _wait_for(self, recorded: _Recorded) -> None:
        for of_direction in self._computed.values():
            of_direction[recorded.stream] = recorded

    def _wait_for_end(self, end: Any, kept: object, then: Callable[[], None] | None) -> None:
        """On the other thread, which needs the GPU's context and the capture mode of our threads too."""
        try:
            self._use_gpu()
            end.synchronize()
        except Exception as error:
            self._device.note(error)
            raise
        if then is not None:
            then()

    def _use_gpu(self) -> None:
        self._device.gpu.check()
        if not getattr(self._thread, "is_set", False):
            self._device.gpu.use()
            self._thread.is_set = True


def _layer_pages(pages: Pages, gpu: Gpu) -> LayerPages:
    """Raises ValueError for arrays that are not ``[page, kv_head, token, dim]`` of this device."""
    keys, values = pages.key_view, pages.value_view
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype or len(keys.shape) != 4:
        raise ValueError(f"keys and values do not belong together: {keys.shape} and {values.shape}")
    for view in (keys, values):
        if view.device != (CUDA, gpu.ordinal):
            raise ValueError(f"pages are in memory of device {view.device}, not of CUDA device {gpu.ordinal}")
        if min(view.strides, default=0) < 0:
            raise ValueError(f"pages have strides of {view.strides} bytes")
    return LayerPages(_page_array(keys), _page_array(values), keys.shape[1], keys.shape[2], keys.item_bytes, keys.dtype)


def _page_array(view: ArrayView) -> PageArray:
    page, head, token, dim = view.strides
    return PageArray(view.address, view.shape[0], (page, head, token, dim), view.shape[3])


def _runs(slices: Slices, token_counts: Sequence[int], pages: Pages) -> list[list[Range]]:
    """Where each block's slice is in host memory. Raises ValueError where sizes do not agree."""
    token_bytes = pages.token_bytes
    if isinstance(slices, np.ndarray):
        if slices.size != sum(token_counts) * token_bytes:
            raise ValueError(
                f"{slices.size} bytes are given; these {sum(token_counts)} tokens have "
                f"{sum(token_counts) * token_bytes}"
            )
        base = _address(slices)
        edges = accumulate((count * token_bytes for count in token_counts), initial=base)
        return [[(begin, end - begin)] for begin, end in pairwise(edges)]
    parts = ((each,) if isinstance(each, np.ndarray) else each for each in slices)
    return [[(_address(part), part.size) for part in of_block] for of_block in parts]


def _address(memory: Bytes) -> int:
    if not memory.flags.c_contiguous or memory.itemsize != 1:
        raise ValueError("slices are flat arrays of bytes, without gaps")
    return int(memory.__array_interface__["data"][0])


def _is_capturing(stream: int) -> bool:
    from cupy.cuda import runtime

    try:
        return bool(runtime.streamIsCapturing(stream))
    except runtime.CUDARuntimeError as error:
        if error.status == _CAPTURE_IMPLICIT:
            return True
        raise


def _record(event: Any, stream: int) -> None:
    from cupy.cuda import runtime

    runtime.eventRecord(event.ptr, stream)


def _wait(stream: int, event: Any) -> None:
    from cupy.cuda import runtime

    runtime.streamWaitEvent(stream, event.ptr)
