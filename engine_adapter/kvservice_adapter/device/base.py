"""The interface between the pipelines and the machine that the engine computes on.

A stream does work in order, beside the engine's computing. Each piece of work is an event, which the host can wait
for, or the engine's computing can. Staging is bounded host memory that the device copies to and from fast. An engine's
arrays may be of any library (`arrays`); stored bytes are flat NumPy arrays of uint8 in host memory.

Stored slices are stored one block after another, each ``[K, V][kv head][token][dim]``. An engine has the same
numbers in pages: ``Pages`` says in which ones, and ``scatter`` and ``gather`` carry them over.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.device.arrays import ArrayView, view_of
from kvservice_adapter.device.rotation import Rotation
from kvservice_client import ArenaObserver, LayerGroup
from kvservice_client.buffers import Bytes

# One layer of some blocks as it is stored: one array of all blocks, or a sequence with an entry per block: an array, or
# two, of keys and of values.
Slices = Bytes | Sequence[Bytes | Sequence[Bytes]]


class Piece(NamedTuple):
    """Consecutive tokens that are in one page: `blocks` blocks of `tokens` tokens each."""

    block: int
    blocks: int  # More than one only if they are whole, and equally long.
    token_of_block: int
    tokens: int
    page_id: int
    token_of_page: int


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Where an engine has the KV of one sequence in one layer: a run of tokens.

    `keys` and `values` are arrays ``[page, kv_head, token, dim]`` of any strides, on any device: NumPy's, or what gives
    DLPack or the CUDA array interface. With P tokens per page, token t of the run is in page
    ``page_ids[(first_token + t) // P]``, at ``(first_token + t) % P``. So an array ``[batch, kv_head, token, dim]``
    is ``Pages(keys, values, [row])``: one long page. `dtype` names the elements where the array's library lacks
    their type and has integers instead: "bfloat16", "float8_e4m3fn". With `copied`, copies touch only these tokens of
    the run, ``[begin, end)``: an engine's page may hold other tokens beside them. Raises ValueError for what is no
    array.
    """

    keys: Any
    values: Any
    page_ids: Sequence[int]
    first_token: int = 0
    dtype: str = ""
    copied: tuple[int, int] | None = None
    key_view: ArrayView = field(init=False)
    value_view: ArrayView = field(init=False)

    def __post_init__(self) -> None:
        keys, values = view_of(self.keys), view_of(self.values)
        if self.dtype:
            keys, values = keys.named(self.dtype), values.named(self.dtype)
        object.__setattr__(self, "key_view", keys)
        object.__setattr__(self, "value_view", values)

    @property
    def page_tokens(self) -> int:
        return self.key_view.shape[2]

    @property
    def token_bytes(self) -> int:
        """Of one token in one layer, as it is stored."""
        heads, k_dim, v_dim = self.key_view.shape[1], self.key_view.shape[3], self.value_view.shape[3]
        return heads * (k_dim + v_dim) * self.key_view.item_bytes

    def check(self, group: LayerGroup) -> None:
        """Raises ValueError where these pages cannot hold KV of this geometry."""
        dtype, k_dim, v_dim = self.key_view.dtype, self.key_view.shape[3], self.value_view.shape[3]
        if (dtype, k_dim, v_dim) != (group.dtype, group.k_head_dim, group.v_head_dim):
            raise ValueError(
                f"pages of {dtype} with head dims {k_dim} and {v_dim} are given; "
                f"the layer has {group.dtype} with {group.k_head_dim} and {group.v_head_dim}"
            )

    def pieces(self, token_counts: Sequence[int], *, join_blocks: bool = True) -> Iterator[Piece]:
        """The blocks of the run, cut at the pages' ends, as far as they are `copied`.

        Without `join_blocks` each piece is of one block. Raises ValueError if they do not fit.
        """
        keys, values = self.key_view, self.value_view
        if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
            shapes = f"{keys.shape} and {values.shape}"
            raise ValueError(f"keys and values do not belong together: {shapes}")
        page_ids, counts = tuple(self.page_ids), tuple(token_counts)
        return iter(_pieces(page_ids, self.page_tokens, self.first_token, counts, self.copied, join_blocks))


