"""Copies of one layer between stored slices in host memory and an engine's pages on a GPU.

    load: slices --DMA--> a slot of device memory --kernel--> pages        save: pages --kernel--> slot --DMA--> slices

Slots are used in turn, on two CUDA streams: the DMA of one chunk overlaps with the kernel of another. Host memory that
is not registered is copied through pinned memory of the slot's size.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice_api.cuda.geometry import PIECE, LayerPages, piece_table
from kvservice_api.cuda.host_memory import HostMemory, Range
from kvservice_api.cuda.page_kernels import DeviceRotation, PageKernels
from kvservice_api.cuda.runtime import Gpu

SLOT_BYTES = 32 << 20
_ALIGNMENT = 16  # Of the slices in a slot: kernels access up to 16 bytes at a time.
_TABLES = 64  # Page tables that kernels may still have to read while further ones are made.
_TABLE_PIECES = 4096
_PLANS_MAX = 4
# Calls that the GPU has still to do. Beyond about 1024 in a stream the next one waits, and CuPy holds the GIL in some.
_CALLS_MAX = 900
_CHUNK_BLOCKS = 192  # Two chunks are under way at a time, also where each block is in two ranges.
_CHUNK_CALLS = 12  # Of a chunk, beside the copies of its blocks.
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind

Runs = Sequence[Sequence[Range]]  # Per block: where its slice is, in one range or in two, of keys and of values.


class LayerCopies:
    """One thread at a time may call it. The thread's device must be `gpu` (`Gpu.use`).

    No method but `synchronize` waits for copies of its own call, except where they pass through pinned memory, or where
    `gather` reports blocks. A call waits for earlier ones where the GPU has much to do still: `_CALLS_MAX`. Nothing but
    events is allocated after the construction.
    """

    def __init__(
        self, gpu: Gpu, host: HostMemory, kernels: PageKernels, *, slot_bytes: int = SLOT_BYTES, slots: int = 2
    ) -> None:
        """Raises CUDARuntimeError if there is no memory for it: `slots` of `slot_bytes` on the GPU and the host."""
        from cupy.cuda import runtime

        self._gpu, self._host, self._kernels = gpu, host, kernels
        self._copy = runtime.memcpyAsync  # (target, source, bytes, kind, stream)
        self._slot_bytes = slot_bytes
        self._copying, self._computing = gpu.stream(), gpu.stream()
        self._slots = [_Slot(gpu, slot_bytes) for _ in range(slots)]
        self._tables = [_Table(gpu) for _ in range(_TABLES)]
        self._uses = self._uploads = 0
        self._queued: deque[tuple[_Table, int]] = deque()  # Chunks that may be under way, and how many calls each took.
        self._calls = 0  # Of all of them.
        self._last = self._computing  # The stream whose end is the end of everything that was queued.
        self._plans: dict[tuple[Any, ...], _Plan] = {}  # The same for all layers of a load.
        host.used_by(self)

    def scatter(
        self,
        runs: Runs,
        token_counts: Sequence[int],
        pages: LayerPages,
        page_ids: Sequence[int],
        first_token: int,
        copied: tuple[int, int] | None,
        rotation: DeviceRotation | None = None,
        fence: tuple[int, int] | None = None,
    ) -> None:
        """Queue the copies of stored slices into pages, and then the rotation of the keys there. `fence`: as
        `PageKernels.scatter`.

        The host memory must stay as it is until `record`'s event is done. Raises ValueError where sizes or pages do not
        fit, before anything is queued; CUDARuntimeError.
        """
        plan = self._plan(pages, page_ids, first_token, token_counts, copied)
        plan.check(runs)
        with _Queueing(self):
            for chunk in plan.chunks:
                slot, table = self._next_slot(), self._next_table(chunk, runs)
                self._after_last_use(slot, self._copying)
                self._fill(slot, chunk, runs, range(chunk.first, chunk.end))
                self._upload(table, chunk, self._copying)
                self._hand_over(slot.filled, self._copying, self._computing)
                address, count = slot.memory.address, len(chunk.pieces)
                tables = address, table.memory.address, count
                self._kernels.scatter(self._computing, *tables, pages, rotation, fence)
                table.used.record(self._computing)
                slot.emptied.record(self._computing)
                self._last = self._computing

    def gather(
        self,
        pages: LayerPages,
        page_ids: Sequence[int],
        first_token: int,
        copied: tuple[int, int] | None,
        token_counts: Sequence[int],
        runs: Runs,
        on_block: Callable[[int], None] | None = None,
    ) -> None:
        """Queue the copies of pages into stored slices.

        `on_block` is called with each block's number, in order, once the block's last byte is in host memory; then the
        call waits for all copies. Errors as those of `scatter`.
        """
        plan = self._plan(pages, page_ids, first_token, token_counts, copied)
        plan.check(runs)
        report = _Report(on_block, len(token_counts))
        begun: _Gathered | None = None
        with _Queueing(self):
            for chunk in plan.chunks:
                slot, table = self._next_slot(), self._next_table(chunk, runs)
                self._after_last_use(slot, self._computing)
                if chunk.partial:  # Tokens beside the gathered ones keep their bytes.
                    self._after_last_use(slot, self._copying)
                    self._fill(slot, chunk, runs, chunk.partial)
                    self._hand_over(slot.filled, self._copying, self._computing)
                self._upload(table, chunk, self._computing)
                address, count = slot.memory.address, len(chunk.pieces)
                self._kernels.gather(self._computing, pages, table.memory.address, count, address)
                self._hand_over(slot.filled, self._computing, self._copying)
                staged = self._drain(slot, chunk, runs)
                table.used.record(self._copying)
                slot.emptied.record(self._copying)
                self._last = self._copying
                if begun is not None:
                    _finish(begun, report)
                begun = _Gathered(slot, chunk, staged)
            if begun is not None:
                _finish(begun, report)
            report.blocks_before(len(token_counts))

    def after(self, event: Any) -> None:
        """Pages are read and written once this CUDA event is done, for all later copies."""
        self._computing.wait_event(event)

    def record(self) -> Any:
        """A new CUDA event: the end of everything that was queued. After an error nothing is under way any more."""
        with _Queueing(self):
            event = self._gpu.event()
            event.record(self._last)
        return event

    def synchronize(self) -> None:
        """From any thread. Raises CUDARuntimeError."""
        self._copying.synchronize()
        self._computing.synchronize()

    def _plan(
        self,
        pages: LayerPages,
        page_ids: Sequence[int],
        first_token: int,
        token_counts: Sequence[int],
        copied: tuple[int, int] | None,
    ) -> _Plan:
        token_bytes, page_count = pages.token_bytes, min(pages.keys.pages, pages.values.pages)
        ids, counts = tuple(page_ids), tuple(token_counts)
        key = ids, pages.page_tokens, page_count, token_bytes, first_token, counts, copied
        plan = self._plans.pop(key, None)
        if plan is None:
            table = piece_table(ids, pages.page_tokens, first_token, counts, copied, page_count)
            plan = _Plan(table, np.array(counts, np.int64) * token_bytes, counts, self._slot_bytes)
        self._plans[key] = plan  # The last is the one that was used last.
        if len(self._plans) > _PLANS_MAX:
            del self._plans[next(iter(self._plans))]
        return plan

    def _next_slot(self) -> _Slot:
        self._uses += 1
        return self._slots[self._uses % len(self._slots)]

    def _after_last_use(self, slot: _Slot, stream: Any) -> None:
        stream.wait_event(slot.emptied)  # An event that was never recorded is done.

    def _hand_over(self, event: Any, given: Any, to: Any) -> None:
        """Work that `to` gets from now on begins after what `given` has."""
        event.record(given)
        to.wait_event(event)

    def _next_table(self, chunk: _Chunk, runs: Runs) -> _Table:
        """A table that no kernel reads any more. Waits until the GPU can be given the calls of this chunk."""
        calls = _CHUNK_CALLS + sum(len(runs[block]) for block in range(chunk.first, chunk.end))
        while self._queued and (len(self._queued) == _TABLES or self._calls + calls > _CALLS_MAX):
            table, done = self._queued.popleft()
            table.used.synchronize()
            self._calls -= done
        self._uploads += 1
        table = self._tables[self._uploads % _TABLES]
        self._queued.append((table, calls))
        self._calls += calls
        return table

    def _upload(self, table: _Table, chunk: _Chunk, stream: Any) -> None:
        count = len(chunk.pieces)
        table.pinned[:count] = chunk.pieces
        self._copy(table.memory.address, table.pinned_address, count * PIECE.itemsize, _TO_DEVICE, stream.ptr)

    def _fill(self, slot: _Slot, chunk: _Chunk, runs: Runs, blocks: Sequence[int]) -> None:
        """Queue the copies of stored slices into the slot."""
        staged, copy, dma = list[_Staged](), self._copy, self._host.dma
        slot_address, stream = slot.memory.address, self._copying.ptr
        with self._host.held():
            for number, (address, size_bytes, offset) in enumerate(chunk.ranges(runs, blocks)):
                parts = dma(address, size_bytes)
                if parts is None:
                    staged.append(_Staged(number, address, size_bytes, offset))
                    continue
                for part, part_bytes in parts:
                    copy(slot_address + offset, part, part_bytes, _TO_DEVICE, stream)
                    offset += part_bytes
        if not staged:
            return
        slot.unstaged.synchronize()  # The DMA from this pinned memory before is done.
        for _, address, size_bytes, offset in staged:
            ctypes.memmove(slot.pinned_address + offset, address, size_bytes)
        for offset, size_bytes in _joined(staged):
            pinned = slot.pinned_address + offset
            copy(slot_address + offset, pinned, size_bytes, _TO_DEVICE, stream)
        slot.unstaged.record(self._copying)

    def _drain(self, slot: _Slot, chunk: _Chunk, runs: Runs) -> list[_Staged]:
        """Queue the copies of the slot into stored slices. Returns those that end in pinned memory, to be copied on."""
        staged, copy, dma = list[_Staged](), self._copy, self._host.dma
        slot_address, stream = slot.memory.address, self._copying.ptr
        with self._host.held():
            for number, (address, size_bytes, offset) in enumerate(chunk.ranges(runs, range(chunk.first, chunk.end))):
                parts = dma(address, size_bytes)
                if parts is None:
                    staged.append(_Staged(number, address, size_bytes, offset))
                    continue
                for part, part_bytes in parts:
                    copy(part, slot_address + offset, part_bytes, _TO_HOST, stream)
                    offset += part_bytes
        for offset, size_bytes in _joined(staged):
            pinned = slot.pinned_address + offset
            copy(pinned, slot_address + offset, size_bytes, _TO_HOST, stream)
        return staged


class _Slot:
    """Device memory for one chunk, and pinned memory of the same size."""

    def __init__(self, gpu: Gpu, size_bytes: int) -> None:
        self.memory = gpu.device_memory(size_bytes)
        self._pinned = gpu.pinned(size_bytes)
        self.pinned_address = self._pinned.ctypes.data
        self.filled, self.emptied, self.unstaged = gpu.event(), gpu.event(), gpu.event()


class _Table:
    """A page table on the device, and the pinned memory from which it is copied there."""

    def __init__(self, gpu: Gpu) -> None:
        self.memory = gpu.device_memory(_TABLE_PIECES * PIECE.itemsize)
        self.pinned: NDArray[np.void] = gpu.pinned(_TABLE_PIECES * PIECE.itemsize).view(PIECE)
        self.pinned_address = self.pinned.ctypes.data
        self.used = gpu.event()


class _Chunk:
    """Consecutive blocks whose slices are in a slot together."""

    def __init__(self, first: int, end: int, offsets: list[int], pieces: NDArray[np.void], partial: list[int]) -> None:
        self.first, self.end = first, end
        self.pieces = pieces
        self.partial = partial  # Blocks of which not every token is copied.
        self._offsets = offsets

    def ranges(self, runs: Runs, blocks: Sequence[int]) -> list[tuple[int, int, int]]:
        """(address, bytes, offset in the slot) of these blocks' slices, as few as they can be."""
        joined: list[tuple[int, int, int]] = []
        address = size_bytes = offset = 0
        for block in blocks:
            at = self._offsets[block - self.first]
            for begin, run_bytes in runs[block]:
                if begin == address + size_bytes and at == offset + size_bytes:
                    size_bytes += run_bytes
                else:
                    joined.append((address, size_bytes, offset))
                    address, size_bytes, offset = begin, run_bytes, at
                at += run_bytes
        joined.append((address, size_bytes, offset))
        return [each for each in joined if each[1]]


