"""What the connector's hooks cost in vLLM's threads: misses, steps, loads and saves.

    .venv-vllm/bin/python -m benchmarks.vllm.hooks

Needs no engine: vLLM's own `Request` and pages, the two roles, and a real daemon. Prints a Markdown table; times are
medians.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vllm.v1.request import Request

from benchmarks.vllm.roles import Roles
from kvservice_adapter.connectors.vllm.settings import LoadMode
from kvservice_client import block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.engine import model_folder

_LOADED_TOKENS = 2816


def timed_ms(run: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    run()
    return (time.perf_counter() - begin_s) * 1e3


class Hooks:
    def __init__(self, roles: Roles, repetitions: int) -> None:
        self._roles, self._repetitions = roles, repetitions
        self._random, self._number = random.Random(1), 0

    def tokens(self, count: int) -> list[int]:
        return [self._random.randrange(49152) for _ in range(count)]

    def name(self) -> str:
        self._number += 1
        return f"request-{self._number}"

    def miss(self, tokens: int) -> float:
        """Of a request of which nothing is stored: all hooks of the scheduler's thread until vLLM computes it."""
        scheduler, times = self._roles.scheduler, []
        for _ in range(self._repetitions):
            request = self._roles.request(self.name(), self.tokens(tokens))

            def run(request: object = request) -> None:
                scheduler.on_new(request)
                assert scheduler.matched_tokens(request, 0) == (0, False)

            times.append(timed_ms(run))
            scheduler.finished(request, ([],))
        return statistics.median(times)

    def orders_without_work(self) -> float:
        """`build_connector_meta` of a step with 64 running requests of which no block has filled."""
        requests = [self._roles.request(self.name(), self.tokens(100)) for _ in range(64)]
        for each in requests:
            self._roles.scheduler.on_new(each)
        times = [timed_ms(lambda: self._roles.orders(requests)) for _ in range(1000)]
        for each in requests:
            self._roles.scheduler.finished(each, ([],))
        return statistics.median(times)

    def orders_with_a_queue(self) -> float:
        """`build_connector_meta` of a step before which 16 requests came, which do not run."""
        times, tokens = [], self.tokens(3000)
        for _ in range(self._repetitions):
            requests = [self._roles.request(self.name(), tokens) for _ in range(16)]
            for each in requests:
                self._roles.scheduler.on_new(each)
            times.append(timed_ms(self._roles.orders))
            for each in requests:
                self._roles.scheduler.finished(each, ([],))
            self._roles.orders()
        return statistics.median(times)

    def step_without_work(self) -> float:
        """A worker's hooks in a decode step that neither loads nor saves."""
        orders = [self._roles.orders() for _ in range(1000)]
        return statistics.median(timed_ms(partial(self._roles.step, each)) for each in orders)

    def transfers(self, mode: LoadMode) -> tuple[float, float, float]:
        """The lookup until its answer, a load and a save of `_LOADED_TOKENS` tokens; the save until pages are free."""
        roles, lookups, loads, saves = self._roles, [], [], []
        for _ in range(self._repetitions):
            prompt = self.tokens(_LOADED_TOKENS)
            request = roles.request(self.name(), prompt)
            roles.scheduler.on_new(request)
            pages = roles.compute(request)
            roles.scheduler.finished(request, (pages,))
            orders = roles.orders()
            assert orders.saves
            saves.append(timed_ms(partial(roles.step, orders)))
            again = roles.request(self.name(), [*prompt, 1])
            again.kv_transfer_params = {"kvservice": {"load": mode}}
            until(partial(self._is_stored, prompt))

            def look_up(again: object = again) -> None:
                roles.scheduler.on_new(again)
                while (found := roles.scheduler.matched_tokens(again, 0)[0]) is None:
                    time.sleep(0.0001)  # vLLM would take an empty step, and ask again.
                assert found == _LOADED_TOKENS, found

            lookups.append(timed_ms(look_up))
            pages = roles.give_pages(again)
            roles.scheduler.allocated(again, (pages,), _LOADED_TOKENS)
            orders = roles.orders()
            loads.append(timed_ms(partial(roles.step, orders)))
            report = roles.worker.take_report()
            assert report is not None
            assert not report.failed
            roles.scheduler.finished(again, ([],))
            roles.orders()
        return statistics.median(lookups), statistics.median(loads), statistics.median(saves)

    def hung(self, daemon: DaemonProcess, mode: LoadMode) -> float:
        """A step with a save and two loads, the first for which the daemon does not answer. For new roles, once."""
        roles, prompt = self._roles, self.tokens(512)
        for tokens in (prompt, self.tokens(512)):
            request = roles.request(self.name(), tokens)
            roles.scheduler.on_new(request)
            roles.scheduler.finished(request, (roles.compute(request),))
            if tokens is prompt:
                roles.step(roles.orders())
                until(partial(self._is_stored, prompt))
        for _ in range(2):
            again = roles.request(self.name(), [*prompt, 1])
            again.kv_transfer_params = {"kvservice": {"load": mode}}
            roles.scheduler.on_new(again)
            until(partial(self._is_found, again))
            roles.scheduler.allocated(again, (roles.give_pages(again),), len(prompt))
        orders = roles.orders()
        assert (len(orders.saves), len(orders.loads)) == (1, 2)
        with daemon.stopped():
            return timed_ms(partial(roles.step, orders))

    def _is_found(self, request: Request) -> bool:
        return self._roles.scheduler.matched_tokens(request, 0)[0] is not None

    def _is_stored(self, prompt: list[int]) -> bool:
        blocks = self._roles.worker._blocks
        chain = block_chain(self._roles.worker.layout, prompt)
        return blocks.contains(chain) == len(chain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a model; by default SmolLM2-135M")
    parser.add_argument("--repetitions", type=int, default=9)
    given = parser.parse_args()
    if given.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if given.model is not None and not given.model.is_dir():
        parser.error(f"--model {given.model} is no folder")
    model = given.model or model_folder()
    rows: list[tuple[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        DaemonProcess(Path(folder), dram__capacity_bytes=2048 * MIB, ssd__capacity_bytes=0) as daemon,
    ):
        for transport in ("shm", "grpc"):
            roles = Roles(model, daemon.address, transport=transport, staging_bytes=512 * MIB)
            hooks = Hooks(roles, given.repetitions)
            until(partial(getattr, roles.scheduler, "is_ready"))
            if transport == "shm":
                rows += [(f"miss, {tokens:,} tokens", hooks.miss(tokens)) for tokens in (500, 3000, 131_000)]
                rows.append(("`build_connector_meta`, 64 requests, no block full", hooks.orders_without_work()))
                rows.append(("`build_connector_meta`, 16 new requests in the queue", hooks.orders_with_a_queue()))
                rows.append(("worker's hooks, step without work", hooks.step_without_work()))
            lookup, load, save = hooks.transfers(LoadMode.WHOLE)
            rows.append((f"lookup and ticket, {_LOADED_TOKENS:,} tokens, {transport}", lookup))
            rows.append((f"load whole, {_LOADED_TOKENS:,} tokens (130 MB), {transport}", load))
            rows.append((f"save, until the pages are free, {_LOADED_TOKENS:,} tokens, {transport}", save))
            roles.close()
            for mode in (LoadMode.WHOLE, LoadMode.LAYERS):
                roles = Roles(model, daemon.address, transport=transport, lookup_wait_s=1.0)
                until(partial(getattr, roles.scheduler, "is_ready"))
                hung_ms = Hooks(roles, 1).hung(daemon, mode)
                rows.append((f"a step with a save and two loads `{mode}`, {transport}, the daemon stopped", hung_ms))
                roles.close()
    print(f"Load average {os.getloadavg()[0]:.1f}; medians of {given.repetitions}.\n")
    print("| Hook | ms |\n|---|---|")
    for what, value in rows:
        print(f"| {what} | {value:.3g} |")


if __name__ == "__main__":
    main()
