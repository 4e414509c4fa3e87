"""The time to the first token of a request with a stored history: computed again, and loaded in several ways.

The time begins with the lookup, or, with a read buffer, when the buffer's layers are loaded: an engine runs other
requests at that time. It ends when the first token is known on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.gpu.compute import LLAMA_13B, MISTRAL_7B, TINY, Compute, Shape, make_compute
from benchmarks.gpu.report import Goal, Part
from benchmarks.gpu.rig import (
    TRANSPORTS,
    Clock,
    Load,
    Rig,
    connected,
    daemon,
    median,
    new_chain,
    rounds,
    wait_until_registered,
)
from kvservice_adapter.schedule import perfect_buffer_layers
from kvservice_client import BlockChain, Durability

TITLE = "Time to the first token"
ABOUT = (
    "Random weights, 100 new tokens after a stored history; medians. `computed again`: the forward pass of all tokens. "
    "The time begins with the lookup. With a read buffer it begins when the buffer's layers are loaded: an engine runs "
    "other requests before."
)
ROUNDS, SSD_ROUNDS = 5, 3
AGAIN, BY_LAYERS = "computed again", "layer by layer"
COLUMNS = ("Model", "History", "Way", "TTFT (ms)", "Lower than computing again", "Prompt tokens/s")


class Case(NamedTuple):
    """One model with its histories. `goals`: by length of history, the share by which DRAM must lower the time."""

    shape: Shape
    histories: tuple[int, ...]
    new: int
    goals: dict[int, float]
    block_tokens: int = 256

    @property
    def tokens(self) -> int:
        return max(self.histories) + self.new


CASES = (
    Case(LLAMA_13B, (1024, 2048, 3584), 100, {2048: 0.87, 3584: 0.87}),
    Case(MISTRAL_7B, (16384, 32768), 100, {16384: 0.87, 32768: 0.95}),
)
REHEARSED = (Case(TINY, (64, 96), 20, {96: 0.95}, 32),)


def measure(part: Part, clock: Clock, *, rehearsal: bool) -> None:
    """Fill the part."""
    cases = REHEARSED if rehearsal else CASES
    for number, case in enumerate(cases):
        with part.attempt(case.shape.name):
            _measure(part, case, clock.share(len(cases) - number), rehearsal=rehearsal)


def _measure(part: Part, case: Case, clock: Clock, *, rehearsal: bool) -> None:
    compute = make_compute(case.shape, case.tokens, rehearsal=rehearsal)
    stored = sum(case.shape.kv_bytes(each) for each in case.histories)
    with daemon(stored * 5 // 4 + (64 << 20)) as address:
        for number, history in enumerate(case.histories):
            share = clock.share(len(case.histories) - number)
            again_s = _again(part, compute, case, history, share.share(4), rehearsal=rehearsal)
            chain: BlockChain | None = None
            for transport in TRANSPORTS:
                with (
                    part.attempt(f"{case.shape.name}, {history} tokens, {transport}"),
                    connected(address, compute, transport, case.block_tokens) as rig,
                ):
                    if rig is None:
                        continue
                    if chain is None:
                        compute.forward(history, 0)
                        compute.wait()
                        compute.keep(history)
                        chain = new_chain(rig.layout, history)
                        rig.save(chain, Durability.SSD)
                    one = share.share(len(TRANSPORTS) - TRANSPORTS.index(transport))
                    found = _History(rig, case, chain, transport).measure(one, 1 if rehearsal else ROUNDS)
                    _report(part, case, history, found, again_s, transport)


def _again(part: Part, compute: Compute, case: Case, history: int, clock: Clock, *, rehearsal: bool) -> float:
    """Seconds to compute all tokens: what each way to load the history is compared with."""
    tokens = history + case.new
    times = rounds({AGAIN: lambda: _timed(compute, tokens, 0)}, 1 if rehearsal else ROUNDS, clock)
    part.rows.append(_row(case, history, AGAIN, median(times[AGAIN]), ""))
    return median(times[AGAIN])


def _timed(compute: Compute, new: int, history: int) -> float:
    begin_s = time.perf_counter()
    compute.forward(new, history)
    compute.wait()
    return time.perf_counter() - begin_s


def _report(
    part: Part, case: Case, history: int, found: dict[str, list[float]], again_s: float, transport: str
) -> None:
    lower = {way: 1 - median(times) / again_s for way, times in found.items()}
    for way, times in found.items():
        part.rows.append(_row(case, history, way, median(times), f"{lower[way]:.1%}"))
    if least := case.goals.get(history):
        text = f"{case.shape.name}, {history} tokens of history, {transport}, {BY_LAYERS} from DRAM: TTFT lower by"
        part.goals.append(Goal(text, lower[f"{transport}, {BY_LAYERS}"], least=least))


def _row(case: Case, history: int, way: str, taken_s: float, lower: str) -> tuple[str, ...]:
    rate = (history + case.new) / taken_s
    return case.shape.name, str(history), way, f"{taken_s * 1e3:.1f}", lower, f"{rate:.0f}"


class _History:
    """One history that is stored, and the ways to continue it by one transport."""

    def __init__(self, rig: Rig, case: Case, chain: BlockChain, transport: str) -> None:
        self._rig, self._case, self._chain, self._transport = rig, case, chain, transport
        self._compute: Compute = rig.compute
        self._history = chain.token_count

    def measure(self, clock: Clock, count: int) -> dict[str, list[float]]:
        """Seconds of each way, in each round."""
        self._check()
        layers, transport = self._case.shape.layers, self._transport
        both = rounds({"compute": self._new_tokens, "load": self._load_only}, min(count, 3), clock)
        buffer = perfect_buffer_layers(layers, median(both["load"]), median(both["compute"]))
        ways: dict[str, Callable[[], float]] = {
            f"{transport}, loaded, then computed": partial(self._loaded, layers, whole=True),
            f"{transport}, {BY_LAYERS}": partial(self._loaded, 0),
            f"{transport}, read buffer of {buffer} layers": partial(self._loaded, buffer),
        }
        evicted = {f"{name}, from SSD": partial(self._from_ssd, way) for name, way in ways.items()}
        if transport != TRANSPORTS[-1]:  # The disk takes the time, so the other ways are measured once.
            evicted = {name: way for name, way in evicted.items() if BY_LAYERS in name}
        return rounds(ways, count, clock.share(2)) | rounds(evicted, min(count, SSD_ROUNDS), clock)

    def _check(self) -> None:
        """A load in each tier brings what was saved. Raises AssertionError."""
        for evicted in (False, True):
            if evicted:
                self._rig.evict(self._chain)
            self._compute.erase()
            load = Load(self._rig, self._chain, self._case.shape.layers)
            load.wait_for(self._case.shape.layers)
            load.end()
            size_bytes = self._case.shape.kv_bytes(self._history)
            wait_until_registered(self._rig.client, self._compute.device, self._transport, size_bytes)
            assert self._compute.holds(), "the loaded history is not the one that was saved"
            self._check_transport(load)

    def _check_transport(self, load: Load) -> None:
        assert load.transport == self._transport, f"the load came by {load.transport}, not by {self._transport}"

    def _new_tokens(self) -> float:
        """With the history in its pages."""
        return _timed(self._compute, self._case.new, self._history)

    def _load_only(self) -> float:
        begin_s = time.perf_counter()
        load = Load(self._rig, self._chain, self._case.shape.layers)
        load.wait_for(self._case.shape.layers)
        taken_s = time.perf_counter() - begin_s
        load.end()
        self._check_transport(load)
        return taken_s

    def _loaded(self, buffer_layers: int, *, whole: bool = False) -> float:
        begin_s = time.perf_counter()
        load = Load(self._rig, self._chain, buffer_layers)
        if buffer_layers:
            load.wait_for(buffer_layers)
        if buffer_layers and not whole:
            begin_s = time.perf_counter()
        self._compute.forward(self._case.new, self._history, before=load.before)
        self._compute.wait()
        taken_s = time.perf_counter() - begin_s
        load.end()
        self._check_transport(load)
        return taken_s

    def _from_ssd(self, way: Callable[[], float]) -> float:
        self._rig.evict(self._chain)
        return way()
