"""An engine's pages as the daemon can open them: handles of CUDA IPC, and the fence that ends the daemon's writes.

What CUDA says of this (runtime API, "Device management, IPC"), and what follows:

* A handle is of a whole allocation. PyTorch's allocator, like CuPy's, carves arrays from larger ones: the offset of
  each array within its allocation is sent beside the handle.
* Memory of ``cudaMallocAsync`` or of virtual memory management (PyTorch's expandable segments) has no handle.
* The memory must not be freed while the daemon has it open: `DeviceMemory.close` first. The engine's KV cache lives as
  long as its worker.
* A wait for an event that another process records hangs if that process dies. So no event of the daemon's is waited for
  on the GPU: the daemon waits for its own copies, and says so in a message.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np

from kvservice_adapter.device.arrays import CUDA, ArrayView
from kvservice_adapter.device.base import Device
from kvservice_adapter.device.cuda import CudaDevice
from kvservice_api.cuda.runtime import Gpu, allocation_of, error_status
from kvservice_api.errors import DeviceUnavailable, Overloaded
from kvservice_api.v1 import devices_pb2 as pb
from kvservice_client.retry import SYSTEM_CLOCK, Clock

log = logging.getLogger(__name__)

_WORDS = 256  # Of the fence: loads that run at one time.
_FENCE_BYTES = 2 << 20  # CUDA shares memory in whole pieces of this size, with all that a smaller allocation is beside.
_FIRST_VALUE = 1
_KERNEL_S = 0.05  # A kernel that has read its fence word before ends in far less: it copies a few MiB.
_INVALID_VALUE = 1
_TO_DEVICE = 1  # cudaMemcpyKind
_HOW_TO_EXPORT = (
    "set PYTORCH_ALLOC_CONF=expandable_segments:False (and not backend:cudaMallocAsync), because CUDA exports no other "
    "memory to the daemon"
)


def exported_pages(
    device: Device, keys: Sequence[ArrayView], values: Sequence[ArrayView], groups: Sequence[int]
) -> IpcPages | None:
    """The pages of an engine that computes on this device; None if they cannot be exported, such as those on a CPU."""
    if not isinstance(device, CudaDevice):
        return None
    try:
        return IpcPages(device.gpu, keys, values, groups)
    except Exception as error:  # Of CuPy's, whose kinds are not known here.
        device.note(error)
        log.warning("the daemon cannot copy to the engine's pages itself: %s: %s", type(error).__name__, error)
        return None


class IpcPages:
    """The pages of one worker, exported. An `ExportedPages`. Any thread may call it."""

    def __init__(
        self,
        gpu: Gpu,
        keys: Sequence[ArrayView],
        values: Sequence[ArrayView],
        groups: Sequence[int],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Keys and values ``[page, kv head, token, dim]`` of each layer, and its group. Raises ValueError."""
        for view in (*keys, *values):
            if view.device != (CUDA, gpu.ordinal):
                raise ValueError(f"pages are in memory of device {view.device}, not of CUDA device {gpu.ordinal}")
        self._gpu, self._keys, self._values, self.groups = gpu, keys, values, groups
        self._clock = clock
        self._lock = threading.Lock()
        self._values_of_words = [_FIRST_VALUE] * _WORDS
        self._free = list(range(_WORDS))
        self._fence = gpu.device_memory(_FENCE_BYTES)
        self._stream = gpu.stream()
        self._write(0, np.full(_WORDS, _FIRST_VALUE, np.uint32))

    def description(self) -> pb.RegisterMemoryRequest:
        """Raises DeviceUnavailable if CUDA does not export the memory."""
        handles: list[bytes] = []
        numbers: dict[int, int] = {}  # Of allocations, by their first address.
        with self._gpu.relaxed():  # vLLM captures its CUDA graphs when the pages have just been registered.
            layers = [
                pb.LayerPages(
                    keys=self._placed(keys, numbers, handles),
                    values=self._placed(values, numbers, handles) if values.shape[3] else None,
                    pages=keys.shape[0],
                    page_tokens=keys.shape[2],
                    group=group,
                )
                for keys, values, group in zip(self._keys, self._values, self.groups, strict=True)
            ]
            number, offset = self._place(self._fence.address, numbers, handles)
        fence = pb.FenceWords(allocation=number, offset_bytes=offset, count=_WORDS)
        return pb.RegisterMemoryRequest(pci_bus_id=self._gpu.bus_id, allocations=handles, layers=layers, fence=fence)

    def begin_load(self) -> tuple[int, int]:
        with self._lock:
            if not self._free:
                raise Overloaded(f"{_WORDS} loads run by cuda_ipc, the most that may")
            word = self._free.pop()
            return word, self._values_of_words[word]

    def revoke(self, words: Sequence[int]) -> None:
        for word in words:
            value = self._values_of_words[word] = self._values_of_words[word] % (2**32 - 1) + 1
            self._write(word, np.array([value], np.uint32))
        self._clock.sleep(_KERNEL_S)

    def end_load(self, word: int) -> None:
        with self._lock:
            self._free.append(word)

    def _write(self, word: int, values: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
        """On return the words have these values. The stream is our own: the engine's work is not waited for."""
        from cupy.cuda import runtime

        try:
            with self._gpu.relaxed():
                address = self._fence.address + word * values.itemsize
                runtime.memcpyAsync(address, values.ctypes.data, values.nbytes, _TO_DEVICE, self._stream.ptr)
                self._stream.synchronize()
        except (OSError, runtime.CUDARuntimeError) as error:
            self._gpu.note(error)  # Without this device, the engine computes nothing more either.

    def _placed(self, view: ArrayView, numbers: dict[int, int], handles: list[bytes]) -> pb.PageArray:
        number, offset = self._place(view.address, numbers, handles)
        page, head, token, dim = view.strides
        return pb.PageArray(
            allocation=number,
            offset_bytes=offset,
            page_stride=page,
            head_stride=head,
            token_stride=token,
            dim_stride=dim,
        )

    def _place(self, address: int, numbers: dict[int, int], handles: list[bytes]) -> tuple[int, int]:
        """The number of the allocation that an address is in, and the offset in it."""
        from cupy.cuda import runtime

        try:
            base, _ = allocation_of(address)
            if base not in numbers:
                handles.append(runtime.ipcGetMemHandle(base))
                numbers[base] = len(numbers)
        except (ValueError, runtime.CUDARuntimeError) as error:
            self._gpu.note(error)
            how = f": {_HOW_TO_EXPORT}" if error_status(error) == _INVALID_VALUE else ""
            raise DeviceUnavailable(f"the pages cannot be exported to the daemon ({error}){how}") from error
        return numbers[base], address - base
