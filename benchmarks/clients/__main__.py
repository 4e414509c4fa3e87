"""``python -m benchmarks.clients``: 64 clients of one daemon beside one, and small loads beside a huge one.

The clients are threads of four processes on the daemon's machine, and take a part of its cores: their CPU time is in
the table beside the daemon's. One and many take turns; the figures are medians of the rounds.

The huge load is of 8 GiB, or of what fits twice into the free memory: into the daemon's DRAM tier, and into the
client's buffers.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Self

from benchmarks import leftovers
from benchmarks.client import parts
from benchmarks.clients.worker import BLOCK_BYTES, LAYOUT, Done, Work, chain_of, layers_of
from benchmarks.event_loop import FLAGS, late_beats
from benchmarks.host_pauses import HostPauses
from benchmarks.report import check_least, checked, markdown_table, parser_of, where_and_when, write_section
from kvservice_client import Client

TRANSPORTS = ("bulk", "shm", "grpc")
_PROCESSES, _CLIENTS_EACH = 4, 16
_BLOCKS, _HUGE_BLOCKS = 4, 8192  # A load of equal clients, and the huge one, in MiB.
_EQUAL_BYTES = 512 << 20  # The DRAM tier of the equal clients' daemon.
_OTHERS_BYTES = 5 << 30  # For the machine's other programs, and what saves the huge chain.
# A load has at most one frame of `server.frame_bytes` in gRPC, and one that is being made. The rest is in the arena.
_GREW_MAX_MIB = 2 * _PROCESSES * _CLIENTS_EACH
_GOALS = {"bulk": 0.9, "shm": 0.9, "grpc": 0.7}


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one transport. Times in ms, rates in GB/s."""

    one_gbps: float
    many_gbps: float
    p50_ms: float  # Of equal loads of all clients.
    p99_ms: float
    clients_cpu_s_per_gb: float
    daemon_cpu_s_per_gb: float
    small_alone_p99_ms: float  # Of loads of 1 MiB.
    small_beside_p99_ms: float  # While another client loads a huge history.
    huge_gb: float  # One load.
    huge_s: float
    private_mib: float  # What the daemon's memory without the arena grew by, at most.
    stall_ms: float  # The latest heartbeat of the event loop, without the host's pauses. 0 if none was later than 10.
    own_stall_ms: float  # The same without its waits for a processor.
    paused_ms: float  # The host's longest pause.


def run(*works: Work) -> list[Done]:
    """These processes' clients, all at once. Raises RuntimeError if a load failed or had wrong bytes."""
    with ExitStack() as stack:
        processes = []
        for work in works:
            command = [
                *leftovers.ENDS_WITH_US,
                sys.executable,
                "-m",
                "benchmarks.clients.worker",
                json.dumps(asdict(work)),
            ]
            pipe = subprocess.PIPE
            processes.append(stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)))
        for process in processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"a process of clients failed with {process.wait()}: see its message")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        # Last those that load until their standard input ends, which `communicate` closes.
        in_order = sorted(range(len(works)), key=lambda at: works[at].until_told)
        ended = {at: processes[at].communicate()[0] for at in in_order}
        printed = [ended[at] for at in range(len(works))]
        if any(process.returncode for process in processes):
            raise RuntimeError("a process of clients failed: see its message")
        return [Done(**json.loads(each)) for each in printed]


def rate(done: list[Done], load_bytes: int) -> float:
    """GB/s of all together."""
    loads = sum(len(each.loads_s) for each in done)
    seconds = max(each.end_s for each in done) - min(each.begin_s for each in done)
    return loads * load_bytes / 1e9 / seconds


def p99(times_s: list[float]) -> float:
    if len(times_s) == 1:  # On a busy machine, in a short trial.
        return times_s[0]
    return quantiles(times_s, n=100, method="inclusive")[98]


def loads_beside(small: Done, huge: Done) -> list[float]:
    """The times of the small loads that overlapped with the huge one."""
    (begin_s,), (load_s,) = huge.begins_s, huge.loads_s
    both = zip(small.begins_s, small.loads_s, strict=True)
    return [each_s for at_s, each_s in both if begin_s < at_s + each_s and at_s < begin_s + load_s]