@lru_cache(maxsize=4)
def _pieces(
    page_ids: tuple[int, ...],
    page_tokens: int,
    first_token: int,
    token_counts: tuple[int, ...],
    copied: tuple[int, int] | None,
    join_blocks: bool,
) -> tuple[Piece, ...]:
    """`Pages.pieces`. Remembered, because they are the same for all layers of a copy."""
    tokens = sum(token_counts)
    end = first_token + (tokens if copied is None else min(tokens, copied[1]))
    if first_token < 0 or end > len(page_ids) * page_tokens:
        raise ValueError(f"tokens {first_token}..{end} are not within {len(page_ids)} pages of {page_tokens} tokens")
    pieces = _cut(page_ids, page_tokens, first_token, token_counts)
    if copied is None and join_blocks:
        return tuple(pieces)
    return tuple(_clipped(pieces, token_counts, copied or (0, tokens)))


def _cut(page_ids: Sequence[int], page_tokens: int, first_token: int, token_counts: Sequence[int]) -> Iterator[Piece]:
    position, block = first_token, 0
    while block < len(token_counts):
        tokens = token_counts[block]
        page, at = divmod(position, page_tokens)
        whole = 0
        while (
            block + whole < len(token_counts)
            and token_counts[block + whole] == tokens
            and at + (whole + 1) * tokens <= page_tokens
        ):
            whole += 1
        if whole:
            yield Piece(block, whole, 0, tokens, page_ids[page], at)
            position, block = position + whole * tokens, block + whole
            continue
        done = 0
        while done < tokens:
            page, at = divmod(position, page_tokens)
            some = min(tokens - done, page_tokens - at)
            yield Piece(block, 1, done, some, page_ids[page], at)
            position, done = position + some, done + some
        block += 1


def _clipped(pieces: Iterator[Piece], token_counts: Sequence[int], copied: tuple[int, int]) -> Iterator[Piece]:
    """The parts of pieces that are within `copied`, each of one block."""
    starts = [0, *accumulate(token_counts)]
    begin, end = copied
    for piece in pieces:
        for number in range(piece.blocks):
            first = starts[piece.block + number] + piece.token_of_block
            clipped_first, clipped_end = max(first, begin), min(first + piece.tokens, end)
            if clipped_first < clipped_end:
                yield Piece(
                    piece.block + number,
                    1,
                    piece.token_of_block + clipped_first - first,
                    clipped_end - clipped_first,
                    piece.page_id,
                    piece.token_of_page + number * piece.tokens + clipped_first - first,
                )
        if first + piece.tokens >= end:  # The pages need not have what is after it.
            return


class NotTurned(RuntimeError):
    """A device could not turn keys, which are as before. The message says why."""


class NotOrdered(RuntimeError):
    """Copies cannot be made to wait for what the engine computes now. The message says why."""


@dataclass(frozen=True, slots=True)
class Computed:
    """What the engine's computing was given up to one moment: `Device.computed`."""

    unordered_because: str = ""  # Why no stream can wait for it. Then nothing that it computes may be copied.

    def check(self) -> None:
        """Raises NotOrdered if no stream can wait for it."""
        if self.unordered_because:
            raise NotOrdered(self.unordered_because)

    def wait(self, timeout_s: float) -> bool:
        """Block the calling thread until it is computed, at most that long. Returns whether it is. Raises NotOrdered.

        For the engine's thread, and for work of a `Stream` of the same device.
        """
        self.check()
        return True


class Event(ABC):
    """The end of one piece of a stream's work."""

    @property
    @abstractmethod
    def is_done(self) -> bool: ...

    @property
    @abstractmethod
    def error(self) -> Exception | None:
        """What the work raised. None if it did not, or is not done."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Block the calling thread until the work is done, or for that long. Returns whether it is done."""


class StreamClosed(RuntimeError):
    """Work was submitted to a closed stream, or to one that can start no thread. It is not done."""


