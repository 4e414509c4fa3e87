"""Layer-wise pre-loading on a real model (PAPER T3): prefill time by the size of the read buffer.

The link is throttled so that a layer's computing takes 0.6 of its loading, as in the paper's figure 19.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from benchmarks.adapter import rig
from benchmarks.adapter.paper_schedule import prefill_with_preloading, prefill_without_preloading
from benchmarks.adapter.report import Section
from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.schedule import perfect_buffer_layers
from kvservice_client import BlockCache, BlockChain, Client, block_chain

COMPUTE_PER_LOAD = 0.6
_LOAD_S = 60.0  # No wait may end by a timeout here.


@dataclass(frozen=True, slots=True)
class Prefill:
    total_s: float  # From when the request runs to its logits.
    waited_s: float  # The part of it that layers' `update` calls waited.
    bytes_per_s: float  # The rate of the load.


class Rig:
    """A model, and a history whose KV is in the daemon."""

    def __init__(self, shape: dict[str, int], history_tokens: int, new_tokens: int) -> None:
        self.model = rig.random_model(shape)
        self.layers = shape["layers"]
        self.layout = rig.layout_of(self.model, "preload")
        self.history = rig.some_tokens(self.model, history_tokens, seed=1)
        self.new = rig.some_tokens(self.model, new_tokens, seed=2)
        self.chain: BlockChain = block_chain(self.layout, self.history[0].numpy())
        self.layer_bytes = history_tokens * self.layout.bytes_per_token // self.layers
        self.device = CpuDevice()
        self.stream = self.device.stream("bench-load")
        cache: Any = rig.watched_cache(self.model)
        rig.forward(self.model, self.history, cache)
        self.pages = [Pages(layer.keys, layer.values, [0]) for layer in cache.layers]
        self.logits = self._forward(self.pages.__getitem__)

    def save(self, blocks: BlockCache) -> None:
        into = torch.empty(self.layers, self.layer_bytes, dtype=torch.uint8).numpy()
        for index, pages in enumerate(self.pages):
            event = self.stream.gather(pages, self.chain.token_counts, into[index])
            assert event.wait(_LOAD_S) and event.error is None
        assert blocks.save(self.chain, list(into)).is_complete

    def compute_s(self) -> float:
        """The forward of the new tokens, with the whole history in memory."""
        return rig.seconds(partial(self._forward, self.pages.__getitem__))

    def prefill(self, blocks: BlockCache, buffer_layers: int | None) -> Prefill:
        """The forward of the new tokens while the history loads; with None the load ends first."""
        lease = blocks.lookup(self.chain)
        assert lease.hit_blocks == len(self.chain)
        loader = LayerLoader(
            self.device,
            self.stream,
            HostLayers(self.stream, partial(lease.load, timeout_s=_LOAD_S), lease.token_counts),
            self._empty_pages,
            layer_count=self.layers,
            buffer_layers=self.layers if buffer_layers is None else buffer_layers,
            wait_s=_LOAD_S,
            release=lease.release,
        )
        wait: rig.Wait = loader.wait
        begin_s = time.perf_counter()
        loader.start()
        if buffer_layers is None:
            wait = [loader.wait(layer) for layer in range(self.layers)].__getitem__
        else:
            while loader.report.layers < min(buffer_layers, self.layers):
                time.sleep(0.001)  # No event marks it: an engine runs its other requests at this time.
            begin_s = time.perf_counter()  # Layers loaded before this took none of the request's time.
        logits = self._forward(wait)
        total_s = time.perf_counter() - begin_s
        assert torch.equal(logits, self.logits), "the loaded history is not the one that was saved"
        report = loader.report
        loader.close()
        return Prefill(total_s, sum(report.waited_s), report.bytes_per_s)

    def _forward(self, wait: rig.Wait) -> torch.Tensor:
        cache = rig.watched_cache(self.model, self.history.shape[1], wait)
        return rig.forward(self.model, self.new, cache)

    def _empty_pages(self, layer: int) -> Pages:
        like = self.pages[layer]
        return Pages(torch.empty_like(like.keys), torch.empty_like(like.values), [0])


def measure(*, quick: bool) -> Section:
    """Medians of rounds; each round runs every buffer size once."""
    with rig.a_core_for_loading():
        return _measure(quick=quick)


def _measure(*, quick: bool) -> Section:
    history_tokens, new_tokens = (512, 64) if quick else (1024, 100)
    subject = Rig(rig.QUICK_SHAPE if quick else rig.SHAPE, history_tokens, new_tokens)
    layers = subject.layers
    with rig.daemon(dram_bytes=2 * layers * subject.layer_bytes + (64 << 20)) as address:
        with Client(address, name="adapter bench") as client:
            subject.save(client.open_layout(subject.layout))
        compute_s = rig.median([subject.compute_s() for _ in range(9)])
        load_s = compute_s / COMPUTE_PER_LOAD
        rate = layers * subject.layer_bytes / load_s
        perfect = perfect_buffer_layers(layers, load_s, compute_s)
        buffers = [None, 0, perfect // 3, 2 * perfect // 3, perfect, layers]
        found: dict[int | None, list[Prefill]] = {k: [] for k in buffers}
        with Client(address, name="adapter bench", throttle_bytes_per_s=rate) as client:
            blocks = client.open_layout(subject.layout)
            for number in range(3 if quick else 7):
                for k in [*buffers[number % len(buffers) :], *buffers[: number % len(buffers)]]:
                    found[k].append(subject.prefill(blocks, k))
    section = Section(
        "preload",
        "Layer-wise pre-loading",
        f"A Llama with random weights in the shape of SmolLM2-135M ({layers} layers, fp32, {torch.get_num_threads()} "
        f"thread of its own) prefills {new_tokens} tokens after {history_tokens} from the daemon, over a "
        f"transport throttled to {rate / 1e6:.0f} MB/s: computing a layer takes {COMPUTE_PER_LOAD} of its load time. "
        f"Medians; waits are those in the layers' `update`. The perfect buffer has {perfect} layers.",
    )
    _fill(section, found, layers, compute_s, load_s, perfect)
    return section


def _fill(
    section: Section, found: dict[int | None, list[Prefill]], layers: int, compute_s: float, load_s: float, perfect: int
) -> None:
    without = rig.median([each.total_s for each in found[None]])
    expected = prefill_without_preloading(layers, load_s / layers, compute_s / layers)
    section.add("compute_ms", compute_s * 1e3, note="with the whole history in memory")
    section.add("no_preloading_ms", without * 1e3, note=f"closed form {expected * 1e3:.4g}")
    goals = {0: "at least 0.3", perfect: "at least 0.55"}
    totals = []
    for k in sorted(k for k in found if k is not None):
        total_s = rig.median([each.total_s for each in found[k]])
        form_s = prefill_with_preloading(layers, load_s / layers, compute_s / layers, k)
        name = "perfect" if k == perfect else "all" if k == layers else str(k)
        section.add(f"buffer_{name}_ms", total_s * 1e3, note=f"closed form {form_s * 1e3:.4g}")
        section.add(f"buffer_{name}_waited_ms", rig.median([each.waited_s for each in found[k]]) * 1e3)
        cut, form_cut = 1 - total_s / without, 1 - form_s / expected
        section.add(f"buffer_{name}_cut", cut, goals.get(k, ""), f"closed form {form_cut:.4g}")
        totals.append(total_s)
    worst = max(after / before - 1 for before, after in pairwise(totals))
    section.add("worst_step", worst, "at most 0.03", "slower by this share than with the next smaller buffer")