def blocks_that_fit(blocks: int) -> int:
    """As many of these as the free memory takes twice."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    shared = os.statvfs(leftovers.SHARED_MEMORY)
    free_bytes = min((int(found[1]) * 1024 - _OTHERS_BYTES) // 2, shared.f_bavail * shared.f_frsize * 15 // 16)
    return max(_BLOCKS, min(blocks, free_bytes // BLOCK_BYTES // 256 * 256))


class Highest:
    """Reads a figure again and again until the block is left. Then `value` is the highest one."""

    def __init__(self, read: Callable[[], int], every_s: float = 0.02) -> None:
        self._read, self._every_s = read, every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="highest")

    def __enter__(self) -> Self:
        self.value = self._read()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.value = max(self.value, self._read())

    def _watch(self) -> None:
        while not self._is_over.wait(self._every_s):
            self.value = max(self.value, self._read())


class Bench:
    """Measures two daemons, which the caller starts with `FLAGS`, and observes the host with: one for equal clients,
    and one whose DRAM tier has the huge load. May be the same; but each client maps all of the arena, and faults it in.

    `log_lines` grows with the daemons' logs. Creating it saves the blocks that the clients load.
    """

    def __init__(
        self,
        equal: parts.RunningDaemon,
        large: parts.RunningDaemon,
        log_lines: list[str],
        host: HostPauses,
        *,
        seconds: float,
        rounds: int,
        processes: int = _PROCESSES,
        clients_each: int = _CLIENTS_EACH,
        huge_blocks: int,
    ) -> None:
        self._equal, self._large, self._log_lines, self._host = equal, large, log_lines, host
        self._seconds, self._rounds = seconds, rounds
        self._many, self._huge_blocks = (processes, clients_each), huge_blocks
        for daemon, blocks in ((large, huge_blocks), (large, 1), (equal, _BLOCKS)):
            with Client(daemon.address, name="clients", timeout_s=60) as client:
                saved = client.open_layout(LAYOUT).save(chain_of(blocks), layers_of(blocks), timeout_s=60)
            assert saved.is_complete

    def measure(self, transport: str) -> Measured:
        large = self._large.address

        def works(processes: int, clients: int) -> list[Work]:
            return [Work(self._equal.address, transport, clients, _BLOCKS, self._seconds)] * processes

        begin_s = time.monotonic()
        one, many, times_s = list[float](), list[float](), list[float]()
        clients_cpu_s = daemon_cpu_s = moved_gb = 0.0
        private = self._private_bytes()
        with Highest(self._private_bytes) as highest:
            for _ in range(self._rounds):
                one.append(rate(run(*works(1, 1)), _BLOCKS * BLOCK_BYTES))
                before_s = self._cpu_s()
                done = run(*works(*self._many))
                daemon_cpu_s += self._cpu_s() - before_s
                clients_cpu_s += sum(each.cpu_s for each in done)
                many.append(rate(done, _BLOCKS * BLOCK_BYTES))
                times_s += [load_s for each in done for load_s in each.loads_s]
                moved_gb += sum(len(each.loads_s) for each in done) * _BLOCKS * BLOCK_BYTES / 1e9
            (alone,) = run(Work(large, transport, 1, 1, self._seconds))
            small, huge = run(
                Work(large, transport, 1, 1, math.inf, until_told=True),
                Work(large, transport, 1, self._huge_blocks, math.inf, loads=1),
            )
        end_s = time.monotonic()
        log = [json.loads(line) for line in self._log_lines]
        late = late_beats(log, self._host.pauses, begin_s, end_s)
        return Measured(
            one_gbps=median(one),
            many_gbps=median(many),
            p50_ms=median(times_s) * 1e3,
            p99_ms=p99(times_s) * 1e3,
            clients_cpu_s_per_gb=clients_cpu_s / moved_gb,
            daemon_cpu_s_per_gb=daemon_cpu_s / moved_gb,
            small_alone_p99_ms=p99(alone.loads_s) * 1e3,
            small_beside_p99_ms=p99(loads_beside(small, huge)) * 1e3,
            huge_gb=self._huge_blocks * BLOCK_BYTES / 1e9,
            huge_s=huge.loads_s[0],
            private_mib=(highest.value - private) / (1 << 20),
            stall_ms=max((each.charged_s for each in late), default=0.0) * 1e3,
            own_stall_ms=max((each.own_s - each.paused_s for each in late), default=0.0) * 1e3,
            paused_ms=max((each.length_s for each in self._host.pauses if each.end_s > begin_s), default=0.0) * 1e3,
        )

    def _private_bytes(self) -> int:
        """The daemons' memory without their arenas."""
        found_bytes = 0
        for pid in {self._equal.pid, self._large.pid}:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            assert found is not None
            found_bytes += int(found[1]) * 1024
        return found_bytes

    def _cpu_s(self) -> float:
        """Of the daemon of the equal clients."""
        fields = Path(f"/proc/{self._equal.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100


def table(measured: dict[str, Measured]) -> str:
    columns = ["Measure", *measured, "Goal"]
    rows = [
        ["one client, GB/s", *(f"{each.one_gbps:.2f}" for each in measured.values()), ""],
        ["64 clients, GB/s", *(f"{each.many_gbps:.2f}" for each in measured.values()), ""],
        [
            "64 clients, of one",
            *(f"{each.many_gbps / each.one_gbps:.2f}" for each in measured.values()),
            "at least " + ", ".join(f"{_GOALS[name]:g}" for name in measured),
        ],
        ["p50 of equal loads, ms", *(f"{each.p50_ms:.1f}" for each in measured.values()), ""],
        ["p99 of equal loads, ms", *(f"{each.p99_ms:.1f}" for each in measured.values()), ""],
        ["p99 / p50", *(f"{each.p99_ms / each.p50_ms:.1f}" for each in measured.values()), "at most 5"],
        ["loads of 1 MiB alone, p99, ms", *(f"{each.small_alone_p99_ms:.2f}" for each in measured.values()), ""],
        ["beside a huge load, p99, ms", *(f"{each.small_beside_p99_ms:.2f}" for each in measured.values()), ""],
        [
            "beside / alone",
            *(f"{each.small_beside_p99_ms / each.small_alone_p99_ms:.1f}" for each in measured.values()),
            "under 5",
        ],
        ["the huge load, GB", *(f"{each.huge_gb:.2f}" for each in measured.values()), ""],
        ["the huge load took, s", *(f"{each.huge_s:.1f}" for each in measured.values()), ""],
        ["CPU of 64 clients, s/GB", *(f"{each.clients_cpu_s_per_gb:.2f}" for each in measured.values()), ""],
        ["CPU of the daemon, s/GB", *(f"{each.daemon_cpu_s_per_gb:.2f}" for each in measured.values()), ""],
        [
            "the daemon's memory grew, MiB",
            *(f"{each.private_mib:.0f}" for each in measured.values()),
            f"at most {_GREW_MAX_MIB}",
        ],
        ["longest stall of the event loop, ms", *(_stall(each.stall_ms) for each in measured.values()), "at most 20"],
        ["of these its own, ms", *(_stall(each.own_stall_ms) for each in measured.values()), ""],
        ["longest pause of the host, ms", *(f"{each.paused_ms:.0f}" for each in measured.values()), ""],
    ]
    return "\n".join(markdown_table(columns, rows))


def _stall(delay_ms: float) -> str:
    return f"{delay_ms:.1f}" if delay_ms > 10 else "under 10"


def page(measured: dict[str, Measured], seconds: float, rounds: int, huge_blocks: int) -> str:
    return (
        f"### Many clients\n\n{where_and_when()} Reproduce with `python -m benchmarks.clients`.\n\n"
        f"{_PROCESSES} processes of {_CLIENTS_EACH} clients, on the daemon's cores; each client loads the same "
        f"{_BLOCKS} MiB again and again for {seconds:g} s, in turns with one client alone; medians of {rounds} rounds. "
        f"The huge load is one of {huge_blocks} MiB, from a daemon of its own; the small ones beside it are those that "
        f"overlap with it. Memory is without the arenas, and may grow by two frames of a MiB per client. A stall is "
        f"the delay of a heartbeat without the time in which the host did not run the processor of the loop's thread; "
        f"its own part is that without waits for a processor too, so the longest of each need not be the same.\n\n"
        f"{table(measured)}"
    )


def main() -> int:
    parser = parser_of("python -m benchmarks.clients", __doc__, TRANSPORTS, "one round of a second")
    parser.add_argument("--json", action="store_true", help="print the figures for programs")
    parser.add_argument(
        "--huge",
        type=int,
        default=_HUGE_BLOCKS,
        metavar="MIB",
        help=f"size of the huge load, by default {_HUGE_BLOCKS}",
    )
    given = checked(parser, "transport", TRANSPORTS)
    seconds, rounds = (1.0, 1) if given.quick else (3.0, 3)
    leftovers.begin(None)
    check_least(parser, "--huge", given.huge)
    huge_blocks = blocks_that_fit(given.huge)
    dram_bytes = huge_blocks * BLOCK_BYTES * 17 // 16 + (256 << 20)
    log_lines = list[str]()
    with (
        leftovers.own_folder(None) as folder,
        leftovers.own_folder(None) as other_folder,
        parts.daemon(folder, leftovers.SHARED_MEMORY, _EQUAL_BYTES, 0, *FLAGS, log_lines=log_lines) as equal,
        parts.daemon(other_folder, leftovers.SHARED_MEMORY, dram_bytes, 0, *FLAGS, log_lines=log_lines) as large,
        HostPauses() as host,
    ):
        bench = Bench(equal, large, log_lines, host, seconds=seconds, rounds=rounds, huge_blocks=huge_blocks)
        try:
            measured = {name: bench.measure(name) for name in given.names}
        except RuntimeError as error:
            print(f"python -m benchmarks.clients: {error}", file=sys.stderr)
            return 1
    if given.write is not None:
        write_section(given.write, "clients bench", page(measured, seconds, rounds, huge_blocks))
    as_json = json.dumps({name: asdict(each) for name, each in measured.items()})
    print(as_json if given.json else page(measured, seconds, rounds, huge_blocks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