class Stream(ABC):
    """Work in order, beside the engine's computing. Any thread may submit work.

    No method waits: what the work raises is in its event. Arrays are read and written when their work runs; a stream
    keeps them until then. A stream without references closes itself. Destructors may submit work.
    """

    sums_slices = False  # Whether `scatter` also takes checksums, in the same pass over the memory.

    @abstractmethod
    def submit(self, work: Callable[[], None], *, waits: bool = True) -> Event:
        """Have the host do something once all earlier work is done. Raises StreamClosed.

        With `waits` False it is done once earlier copies are begun: a device may still be copying.
        """

    @abstractmethod
    def after(self, computed: Computed) -> None:
        """All later copies begin after what the engine had computed, or given to its device, at that moment.

        Raises StreamClosed, NotOrdered.
        """

    @abstractmethod
    def scatter(
        self,
        slices: Slices,
        token_counts: Sequence[int],
        pages: Pages,
        rotation: Rotation | None = None,
        then: Callable[[], None] | None = None,
        verify: Callable[[NDArray[np.uint64]], None] | None = None,
    ) -> Event:
        """Copy the blocks of one layer into an engine's pages; then turn the keys there.

        `slices` may be reused once the event is done. The event's error is a ValueError where sizes do not agree.
        `then` is called once they are in the pages, on a thread of the stream, and must not block; what it raises is
        the event's error, and the event is done only after it. `Device.wait_in_compute` then waits on the host.
        `verify`, only if `sums_slices`, is called before `then`, with the xxh3-64 of each block's slice as it was read.
        What it raises is the event's error too. Raises StreamClosed.
        """

    @abstractmethod
    def gather(
        self,
        pages: Pages,
        token_counts: Sequence[int],
        into: Slices,
        on_block: Callable[[int], None] | None = None,
    ) -> Event:
        """Copy an engine's pages into the blocks of one layer.

        `on_block` is called once per block, with its number, in order: on a thread of the stream, after the block's
        last byte is copied, which may still be in the processor's cache. What it raises is the event's error.
        The pages must not change until the event is done. Errors as those of `scatter`.
        """

    @abstractmethod
    def close(self) -> None:
        """Refuse later work. Work that was submitted is still done; this call does not wait for it."""


class Staging:
    """Host memory of a fixed size, reserved in parts. Any thread may call it; it never waits."""

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._free = [(0, len(memory))] if len(memory) else []  # (offset, size), ascending, never side by side.
        self._lent: dict[int, tuple[int, int]] = {}  # Address -> (offset, size).
        self._address = memory.__array_interface__["data"][0]

    @property
    def size_bytes(self) -> int:
        return len(self._memory)

    @property
    def reserved_bytes(self) -> int:
        with self._lock:
            return sum(size for _, size in self._lent.values())

    def reserve(self, size_bytes: int) -> Bytes | None:
        """That much memory in one piece, or None if there is none, until `release`."""
        needed = -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            for number, (offset, size) in enumerate(self._free):
                if size >= needed > 0:
                    self._free[number : number + 1] = [(offset + needed, size - needed)] if size > needed else []
                    self._lent[self._address + offset] = (offset, needed)
                    return self._memory[offset : offset + size_bytes]
        return None

    def release(self, memory: Bytes) -> None:
        """Free what `reserve` returned. Raises KeyError if it is not reserved."""
        with self._lock:
            offset, size = self._lent.pop(memory.__array_interface__["data"][0])
            merged: list[tuple[int, int]] = []
            for run in sorted([*self._free, (offset, size)]):
                if merged and sum(merged[-1]) == run[0]:
                    merged[-1] = (merged[-1][0], merged[-1][1] + run[1])
                else:
                    merged.append(run)
            self._free = merged


_ALIGNMENT = 4096  # Of staging's parts, because DMA and direct I/O work on pages.


class Device(ABC):
    """One kind of machine. Any thread may call it."""

    layers_under_way = 2  # How many layers of one load are begun and not copied yet, at most.
    arena_observer: ArenaObserver | None = None  # Gets the daemon's memory in this process, to copy from it by DMA.

    @property
    def reads_in_place(self) -> bool:
        """Whether scattering reads the daemon's memory without the processor, faster than that could verify it."""
        return self.arena_observer is not None

    @abstractmethod
    def stream(self, name: str) -> Stream:
        """A new stream. `name` is what its threads are called."""

    @abstractmethod
    def staging(self, size_bytes: int) -> Staging:
        """New host memory that this device copies to and from fast; pinned where that makes a difference."""

    @abstractmethod
    def computed(self) -> Computed:
        """What the engine's computing was given so far. Called on the engine's thread; does not wait."""

    @abstractmethod
    def wait_in_compute(self, event: Event, timeout_s: float) -> bool:
        """Have the engine's later work wait for the event. Called on the engine's thread.

        A device with streams of its own orders them, and returns True once the copy is queued. On a CPU, and where the
        host has something to do after the copy, the call blocks until the event is done. It waits at most `timeout_s`,
        and returns whether that was enough. Raises nothing.
        """

    @abstractmethod
    def rotate(self, keys: Any, rotation: Rotation) -> None:
        """Turn an array of keys ``[..., token, dim]`` in place, in order with the engine's computing.

        They are the sequence's tokens from its first one on. Called on the engine's thread. Raises ValueError for keys
        that cannot be turned, NotTurned where the device fails.
        """
