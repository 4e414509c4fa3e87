"""Where the time of a load and of a save through shared memory goes: ``python -m benchmarks.client.shm_profile``.

One table for each direction: the phases of the calling thread, the work of all copying threads, and page faults and
CPU seconds of both processes. 512 MiB each, medians of several transfers into memory that is faulted in.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import leftovers
from benchmarks.client import limits, parts
from benchmarks.client.memory import Memory
from benchmarks.client.wire import LAYOUT
from kvservice_api.keys import BlockChain
from kvservice_client.channel import Channel
from kvservice_client.cli.options import connect
from kvservice_client.transports import shm

_BLOCKS = 16
_RUNS = 7


class _Clock:
    """Seconds by name, of all threads that call what it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[name] += seconds

    def wrap(self, owner: Any, function: str, name: str) -> None:
        found: Callable[..., Any] = getattr(owner, function)

        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return found(*given, **named)
            finally:
                self.add(name, time.perf_counter() - started)

        setattr(owner, function, timed)

    def wrap_calls(self) -> None:
        """Each method that the client calls at the daemon, by its name."""
        call = Channel.call

        def timed(channel: Channel, method: str, *given: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(channel, method, *given)
            finally:
                self.add(f"call {method.rpartition('/')[2]}", time.perf_counter() - started)

        Channel.call = timed  # type: ignore[method-assign,assignment]


def _process(pid: int) -> tuple[int, float]:
    """Minor page faults and CPU seconds of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]), (int(fields[11]) + int(fields[12])) / 100


def _measure(clock: _Clock, pid: int, work: Callable[[], object]) -> dict[str, float]:
    clock.seconds.clear()
    ours, (faults, cpu_s) = resource.getrusage(resource.RUSAGE_SELF), _process(pid)
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    then, (faults_then, cpu_then_s) = resource.getrusage(resource.RUSAGE_SELF), _process(pid)
    found = {name: value * 1e3 for name, value in clock.seconds.items()}
    found["all, ms"] = seconds * 1e3
    found["client: page faults"] = then.ru_minflt - ours.ru_minflt
    found["client: CPU, ms"] = (then.ru_utime + then.ru_stime - ours.ru_utime - ours.ru_stime) * 1e3
    found["client: of it in the kernel, ms"] = (then.ru_stime - ours.ru_stime) * 1e3
    found["daemon: page faults"] = faults_then - faults
    found["daemon: CPU, ms (ticks of 10)"] = (cpu_then_s - cpu_s) * 1e3
    return found


def _show(title: str, runs: list[dict[str, float]], size_bytes: int) -> None:
    print(
        f"\n{title}: {size_bytes / median(each['all, ms'] for each in runs) / 1e6:.2f} GB/s, the median of {len(runs)}"
    )
    for name in sorted({name for each in runs for name in each}):
        print(f"  {name:44}{median(each.get(name, 0.0) for each in runs):10.2f}")


def main(blocks: int = _BLOCKS, runs: int = _RUNS) -> None:
    leftovers.begin(None)
    clock = _Clock()
    with (
        leftovers.own_folder(None) as folder,
        parts.daemon(folder, leftovers.SHARED_MEMORY, 2 << 30, 0) as daemon,
        connect(daemon.address, 30, transport="shm") as client,
    ):
        memory = Memory(client, LAYOUT, blocks=blocks, runs=runs)
        size_bytes = blocks * LAYOUT.block_tokens * LAYOUT.bytes_per_token
        memory.load(), memory.save()  # The first ones fault the mappings in.
        print(f"memcpy: {max(limits.memcpy(512 << 20).values()):.2f} GB/s")
        clock.wrap_calls()
        clock.wrap(shm.ShmTransport, "_located", "call LocateBlocks, its first answer")
        clock.wrap(shm, "copy_slices", "threads: copy_slices")
        chain = memory._saved()
        _show("load", [_measure(clock, daemon.pid, lambda: memory._load(chain)) for _ in range(runs)], size_bytes)
        client.admin.discard(chain)
        saves, saved = [], list[BlockChain]()
        for _ in range(runs):
            saves.append(_measure(clock, daemon.pid, lambda: saved.append(memory._save(blocks))))
            client.admin.discard(saved.pop())
        _show("save", saves, size_bytes)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.client.shm_profile", description=__doc__).parse_args()
    main()