class _Plan:
    """How a run of blocks is copied, in chunks that fit into a slot."""

    def __init__(
        self, table: NDArray[np.void], block_bytes: NDArray[np.int64], token_counts: Sequence[int], slot_bytes: int
    ) -> None:
        """Raises ValueError where a block is larger than a slot."""
        self.chunks: list[_Chunk] = []
        self._block_bytes: list[int] = block_bytes.tolist()
        if not len(table):
            return
        blocks = table["slice"]
        first, last = int(blocks[0]), int(blocks[-1])
        piece_edges = np.searchsorted(blocks, np.arange(first, last + 2)).tolist()
        covered = np.bincount(blocks - first, weights=table["tokens"], minlength=last + 1 - first).astype(np.int64)
        begin, offset, offsets = first, 0, list[int]()
        for block in range(first, last + 1):
            size_bytes = self._block_bytes[block]
            pieces = piece_edges[block + 1 - first] - piece_edges[block - first]
            if size_bytes > slot_bytes or pieces > _TABLE_PIECES:
                raise ValueError(
                    f"one layer of a block has {size_bytes} bytes in {pieces} pieces; "
                    f"a copy takes at most {slot_bytes} bytes in {_TABLE_PIECES} pieces"
                )
            pieces_so_far = piece_edges[block + 1 - first] - piece_edges[begin - first]
            is_full = offset + size_bytes > slot_bytes or block - begin == _CHUNK_BLOCKS
            if is_full or pieces_so_far > _TABLE_PIECES:
                self._add(begin, block, offsets, table, piece_edges, first, covered, token_counts)
                begin, offset, offsets = block, 0, []
            offsets.append(offset)
            offset += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        self._add(begin, last + 1, offsets, table, piece_edges, first, covered, token_counts)

    def _add(
        self,
        begin: int,
        end: int,
        offsets: list[int],
        table: NDArray[np.void],
        piece_edges: list[int],
        first: int,
        covered: NDArray[np.int64],
        token_counts: Sequence[int],
    ) -> None:
        pieces = table[piece_edges[begin - first] : piece_edges[end - first]].copy()
        pieces["slice"] = np.array(offsets, np.int64)[pieces["slice"] - begin]
        partial = [block for block in range(begin, end) if covered[block - first] != token_counts[block]]
        self.chunks.append(_Chunk(begin, end, offsets, pieces, partial))

    def check(self, runs: Runs) -> None:
        """Raises ValueError where slices have another size than their blocks."""
        if len(runs) != len(self._block_bytes):
            raise ValueError(f"{len(runs)} slices are given for {len(self._block_bytes)} blocks")
        for block, (ranges, size_bytes) in enumerate(zip(runs, self._block_bytes, strict=True)):
            given = sum(each for _, each in ranges)
            if given != size_bytes:
                raise ValueError(f"{given} bytes are given for block {block}, which has {size_bytes}")


