"""What the pipelines need of the machine that the engine computes on.

A stream does work in order, beside the engine's computing. Each piece of work is an event, which the
host can wait for, or the engine's computing can. Staging is bounded host memory that the device copies
to and from fast. Tensors are torch's; stored bytes are flat arrays of uint8.

Stored slices lie block after block, each ``[K, V][kv head][token][dim]``. An engine has the same
numbers in pages: ``Pages`` says in which ones, and ``scatter`` and ``gather`` carry them over.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from kvservice_client import LayerGroup
from kvservice_client.buffers import Bytes


class Rotation(Protocol):
    """Turns keys from where they were rotated to where they are read."""

    def apply(self, keys: torch.Tensor, first_token: int = 0, /) -> None:
        """Turn ``keys[..., token, dim]`` in place: the tokens of the run from its `first_token`-th on."""


class Piece(NamedTuple):
    """Consecutive tokens that lie in one page: `blocks` blocks with `tokens` each, one behind the other."""

    block: int
    blocks: int  # More than one only where they are whole, and equally long.
    token_of_block: int
    tokens: int
    page_id: int
    token_of_page: int


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Where an engine has the KV of one sequence in one layer: a run of tokens.

    `keys` and `values` are ``[page, kv_head, token, dim]``, of any strides; with P tokens a page, token t
    of the run is in page ``page_ids[(first_token + t) // P]``, at ``(first_token + t) % P``. So a tensor
    ``[batch, kv_head, token, dim]`` is ``Pages(keys, values, [row])``: one long page.
    """

    keys: torch.Tensor
    values: torch.Tensor
    page_ids: Sequence[int]
    first_token: int = 0

    @property
    def page_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def token_bytes(self) -> int:
        """Of one token in one layer, as it is stored."""
        heads, k_dim, v_dim = self.keys.shape[1], self.keys.shape[3], self.values.shape[3]
        return heads * (k_dim + v_dim) * self.keys.element_size()

    def check(self, group: LayerGroup) -> None:
        """Raises ValueError where these pages cannot hold KV of this geometry."""
        dtype = str(self.keys.dtype).removeprefix("torch.")
        found = (dtype, self.keys.shape[3], self.values.shape[3])
        if found != (group.dtype, group.k_head_dim, group.v_head_dim):
            raise ValueError(
                f"pages of {dtype} with head dims {found[1]} and {found[2]} are given; "
                f"the layer has {group.dtype} with {group.k_head_dim} and {group.v_head_dim}"
            )

    def pieces(self, token_counts: Sequence[int]) -> Iterator[Piece]:
        """The blocks of the run, cut at the pages' ends. Raises ValueError where they do not fit."""
        if self.keys.shape[:3] != self.values.shape[:3] or self.keys.dtype != self.values.dtype:
            shapes = f"{tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            raise ValueError(f"keys and values do not belong together: {shapes}")
        position = self.first_token
        end = position + sum(token_counts)
        if position < 0 or end > len(self.page_ids) * self.page_tokens:
            raise ValueError(
                f"tokens {position}..{end} do not lie in {len(self.page_ids)} pages of {self.page_tokens} tokens"
            )
        block = 0
        while block < len(token_counts):
            tokens = token_counts[block]
            page, at = divmod(position, self.page_tokens)
            whole = 0
            while (
                block + whole < len(token_counts)
                and token_counts[block + whole] == tokens
                and at + (whole + 1) * tokens <= self.page_tokens
            ):
                whole += 1
            if whole:
                yield Piece(block, whole, 0, tokens, self.page_ids[page], at)
                position, block = position + whole * tokens, block + whole
                continue
            done = 0
            while done < tokens:
                page, at = divmod(position, self.page_tokens)
                some = min(tokens - done, self.page_tokens - at)
                yield Piece(block, 1, done, some, self.page_ids[page], at)
                position, done = position + some, done + some
            block += 1


class Event(ABC):
    """The end of one piece of a stream's work."""

    @property
    @abstractmethod
    def is_done(self) -> bool: ...

    @property
    @abstractmethod
    def error(self) -> Exception | None:
        """What the work raised. None where it did not, or is not done."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Keep the calling thread until the work is done, at most that long. Whether it is."""


class StreamClosed(RuntimeError):
    """Work was given to a stream that takes no more."""


class Stream(ABC):
    """Work in order, beside the engine's computing. Thread-safe.

    Nothing here waits: what the work raises is in its event. A stream that is dropped is closed. Work may be
    given from a destructor.
    """

    @abstractmethod
    def submit(self, work: Callable[[], None]) -> Event:
        """Have the host do something once all earlier work is done. Raises StreamClosed."""

    @abstractmethod
    def scatter(
        self, slices: Bytes, token_counts: Sequence[int], pages: Pages, rotation: Rotation | None = None
    ) -> Event:
        """Put the blocks of one layer into an engine's pages; then turn the keys there.

        The event's error is a ValueError where sizes do not agree. Raises StreamClosed.
        """

    @abstractmethod
    def gather(self, pages: Pages, token_counts: Sequence[int], into: Bytes, rotation: Rotation | None = None) -> Event:
        """The reverse: an engine's pages into the blocks of one layer; the keys are turned in `into`.

        The pages must not change until the event is done. Errors as those of `scatter`.
        """

    @abstractmethod
    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copy one tensor onto another of its shape and type. Raises StreamClosed."""

    @abstractmethod
    def close(self) -> None:
        """Take no more work. What was given is still done; nobody waits for it here."""


class Staging:
    """Host memory of a fixed size, lent in parts. Thread-safe; never waits."""

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
    def lent_bytes(self) -> int:
        with self._lock:
            return sum(size for _, size in self._lent.values())

    def reserve(self, size_bytes: int) -> Bytes | None:
        """That much memory in one piece, or None where there is none. `release` gives it back."""
        needed = -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            for number, (offset, size) in enumerate(self._free):
                if size >= needed > 0:
                    self._free[number : number + 1] = [(offset + needed, size - needed)] if size > needed else []
                    self._lent[self._address + offset] = (offset, needed)
                    return self._memory[offset : offset + size_bytes]
        return None

    def release(self, memory: Bytes) -> None:
        """Give back what `reserve` lent. Raises KeyError where it is not lent."""
        with self._lock:
            offset, size = self._lent.pop(memory.__array_interface__["data"][0])
            merged: list[tuple[int, int]] = []
            for run in sorted([*self._free, (offset, size)]):
                if merged and sum(merged[-1]) == run[0]:
                    merged[-1] = (merged[-1][0], merged[-1][1] + run[1])
                else:
                    merged.append(run)
            self._free = merged


_ALIGNMENT = 4096  # Of what staging lends: pages are what DMA and direct I/O go by.


class Device(ABC):
    """One kind of machine. Without state, but for what it hands out."""

    @abstractmethod
    def stream(self, name: str) -> Stream:
        """A new stream. `name` is what its threads are called."""

    @abstractmethod
    def staging(self, size_bytes: int) -> Staging:
        """New host memory that this device copies to and from fast; pinned where that makes a difference."""

    @abstractmethod
    def wait_in_compute(self, event: Event, timeout_s: float) -> bool:
        """Let the engine's later work wait for the event. Whether it need not be waited for any longer than that.

        A device with streams of its own orders them, and the calling thread goes on; on a CPU it waits.
        """

    def rotate(self, keys: torch.Tensor, rotation: Rotation, first_token: int = 0) -> None:
        """Turn ``keys[..., token, dim]`` in place. A device with a faster way has its own."""
        rotation.apply(keys, first_token) if first_token else rotation.apply(keys)
