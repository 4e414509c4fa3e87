"""One client's pages: its GPU memory, opened by CUDA IPC, and the copies to and from it. All on one thread of its own.

What CUDA says of this (runtime API, "Device management, IPC"), and what follows:

* A handle names a whole allocation, so arrays come with offsets. The true size of an opened allocation is asked of the
  driver (`allocation_of`), never of the client.
* One process opens an allocation once per device; a second open gives the same pointer and counts. Each open has one
  close.
* The exporter must not free the memory while it is open here: a client unregisters first, or its process ends.
* CuPy holds the GIL in ``ipcCloseMemHandle``, which may wait for the device. So all copies are waited for first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvservice.device.page_memory import FENCE_BYTES, MemoryPlaces, group_count, opened_fence, opened_pages
from kvservice_api.cuda.geometry import piece_table
from kvservice_api.cuda.host_memory import HostMemory
from kvservice_api.cuda.layer_copies import LayerCopies, Runs
from kvservice_api.cuda.page_kernels import PageKernels
from kvservice_api.cuda.runtime import Gpu, allocation_of, error_status
from kvservice_api.errors import InvalidRequest, Overloaded, RegistrationEnded
from kvservice_api.layout import Layout, Shard

_SLOTS = 2  # Of staging, per direction.
_AHEAD = 2  # Layers that are queued while an earlier one is copied.
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

PageIds = Sequence[Sequence[int]]  # Per group.


class UsedGpu(NamedTuple):
    """One GPU, as the daemon uses it. Shared by the registrations on it."""

    gpu: Gpu
    host: HostMemory
    kernels: PageKernels


class PageLoad(NamedTuple):
    """Where a load writes: tokens of one sequence, whose first block begins at `first_token`."""

    first_token: int
    page_ids: PageIds
    begin_tokens: Sequence[int]  # Per group: tokens before it are not written.
    end_token: int
    fence_word: int
    fence_value: int


class ChainOrder(NamedTuple):
    """Where the tokens of a chain of blocks are."""

    first_token: int
    page_ids: PageIds


class Registration:
    """All methods but `end` are for the registration's own thread."""

    def __init__(
        self, device: UsedGpu, places: MemoryPlaces, layout: Layout, shard: Shard, *, staging_bytes: int
    ) -> None:
        """Opens the memory, and allocates the staging. Raises InvalidRequest, Overloaded, CUDARuntimeError."""
        self.layout, self.shard = layout, shard
        self._device = device
        self._opened: list[int] = []
        self.is_ended = self._is_closed = False
        device.gpu.use()
        try:
            ranges = [self._open(handle) for handle in places.handles]
            self._layers = opened_pages(places, layout, shard, ranges)
            self._groups = [layer.group for layer in places.layers]
            self.group_count = group_count(places.layers)
            self._fence, self._fence_words = opened_fence(places.fence, ranges), places.fence.words
            slot_bytes = staging_bytes // (2 * _SLOTS)
            largest = max(pages.token_bytes for pages in self._layers) * layout.block_tokens
            if largest > slot_bytes:
                raise Overloaded(
                    f"one layer of a block takes {largest} bytes, and a quarter of cuda.staging_bytes is {slot_bytes}"
                )
            self._reads, self._writes = (
                LayerCopies(*device, slot_bytes=slot_bytes, slots=_SLOTS) for _ in ("from pages", "into pages")
            )
        except BaseException as error:
            self._close_handles()
            if error_status(error) == _OUT_OF_MEMORY:
                raise Overloaded(f"GPU {device.gpu.bus_id} has no memory for cuda.staging_bytes: {error}") from error
            raise

    def _open(self, handle: bytes) -> tuple[int, int]:
        """Address and size of an allocation. Raises InvalidRequest if CUDA does not open it."""
        from cupy.cuda import runtime

        try:
            address = runtime.ipcOpenMemHandle(handle)
        except runtime.CUDARuntimeError as error:
            if self._device.gpu.note(error):
                raise
            raise InvalidRequest(f"CUDA does not open a handle of GPU memory: {error}", field="allocations") from error
        self._opened.append(address)
        base, size = allocation_of(address)
        return address, base + size - address

    def end(self) -> None:
        """No further copies begin. From any thread."""
        self.is_ended = True

    def close(self) -> None:
        """Wait for the copies, close the memory, and free the staging. Nothing may be begun after `end`."""
        self.end()
        for wait in (self.wait_for_reads, self.wait_for_writes):
            try:
                wait()
            except Exception as error:
                self._device.gpu.note(error)
        self._is_closed = True
        self._close_handles()
        del self._reads, self._writes  # Nothing else refers to them: cudaFree, which may wait, is called here.

    def _close_handles(self) -> None:
        from cupy.cuda import runtime

        opened, self._opened = self._opened, []
        for address in opened:
            try:
                runtime.ipcCloseMemHandle(address)
            except runtime.CUDARuntimeError as error:
                self._device.gpu.note(error)

    # Copies

    def load(self, order: PageLoad, token_counts: Sequence[int], runs_of_layer: Callable[[int], Runs]) -> LoadRun:
        """Check the whole load, before a byte is written. Raises InvalidRequest."""
        if len(order.page_ids) != self.group_count or len(order.begin_tokens) != self.group_count:
            raise InvalidRequest(f"pages of {len(order.page_ids)} groups are given, not {self.group_count}")
        if order.fence_word >= self._fence_words:
            raise InvalidRequest(f"fence_word is {order.fence_word}; there are {self._fence_words}", field="fence_word")
        page_ids = [tuple(ids) for ids in order.page_ids]
        copied = [(begin - order.first_token, order.end_token - order.first_token) for begin in order.begin_tokens]
        for group, ids in enumerate(page_ids):
            self._check(group, ids, order.first_token, token_counts, copied[group])
        fence = self._fence + order.fence_word * FENCE_BYTES, order.fence_value

        def begin(layer: int) -> None:
            group = self._groups[layer]
            self._writes.scatter(
                runs_of_layer(layer),
                token_counts,
                self._layers[layer],
                page_ids[group],
                order.first_token,
                copied[group],
                fence=fence,
            )

        return LoadRun(self, begin)

    def check_chains(self, chains: Sequence[tuple[ChainOrder, Sequence[int]]]) -> None:
        """Check the whole save: for each chain the token counts of its blocks. Raises InvalidRequest."""
        for order, token_counts in chains:
            if len(order.page_ids) != self.group_count:
                raise InvalidRequest(f"pages of {len(order.page_ids)} groups are given, not {self.group_count}")
            for group, ids in enumerate(order.page_ids):
                self._check(group, ids, order.first_token, token_counts, None)

    def gather(self, layer: int, order: ChainOrder, first_token: int, token_counts: Sequence[int], runs: Runs) -> None:
        """Queue the copies of one layer of consecutive blocks, which begin at `first_token`."""
        ids = order.page_ids[self._groups[layer]]
        self._reads.gather(self._layers[layer], ids, first_token, None, token_counts, runs)

    def end_of_reads(self) -> Any:
        """A CUDA event: the end of what was queued so far."""
        return self._reads.record()

    def end_of_writes(self) -> Any:
        return self._writes.record()

    def wait_for_reads(self) -> None:
        """Until nothing of what was queued runs any more."""
        if not self._is_closed:
            self._reads.synchronize()

    def wait_for_writes(self) -> None:
        if not self._is_closed:
            self._writes.synchronize()

    def _check(
        self,
        group: int,
        page_ids: Sequence[int],
        first_token: int,
        token_counts: Sequence[int],
        copied: tuple[int, int] | None,
    ) -> None:
        layers = [pages for pages, of in zip(self._layers, self._groups, strict=True) if of == group]
        pages = min(layer.keys.pages for layer in layers)
        try:
            piece_table(page_ids, layers[0].page_tokens, first_token, token_counts, copied, pages)
        except (ValueError, OverflowError) as error:
            raise InvalidRequest(str(error), field="groups") from error

    def check(self) -> None:
        """Raises RegistrationEnded; DeviceBroken once the device is of no use."""
        if self.is_ended:
            raise RegistrationEnded("the registration has ended")
        self._device.gpu.check()


class LoadRun:
    """Layers of one load, begun in order, a few ahead of those that are waited for."""

    def __init__(self, registration: Registration, begin: Callable[[int], None]) -> None:
        self._registration, self._begin = registration, begin
        self._events: deque[Any] = deque()
        self._may_run = False  # A copy that no event was waited for.
        self.begun = self.copied = 0

    def step(self, until: int, more: Callable[[], bool]) -> None:
        """Begin layers before `until`, and wait until at most a few are not copied, while `more` says so."""
        while self.begun < until:
            self._registration.check()
            self._may_run = True  # From here on also if it fails.
            self._begin(self.begun)
            self._events.append(self._registration.end_of_writes())
            self.begun += 1
            while len(self._events) > _AHEAD:
                self.wait()
            if not more():
                return

    def wait(self) -> None:
        """Wait for the first layer that is not copied yet."""
        self._events[0].synchronize()
        self._events.popleft()
        self.copied += 1
        self._may_run = self.copied < self.begun

    def stop(self) -> None:
        """Wait until nothing of it is copied any more."""
        if self._may_run:
            self._registration.wait_for_writes()
            self._may_run = False
