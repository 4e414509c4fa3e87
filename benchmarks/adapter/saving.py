"""Saving during the forward pass (PAPER T5): its cost for the engine, and the time that it saves.

Rounds of the same prompt length, in turn: without saving, with it, and with staging that is full.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import Any, Literal

import torch
from transformers import DynamicCache

from benchmarks.adapter import rig
from benchmarks.adapter.report import Section
from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.save import LayerSaver, SaveJob
from kvservice_client import BlockCache, BlockChain, Client, block_chain

_DECODE_STEPS = 20
_SYNC_SHARE = 0.15  # The share of a request's time over the slow link, as in the paper's figure 20.
_SAVE_S = 120.0

Way = Literal["not", "behind", "after"]  # How a request is saved.


@dataclass(frozen=True, slots=True)
class Request:
    """Seconds of one request: its prompt's forward, and all of it, with decode steps and what is saved after them."""

    prefill_s: float
    total_s: float
    prefill_cpu_s: float  # CPU time of all threads of this process, without other work on the machine.


class Rig:
    def __init__(self, shape: dict[str, int], prompt_tokens: int) -> None:
        self.model = rig.random_model(shape)
        self.layout = rig.layout_of(self.model, "saving")
        self.prompt_tokens = prompt_tokens
        self.save_bytes = prompt_tokens * self.layout.bytes_per_token
        self._seeds = count()

    def new_prompt(self) -> torch.Tensor:
        return rig.some_tokens(self.model, self.prompt_tokens, seed=next(self._seeds))

    def request(self, saver: LayerSaver, way: Way, *, decode_steps: int = 0) -> Request:
        """A new prompt, and an answer."""
        prompt = self.new_prompt()
        chain = block_chain(self.layout, prompt[0].numpy(), with_partial=True)
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        job = saver.begin(chain) if way == "behind" else None

        def hand_over(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            if job is not None and keys.shape[2] == self.prompt_tokens:
                job.layer(layer, Pages(keys, values, [0]))

        cache = rig.watched_cache(self.model, hand_over=hand_over)
        rig.forward(self.model, prompt, cache)
        if job is not None:
            job.commit()
        prefill_s, prefill_cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
        for step in range(decode_steps):
            rig.forward(self.model, prompt[:, step : step + 1], cache)
        if way == "after":
            self._save_now(saver, chain, cache)
        return Request(prefill_s, time.perf_counter() - begin_s, prefill_cpu_s)

    def _save_now(self, saver: LayerSaver, chain: BlockChain, cache: Any) -> None:
        job = saver.begin(chain)
        assert isinstance(job, SaveJob)
        for index, layer in enumerate(cache.layers):
            job.layer(index, Pages(layer.keys, layer.values, [0]))
        job.commit()
        assert saver.flush(_SAVE_S)


def measure(*, quick: bool) -> Section:
    """Medians; a slowdown is the median of each round's own ratio."""
    subject = Rig(rig.QUICK_SHAPE if quick else rig.SHAPE, 512 if quick else 1100)
    rounds = 4 if quick else 8
    section = Section(
        "saving",
        "Saving during the forward pass",
        f"A Llama with random weights in the shape of SmolLM2-135M ({subject.layout.layers} layers, fp32, "
        f"{torch.get_num_threads()} threads) prefills {subject.prompt_tokens} tokens, which gives "
        f"{subject.save_bytes / 1e6:.0f} MB of KV; `request` is the prefill and {_DECODE_STEPS} decode steps. Medians "
        "of interleaved rounds, each with a new prompt; the daemon has the same cores.",
    )
    with rig.daemon(dram_bytes=8 * subject.save_bytes + (64 << 20)) as address:
        with Client(address, name="adapter bench", timeout_s=_SAVE_S) as client:
            blocks = client.open_layout(subject.layout)
            _measure_forward(section, subject, blocks, rounds)
            _measure_connector(section, subject, client, rounds)
            plain_s = _measure_request(section, subject, blocks, rounds // 2, "")
        with Client(
            address,
            name="adapter bench",
            timeout_s=_SAVE_S,
            throttle_bytes_per_s=subject.save_bytes / (plain_s * _SYNC_SHARE / (1 - _SYNC_SHARE)),
        ) as client:
            _measure_request(section, subject, client.open_layout(subject.layout), rounds // 2, "_slow_link")
        with Client(
            address, name="adapter bench", timeout_s=_SAVE_S, throttle_bytes_per_s=subject.save_bytes / 60
        ) as client:
            _measure_saturated(section, subject, client.open_layout(subject.layout), rounds)
    return section


def _measure_forward(section: Section, subject: Rig, blocks: BlockCache, rounds: int) -> None:
    saver = LayerSaver(CpuDevice(), blocks, staging_bytes=2 * subject.save_bytes)
    off, on = _alternate(subject, saver, rounds, wait=True)
    stats = saver.stats
    saver.close()
    assert stats.failed == stats.refused_blocks == 0
    section.add("prefill_ms", rig.median([each.prefill_s for each in off]) * 1e3)
    section.add("prefill_saved_ms", rig.median([each.prefill_s for each in on]) * 1e3)
    section.add("prefill_slowdown", _more(off, on), "under 0.02")
    section.add("prefill_cpu_more", _more(off, on, "prefill_cpu_s"), "", "CPU time that saving adds to the forward")
    section.add("dropped_layers", stats.dropped * subject.layout.layers, "0", f"of {stats.saved} saves")


def _measure_connector(section: Section, subject: Rig, client: Client, rounds: int) -> None:
    """The same with the connector's other work: prefix lookup, block keys, and the layers of its cache."""
    connector = TransformersConnector(
        client, subject.model, model_id="bench/connector", model_revision="1", staging_bytes=4 * subject.save_bytes
    )
    blocks = client.open_layout(connector.layout)
    off: list[float] = []
    on: list[float] = []
    missing = 0
    for number in range(rounds + 1):
        for kept in (False, True) if number % 2 else (True, False):
            prompt = subject.new_prompt()
            cache = connector.restore(prompt).cache if kept else DynamicCache(config=subject.model.config)
            (on if kept else off).append(rig.seconds(partial(rig.forward, subject.model, prompt, cache)))
            assert connector.flush(_SAVE_S)
            if kept:
                chain = block_chain(connector.layout, prompt[0].numpy())
                missing += blocks.contains(chain) < len(chain)
    connector.close()
    ratios = [b / a for a, b in zip(off[1:], on[1:], strict=True)]
    section.add("connector_prefill_slowdown", rig.median(ratios) - 1, "under 0.02", "of the transformers connector")
    section.add("connector_incomplete_saves", missing, "0", f"of {len(on)}, in whole blocks")


def _measure_saturated(section: Section, subject: Rig, blocks: BlockCache, rounds: int) -> None:
    """Staging has space for one save, and a slow link keeps it there."""
    saver = LayerSaver(CpuDevice(), blocks, staging_bytes=subject.save_bytes * 3 // 2)
    subject.request(saver, "behind")
    off, on = _alternate(subject, saver, rounds, wait=False)
    stats = saver.stats
    section.add("saturated_slowdown", _more(off, on), "under 0.02", "of the same forward, with no room in staging")
    section.add("saturated_drops", stats.dropped, note=f"of {stats.dropped + 1} saves: {stats.dropped_blocks} blocks")


def _measure_request(section: Section, subject: Rig, blocks: BlockCache, rounds: int, suffix: str) -> float:
    """Compare saving during the forward pass with saving after the last token. Returns the seconds without saving."""
    saver = LayerSaver(CpuDevice(), blocks, staging_bytes=4 * subject.save_bytes)
    found: dict[Way, list[float]] = {"not": [], "after": [], "behind": []}
    order = cycle(found)
    for _ in range(rounds):
        for _ in range(len(found)):
            way = next(order)
            found[way].append(subject.request(saver, way, decode_steps=_DECODE_STEPS).total_s)
            assert saver.flush(_SAVE_S)
        next(order)
    assert not saver.stats.dropped
    saver.close()
    plain_s, after_s, behind_s = (rig.median(each) for each in found.values())
    section.add(f"request{suffix}_ms", plain_s * 1e3)
    section.add(f"request{suffix}_saved_after_ms", after_s * 1e3, note=f"{1 - plain_s / after_s:.0%} of it for saving")
    goal = "0.10 to 0.20" if suffix else ""
    section.add(f"request{suffix}_saved_behind_ms", behind_s * 1e3)
    section.add(
        f"request{suffix}_cut", 1 - behind_s / after_s, goal, "saved during the forward pass against saved after it"
    )
    return plain_s


def _alternate(subject: Rig, saver: LayerSaver, rounds: int, *, wait: bool) -> tuple[list[Request], list[Request]]:
    """Prefills without and with saving, round by round. The first round warms up and is dropped."""
    found: dict[Way, list[Request]] = {"not": [], "behind": []}
    ways: tuple[Way, Way] = ("not", "behind")
    for number in range(rounds + 1):
        for way in ways if number % 2 else reversed(ways):
            found[way].append(subject.request(saver, way))
            assert not wait or saver.flush(_SAVE_S)
    return found["not"][1:], found["behind"][1:]


def _more(off: list[Request], on: list[Request], what: str = "prefill_s") -> float:
    return rig.median([getattr(b, what) / getattr(a, what) for a, b in zip(off, on, strict=True)]) - 1
