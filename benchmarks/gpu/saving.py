"""The forward pass of a prompt while KV is saved, beside the same without: in both ways in which engines save."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.gpu.compute import LLAMA_13B, MISTRAL_7B, TINY, Compute, Shape, make_compute, page_count
from benchmarks.gpu.report import Goal, Part
from benchmarks.gpu.rig import (
    TRANSPORTS,
    WAIT_S,
    Clock,
    PageSaves,
    Rig,
    connected,
    daemon,
    median,
    new_chain,
    rounds,
    wait_until_registered,
)
from kvservice_adapter.device.base import Pages
from kvservice_adapter.save import LayerSaver

TITLE = "Saving during the forward pass"
ABOUT = (
    "`LayerSaver`, as with transformers: a layer's KV is copied out while the next layers are computed. `PageSaver`, "
    "as with vLLM: the KV of another prompt of this length is copied out of its pages, from the pass's beginning on, "
    "and the time ends when both are done. `Slower by`: the median of the rounds' ratios."
)
COLUMNS = ("Model", "Prompt", "Saved by", "Forward pass (ms)", "With saving (ms)", "Slower by", "Blocks not saved")
ROUNDS = 9
_PROMPTS: tuple[tuple[Shape, int], ...] = ((LLAMA_13B, 2048), (MISTRAL_7B, 8192))
_REHEARSED: tuple[tuple[Shape, int], ...] = ((TINY, 64),)


def measure(part: Part, clock: Clock, *, rehearsal: bool) -> None:
    """Fill the part."""
    prompts = _REHEARSED if rehearsal else _PROMPTS
    for number, (shape, tokens) in enumerate(prompts):
        with part.attempt(shape.name):
            _measure(part, shape, tokens, clock.share(len(prompts) - number), rehearsal=rehearsal)


def _measure(part: Part, shape: Shape, tokens: int, clock: Clock, *, rehearsal: bool) -> None:
    compute = make_compute(shape, 2 * tokens, rehearsal=rehearsal)  # The prompt, and the one that is saved from pages.
    with daemon(4 * shape.kv_bytes(tokens) + (64 << 20)) as address:
        for number, transport in enumerate(TRANSPORTS):
            with (
                part.attempt(f"{shape.name}, {transport}"),
                connected(address, compute, transport, 16 if rehearsal else 256) as rig,
            ):
                if rig is None:
                    continue
                prompt = _Prompt(rig, tokens, transport)
                try:
                    prompt.warm_up()
                    share, count = clock.share(len(TRANSPORTS) - number), 1 if rehearsal else ROUNDS
                    found = rounds(prompt.ways(), count, share)
                finally:
                    prompt.close()
                _report(part, prompt, found, shape.name, tokens)


def _report(part: Part, prompt: _Prompt, found: dict[str, list[float]], name: str, tokens: int) -> None:
    plain = found.pop("plain")
    for way, saved in found.items():
        slower = median([b / a for a, b in zip(plain, saved, strict=True)]) - 1
        lost = prompt.lost[way]
        times = f"{median(plain) * 1e3:.1f}", f"{median(saved) * 1e3:.1f}"
        part.rows.append((name, str(tokens), way, *times, f"{slower:.1%}", str(lost)))
        text = f"{name}, prompt of {tokens}, {way}"
        part.goals.append(Goal(f"{text}: slower with saving by", slower, most=0.02))
        part.goals.append(Goal(f"{text}: blocks that were not saved", lost, most=0))


class _Prompt:
    """The forward pass of one prompt: alone, with a save of its own layers, and with one of another prompt's pages."""

    def __init__(self, rig: Rig, tokens: int, transport: str) -> None:
        self._compute: Compute = rig.compute
        self._layout, self._client = rig.layout, rig.client
        self._tokens, self._transport = tokens, transport
        pages = page_count(tokens)
        self._own_pages, self._other_pages = range(pages), [range(pages, 2 * pages)]
        self._layers = rig.layers
        staging_bytes = rig.compute.shape.kv_bytes(tokens) + (1 << 20)  # For all layers.
        self._by_layers = LayerSaver(rig.compute.device, rig.blocks, staging_bytes=staging_bytes)
        self._by_pages = PageSaves(rig.compute.device, rig.blocks, rig.layers, rig.client, rig.memory)
        self.lost = dict.fromkeys(self.ways(), 0)  # Blocks that were not stored.

    def ways(self) -> dict[str, Callable[[], float]]:
        """All of this transport. A layer that is saved in the forward pass is copied out by the engine's process."""
        ways = {"plain": self._plain, f"PageSaver, {self._transport}": self._with_pages}
        return ways | ({"LayerSaver, shm": self._with_layers} if self._transport == "shm" else {})

    def warm_up(self) -> None:
        self._with_pages()
        size_bytes = 2 * self._compute.shape.kv_bytes(self._tokens)
        wait_until_registered(self._client, self._compute.device, self._transport, size_bytes)

    def close(self) -> None:
        self._by_pages.close()
        self._by_layers.close()

    def _plain(self) -> float:
        begin_s = time.perf_counter()
        self._compute.forward(self._tokens, 0)
        self._compute.wait()
        return time.perf_counter() - begin_s

    def _with_layers(self) -> float:
        """The time ends with the forward pass. Then the save is waited for."""
        chain = new_chain(self._layout, self._tokens)
        begin_s = time.perf_counter()
        job = self._by_layers.begin(chain)
        if job is None:
            raise RuntimeError("staging was not free")
        self._compute.forward(self._tokens, 0, after=lambda layer: job.layer(layer, self._pages(layer)))
        job.commit()
        self._compute.wait()
        taken_s = time.perf_counter() - begin_s
        assert self._by_layers.flush(WAIT_S)
        stats = self._by_layers.stats
        self.lost["LayerSaver, shm"] = stats.dropped_blocks + stats.failed_blocks + stats.refused_blocks
        return taken_s

    def _with_pages(self) -> float:
        """The time ends when the forward pass has, and the other prompt's pages may be written. Then the save is waited
        for.
        """
        chain = new_chain(self._layout, self._tokens)
        begin_s = time.perf_counter()
        gathering = self._by_pages.begin(chain, self._other_pages)
        self._compute.forward(self._tokens, 0)
        assert gathering.wait(WAIT_S)
        self._compute.wait()
        taken_s = time.perf_counter() - begin_s
        self.lost[f"PageSaver, {self._transport}"] += self._by_pages.end(chain, self._transport)
        return taken_s

    def _pages(self, layer: int) -> Pages:
        return self._layers.pages(layer, [self._own_pages], 0)
