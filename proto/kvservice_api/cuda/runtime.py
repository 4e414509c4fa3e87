"""One CUDA device of this process, through CuPy: its streams, events and memory, and what its errors mean.

CuPy is imported when the first of these is used. No function here uses CuPy's memory pools.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

# After one of these, every later call of this process on the device fails: an uncorrectable ECC error, an illegal
# address, a launch timeout, and the faults of kernels (assert, illegal instruction, misaligned address ...).
_STICKY = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721})
_NO_DEVICE = frozenset({35, 100})  # A driver that is missing or too old; no device.
_NOT_INITIALIZED = 3  # What each call returns in a child that was forked after its parent used CUDA.
_PORTABLE = 1  # cudaHostAllocPortable
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class DeviceBroken(RuntimeError):
    """An earlier error has ended this process's use of the device. The message has that error."""


def why_unavailable() -> str:
    """Why this process cannot use a CUDA device; "" if it can. Any thread may call it; the first call takes seconds."""
    try:
        from cupy.cuda import runtime
    except Exception as error:  # Also of what CuPy imports and calls, with the wrong libraries beside it.
        return f"CuPy cannot be imported: {error}"
    try:
        return "" if runtime.getDeviceCount() else "there is no CUDA device"
    except runtime.CUDARuntimeError as error:
        if error.status in _NO_DEVICE:
            return f"there is no CUDA device: {error}"
        if error.status == _NOT_INITIALIZED:
            return f"this process was forked from one that used CUDA: {error}"
        return f"CUDA does not start: {error}"


def error_status(error: BaseException) -> int:
    """The number that CUDA gave this error of CuPy's; 0 for other errors."""
    from cupy.cuda import driver, runtime

    return int(error.status) if isinstance(error, (runtime.CUDARuntimeError, driver.CUDADriverError)) else 0


class DeviceAllocation:
    """Device memory of its own allocation, freed when this object is. cudaFree may wait for the whole device."""

    def __init__(self, address: int, nbytes: int) -> None:
        from cupy.cuda import runtime

        self.address = address
        self.nbytes = nbytes
        # The end of the process frees the rest: by then CuPy's modules may be gone.
        weakref.finalize(self, _free, runtime.free, address).atexit = False


def _free(free: Callable[[int], None], address: int) -> None:
    """On the thread where Python's garbage collector runs, such as the engine's while it captures a CUDA graph."""
    with suppress(Exception):  # The device is broken: nothing on it can be freed.
        before = _exchange_capture_mode(_RELAXED)
        try:
            free(address)
        finally:
            _exchange_capture_mode(before)


class Gpu:
    """One device. Any thread may call it; CUDA's own calls order what threads do."""

    def __init__(self, ordinal: int) -> None:
        """`ordinal` counts the devices that this process sees. Raises ValueError if there is no such device."""
        from cupy.cuda import runtime

        if not 0 <= ordinal < runtime.getDeviceCount():
            raise ValueError(f"there is no CUDA device {ordinal}")
        self.ordinal = ordinal
        self.bus_id: str = runtime.deviceGetPCIBusId(ordinal).lower()  # "0000:3b:00.0"
        self._broken: BaseException | None = None

    @classmethod
    def of_bus_id(cls, bus_id: str) -> Gpu:
        """Raises ValueError where this process sees no such device."""
        from cupy.cuda import runtime

        try:
            return cls(runtime.deviceGetByPCIBusId(bus_id))
        except runtime.CUDARuntimeError as error:
            raise ValueError(f"there is no CUDA device {bus_id}: {error}") from error

    def make_context(self) -> None:
        """Create this process's context on the device, if there is none; other threads run meanwhile.

        It takes up to a second. CuPy's `setDevice` would do it too, and hold the GIL.
        """
        device, context = ctypes.c_int(), ctypes.c_void_p()
        retain = getattr(_libcuda(), "cuDevicePrimaryCtxRetain", None)  # The simulation lacks it, and needs no context.
        if retain is None:
            return
        status = _libcuda().cuDeviceGet(ctypes.byref(device), self.ordinal)
        if status or (status := retain(ctypes.byref(context), device)):
            raise OSError(f"there is no context on CUDA device {self.bus_id}: CUDA error {status}")

    def use(self) -> None:
        """Make this the device of the calling thread, a thread of ours, for as long as it lives.

        An engine may capture a CUDA graph meanwhile: calls of this thread then neither fail nor end the capture.
        """
        from cupy.cuda import runtime

        runtime.setDevice(self.ordinal)
        _exchange_capture_mode(_RELAXED)

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """As `current`, for a thread that may be another's: in the meantime its calls are as after `use`."""
        with self.current():
            before = _exchange_capture_mode(_RELAXED)
            try:
                yield
            finally:
                _exchange_capture_mode(before)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the device of the calling thread, and the one before again at the end."""
        from cupy.cuda import runtime

        before = runtime.getDevice()
        if before == self.ordinal:
            yield
            return
        runtime.setDevice(self.ordinal)
        try:
            yield
        finally:
            runtime.setDevice(before)

    def stream(self) -> Any:
        """A new cupy.cuda.Stream, which does not wait for the legacy default stream."""
        import cupy

        with self.current():
            return cupy.cuda.Stream(non_blocking=True)

    def event(self) -> Any:
        """A new cupy.cuda.Event. A thread that waits for it sleeps; it takes no times."""
        import cupy

        with self.current():
            return cupy.cuda.Event(block=True, disable_timing=True)

    def device_memory(self, nbytes: int) -> DeviceAllocation:
        """New memory from cudaMalloc, which may wait for the device. Raises CUDARuntimeError if there is none."""
        from cupy.cuda import runtime

        with self.current():
            return DeviceAllocation(runtime.malloc(nbytes), nbytes)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """New pinned host memory, for every device; freed with the array and its views. Raises as `device_memory`."""
        from cupy.cuda import runtime

        if not nbytes:
            return np.empty(0, np.uint8)
        with self.current():
            address = runtime.hostAlloc(nbytes, _PORTABLE)
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(memory, _free, runtime.freeHost, address).atexit = False
        return np.frombuffer(memoryview(memory), np.uint8)

    @property
    def is_broken(self) -> bool:
        """Whether `note` has seen an error after which no call on the device succeeds."""
        return self._broken is not None

    def note(self, error: BaseException) -> bool:
        """Remember an error of a call if it has ended this process's use of the device; returns whether it has."""
        is_sticky = error_status(error) in _STICKY
        if is_sticky and self._broken is None:
            self._broken = error
        return is_sticky

    def check(self) -> None:
        """Raises DeviceBroken after such an error."""
        if self._broken is not None:
            raise DeviceBroken(f"CUDA device {self.bus_id} cannot be used by this process any more: {self._broken}")


def allocation_of(address: int) -> tuple[int, int]:
    """First address and size in bytes of the allocation that a device address is in; on its device's thread.

    Raises ValueError if it is in none.
    """
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    status = _libcuda().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    if status:
        raise ValueError(f"{address:#x} is in no allocation of this process: CUDA error {status}")
    return base.value, size.value


def _exchange_capture_mode(mode: int) -> int:
    """Set the calling thread's mode. Returns the mode before."""
    exchanged = ctypes.c_int(mode)
    exchange = getattr(_libcuda(), "cuThreadExchangeStreamCaptureMode", None)  # Drivers before CUDA 10.1 lack it.
    if exchange is not None and (status := exchange(ctypes.byref(exchanged))):
        raise OSError(f"cuThreadExchangeStreamCaptureMode fails with CUDA error {status}")
    return exchanged.value


def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