class _Staged(NamedTuple):
    """A range that is copied through pinned memory."""

    number: int  # Among all ranges of the chunk: between two that do not follow each other, another one is copied.
    address: int
    size_bytes: int
    offset: int  # In the slot.


class _Gathered(NamedTuple):
    slot: _Slot
    chunk: _Chunk
    staged: list[_Staged]


class _Report:
    """Calls `on_block` for each block, in order."""

    def __init__(self, on_block: Callable[[int], None] | None, blocks: int) -> None:
        self.on_block = on_block
        self._done = 0

    def blocks_before(self, end: int) -> None:
        if self.on_block is not None:
            while self._done < end:
                self.on_block(self._done)
                self._done += 1


class _Queueing:
    """After an error nothing of what was queued may touch a slot again: it is waited for."""

    def __init__(self, copies: LayerCopies) -> None:
        self._copies = copies

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            with suppress(Exception):  # The error that is raised is the first.
                self._copies.synchronize()


def _finish(gathered: _Gathered, report: _Report) -> None:
    """Wait for a chunk, if there is something to do once it has come."""
    if not gathered.staged and report.on_block is None:
        return
    gathered.slot.emptied.synchronize()
    for _, address, size_bytes, offset in gathered.staged:
        ctypes.memmove(address, gathered.slot.pinned_address + offset, size_bytes)
    report.blocks_before(gathered.chunk.end)


def _joined(staged: Sequence[_Staged]) -> list[tuple[int, int]]:
    """(offset, bytes) of ranges in a slot. Those with nothing but alignment between them are one."""
    joined: list[tuple[int, int]] = []
    before = -1
    for number, _, size_bytes, offset in staged:
        if joined and number == before + 1 and 0 <= offset - sum(joined[-1]) < _ALIGNMENT:
            joined[-1] = (joined[-1][0], offset + size_bytes - joined[-1][0])
        else:
            joined.append((offset, size_bytes))
        before = number
    return joined
