"""Host memory that a GPU copies to and from by itself: registered ranges, and pinned memory.

Registered memory stays in its place. Memory that is not registered can be copied all the same, through pinned slots
(`layer_copies`): so registration may come late, in pieces, or not at all.
"""

from __future__ import annotations

import logging
import threading
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice_api.cuda.runtime import Gpu

log = logging.getLogger(__name__)

PIECE_BYTES = 256 << 20  # Registered at a time. A call takes about 0.1 s for it, and other threads may then wait.
_PAGE_BYTES = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: for every device of this process.

Memory = NDArray[np.uint8]
Range = tuple[int, int]  # Address, size in bytes.


class Copies(Protocol):
    """What copies to and from this memory."""

    def synchronize(self) -> None:
        """Wait until everything that was queued is done."""


class _Piece(NamedTuple):
    begin: int
    end: int


class _Alias(NamedTuple):
    begin: int
    end: int
    offset: int  # To the address of the same byte in the memory that is registered.


class HostMemory:
    """Registered and pinned ranges, for all GPUs of this process. Any thread may call it. An observer of arenas.

    CUDA refuses a copy that is in a registered range with one part only, so copies are cut at the ends of pieces.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._changed = threading.Condition()
        self._holders: set[object] = set()
        self._freed: deque[_Piece] = deque()  # Pinned memory that the garbage collector has freed, at any place.
        # Begins and ends of the pieces, ascending and disjoint. It and the aliases are replaced, and never changed.
        self._ranges: tuple[list[int], list[int]] = [], []
        self._registered: dict[int, list[_Piece]] = {}  # By the address of the memory that they are in.
        self._aliases: dict[int, _Alias] = {}  # By the address of the memory that they are of.
        self._users: weakref.WeakSet[Copies] = weakref.WeakSet()
        self._stuck: list[Memory] = []
        self._refused: set[int] = set()  # Addresses of memory of which a part could not be registered.
        self._has_failed = False

    def used_by(self, copies: Copies) -> None:
        """Before a range is unregistered, these copies are waited for."""
        self._users.add(copies)

    def pinned(self, size_bytes: int) -> Memory:
        """New pinned memory. Raises CUDARuntimeError if there is none."""
        memory = self._gpu.pinned(size_bytes)
        if size_bytes:
            piece = _Piece(_address(memory), _address(memory) + size_bytes)
            with self._changed:
                self._add(piece)
            weakref.finalize(memory, self._freed.append, piece).atexit = False
        return memory

    def register(self, memory: Memory, begin: int, end: int) -> None:
        """Register the bytes [begin, end) of memory that can be written, in pieces. For a background thread.

        The pages of memory that are whole in the range are registered. A refusal is logged once, and means that
        the rest is not registered; later calls try again.
        """
        from cupy.cuda import runtime

        address = _address(memory)
        begin, end = -(-(address + begin) // _PAGE_BYTES) * _PAGE_BYTES, (address + end) // _PAGE_BYTES * _PAGE_BYTES
        for start in range(begin, end, PIECE_BYTES):
            piece = _Piece(start, min(start + PIECE_BYTES, end))
            try:
                self._gpu.check()
                self._gpu.use()
                runtime.hostRegister(piece.begin, piece.end - piece.begin, _PORTABLE)
            except Exception as error:
                self._gpu.note(error)
                if not self._has_failed:
                    self._has_failed = True
                    log.warning("shared memory is copied through pinned memory: it cannot be registered: %s", error)
                with self._changed:
                    self._refused.add(address)
                return
            with self._changed:
                self._add(piece)
                self._registered.setdefault(address, []).append(piece)

    def alias(self, memory: Memory, of: Memory) -> None:
        """`memory` has the same bytes as `of`, another mapping of the same file: copies use the latter's addresses."""
        begin = _address(memory)
        alias = _Alias(begin, begin + memory.size, _address(of) - begin)
        with self._changed:
            self._aliases = {**self._aliases, _address(of): alias}

    def forget(self, memory: Memory) -> None:
        """Unregister what is registered of it, once the copies that use it are done; to be called before munmap."""
        from cupy.cuda import runtime

        with self._changed:
            pieces = self._registered.pop(_address(memory), [])
            self._refused.discard(_address(memory))
            self._aliases = {key: alias for key, alias in self._aliases.items() if key != _address(memory)}
            self._remove(pieces)
            holders = set(self._holders)
            self._changed.wait_for(lambda: not holders & self._holders)
        # What one of them raises, such as a device that is broken, ends none of the others.
        with suppress(Exception):
            self._gpu.use()
        for copies in list(self._users):
            with suppress(Exception):
                copies.synchronize()
        for piece in pieces:
            try:
                runtime.hostUnregister(piece.begin)
            except Exception:
                self._stuck.append(memory)  # It stays mapped: no other memory gets addresses that are registered.

    @contextmanager
    def held(self) -> Iterator[None]:
        """Copies that are queued meanwhile, to and from what `dma` gives, end before it is unregistered.

        Several threads may hold it: queueing a copy may take long where the GPU has much to do.
        """
        holder = object()
        with self._changed:
            self._remove_freed()
            self._holders.add(holder)
        try:
            yield
        finally:
            with self._changed:
                self._holders.remove(holder)
                self._changed.notify_all()

    def dma(self, address: int, size_bytes: int) -> list[Range] | None:
        """A range as the ranges that the GPU copies by itself, one after another; None if a part is not registered.

        To be called while it is `held`.
        """
        for begin, alias_end, offset in self._aliases.values():
            if begin <= address < alias_end:
                address += offset
        begins, ends = self._ranges
        number = bisect_right(begins, address) - 1
        end = address + size_bytes
        if number >= 0 and end <= ends[number]:
            return [(address, size_bytes)]
        ranges = []
        while address < end:
            if not 0 <= number < len(begins) or not begins[number] <= address < ends[number]:
                return None
            part_end = min(end, ends[number])
            ranges.append((address, part_end - address))
            address, number = part_end, number + 1
        return ranges

    @property
    def is_registered(self) -> bool:
        """Whether copies of it are DMA: some is registered, and nothing was refused. The rest may be registered yet."""
        with self._changed:
            return bool(self._registered) and not self._refused

    @property
    def registered(self) -> list[Range]:
        """The ranges that are registered now, without pinned memory of our own."""
        with self._changed:
            pieces = [piece for pieces in self._registered.values() for piece in pieces]
        return [(piece.begin, piece.end - piece.begin) for piece in pieces]

    @property
    def registered_bytes(self) -> int:
        return sum(size_bytes for _, size_bytes in self.registered)

    # With the lock

    def _add(self, piece: _Piece) -> None:
        self._remove_freed()
        begins, ends = self._ranges
        number = bisect_right(begins, piece.begin)
        self._ranges = (
            [*begins[:number], piece.begin, *begins[number:]],
            [*ends[:number], piece.end, *ends[number:]],
        )

    def _remove(self, pieces: Iterable[_Piece]) -> None:
        gone = {piece.begin for piece in pieces}
        kept = [each for each in zip(*self._ranges, strict=True) if each[0] not in gone]
        self._ranges = [begin for begin, _ in kept], [end for _, end in kept]

    def _remove_freed(self) -> None:
        while self._freed:
            self._remove([self._freed.popleft()])


_lock = threading.Lock()
_of_process: list[HostMemory] = []


def host_memory_of_process(gpu: Gpu) -> HostMemory:
    """One for the whole process: CUDA registers memory once, for all GPUs. Made with the first GPU that is given."""
    with _lock:
        if not _of_process:
            _of_process.append(HostMemory(gpu))
        return _of_process[0]


def _address(memory: Memory) -> int:
    return int(memory.ctypes.data)
