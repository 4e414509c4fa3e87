"""``python -m benchmarks.client.in_place``: a save out of an engine's pages, by a copy and in place.

Both ways begin with the KV of 2,816 tokens (11 blocks of 30 layers, 130 MB) in pages in random order, and end when the
daemon has stored the blocks:

- by a copy: gather every layer into private memory, then `BlockCache.save`;
- in place: gather every slice into `Reservation.slices` and seal it, then commit.

The order of the two changes each round. Times are medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import leftovers
from benchmarks.client.parts import daemon
from benchmarks.client.wire import until_allocated
from benchmarks.report import check_folder, check_least
from kvservice_client import BlockCache, BlockChain, Client, Layout, block_chain

_LAYOUT = Layout("in-place", "float32", layers=30, kv_heads=3, k_head_dim=64, v_head_dim=64, block_tokens=256)
_BLOCKS = 11
_DRAM_BYTES = 2**30
_WARM_UP = 3  # Rounds that map and fault in the memory of both sides.


class Pages:
    """An engine's KV cache: per layer an array ``[page, K and V, head, token, dim]``, and the pages of one request."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        page_count = _BLOCKS * _LAYOUT.block_tokens // page_tokens
        shape = (page_count, 2, _LAYOUT.kv_heads, page_tokens, _LAYOUT.groups[0].k_head_dim)
        generator = np.random.default_rng(1)
        self._layers = [generator.standard_normal(shape, np.float32) for _ in range(_LAYOUT.layers)]
        self._ids = generator.permutation(page_count).tolist()

    def gather(
        self, layer: int, targets: Sequence[NDArray[np.uint8]], on_slice: Callable[[int, int], None] | None = None
    ) -> None:
        """One layer of all blocks into their slices."""
        ids = iter(self._ids)
        for number, target in enumerate(targets):
            slices = target.view(np.float32).reshape(2, _LAYOUT.kv_heads, _LAYOUT.block_tokens, -1)
            for first in range(0, _LAYOUT.block_tokens, self.page_tokens):
                np.copyto(slices[:, :, first : first + self.page_tokens], self._layers[layer][next(ids)])
            if on_slice is not None:
                on_slice(layer, number)


class Saves:
    """The two ways. Each returns the milliseconds in total, and of its steps."""

    def __init__(self, blocks: BlockCache, pages: Pages) -> None:
        self._blocks, self._pages = blocks, pages
        slice_bytes = blocks.slice_bytes(_LAYOUT.block_tokens)
        self._staging = np.zeros((_LAYOUT.layers, _BLOCKS, slice_bytes), np.uint8)

    def by_copy(self, chain: BlockChain) -> list[float]:
        times = [time.perf_counter()]
        for layer, targets in enumerate(self._staging):
            self._pages.gather(layer, list(targets))
        times.append(time.perf_counter())
        result = self._blocks.save(chain, list(self._staging.reshape(_LAYOUT.layers, -1)))
        times.append(time.perf_counter())
        assert result.stored == _BLOCKS, result
        return _steps(times)

    def in_place(self, chain: BlockChain) -> list[float]:
        times = [time.perf_counter()]
        with self._blocks.reserve([chain]) as reservation:
            times.append(time.perf_counter())
            for layer in range(_LAYOUT.layers):
                self._pages.gather(layer, reservation.slices(layer), reservation.seal)
            times.append(time.perf_counter())
            (result,) = reservation.commit()
        times.append(time.perf_counter())
        assert result.stored == _BLOCKS, result
        return _steps(times)


def _steps(times: Sequence[float]) -> list[float]:
    return [1e3 * (end - start) for start, end in [(times[0], times[-1]), *pairwise(times)]]


def measure(client: Client, page_tokens: int, rounds: int) -> str:
    saves = Saves(client.open_layout(_LAYOUT), Pages(page_tokens))
    found: dict[str, list[list[float]]] = {"by_copy": [], "in_place": []}
    for turn in range(_WARM_UP + rounds):
        for name in sorted(found, reverse=bool(turn % 2)):
            salt = f"{page_tokens} {turn} {name}".encode()
            chain = block_chain(_LAYOUT, np.arange(_BLOCKS * _LAYOUT.block_tokens), salt=salt)
            found[name].append(getattr(saves, name)(chain))
            client.admin.discard(chain)  # So that no save waits for an eviction.
    copy, place = (
        [statistics.median(step) for step in zip(*times[_WARM_UP:], strict=True)] for times in found.values()
    )
    return (
        f"pages of {page_tokens:3d} tokens: by a copy {copy[0]:.1f} (gather {copy[1]:.1f}, save {copy[2]:.1f}), "
        f"in place {place[0]:.1f} (reserve {place[1]:.1f}, gather and seal {place[2]:.1f}, commit {place[3]:.1f}): "
        f"{place[0] / copy[0]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.client.in_place",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dram-path", type=Path, default=Path("/dev/shm"), help="a folder in shared memory; 1 GiB is used"
    )
    parser.add_argument("--page-tokens", type=int, nargs="+", default=[128, 64, 32], help="sizes of pages; %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="of which the medians are shown; %(default)s")
    arguments = parser.parse_args()
    check_folder(parser, "--dram-path", arguments.dram_path)
    check_least(parser, "--rounds", arguments.rounds)
    leftovers.begin(None, arguments.dram_path)
    with (
        leftovers.own_folder(None) as folder,
        daemon(folder, arguments.dram_path, _DRAM_BYTES) as running,
        Client(running.address, transport="shm", timeout_s=60) as client,
    ):
        until_allocated(client)
        for page_tokens in arguments.page_tokens:
            print(measure(client, page_tokens, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
