"""When this machine stood still: its host gave a virtual machine no processor, as by a limit per tenth of a second.

A process for each processor, beside the measured ones, sleeps for 2 ms again and again, and notes when it woke up late,
less the time for which it waited for a processor that others used: that is the machine's own load. So only what no
program here could have prevented is left. The host may stop one processor while another runs: so each has its observer.
Run as a module it prints the pauses of one processor as they end, until its standard input ends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self

from benchmarks.leftovers import ENDS_WITH_US

_SLEEP_S = 0.002
_PAUSE_S = 0.001  # Timers are late by a tenth of it.


@dataclass(frozen=True, slots=True)
class Pause:
    """By the monotonic clock, which all processes of a host share. `begin_s` is the earliest it can have begun."""

    begin_s: float
    end_s: float
    length_s: float
    processor: int


def paused_s(pauses: Iterable[Pause], begin_s: float, end_s: float) -> float:
    """For how much of this time the host gave none, at most: the sum over the processors of these pauses."""
    return sum(min(each.length_s, max(0.0, min(each.end_s, end_s) - max(each.begin_s, begin_s))) for each in pauses)


def pause_of(begin_s: float, end_s: float, slept_s: float, waited_s: float, processor: int) -> Pause | None:
    """What was no sleep and no wait for a processor between two readings of the clock; None for less than 1 ms."""
    length_s = end_s - begin_s - slept_s - waited_s
    return Pause(begin_s, end_s, length_s, processor) if length_s > _PAUSE_S else None


class HostPauses:
    """Observes the processors of this process until the block is left. Then `pauses` has all of their pauses."""

    def __init__(self) -> None:
        self.pauses: list[Pause] = []
        self.processors = sorted(os.sched_getaffinity(0))
        self._observers: list[tuple[subprocess.Popen[str], threading.Thread]] = []

    def __enter__(self) -> Self:
        for processor in self.processors:
            command: Sequence[str] = (*ENDS_WITH_US, sys.executable, "-m", "benchmarks.host_pauses", str(processor))
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            assert process.stdout is not None
            process.stdout.readline()  # It observes from here on.
            reader = threading.Thread(target=self._read, args=(process.stdout, processor), name="host pauses")
            reader.start()
            self._observers.append((process, reader))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, reader in self._observers:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            reader.join()

    def _read(self, output: IO[str], processor: int) -> None:
        with output as lines:
            for line in lines:
                begin_s, end_s, length_s = map(float, line.split())
                self.pauses.append(Pause(begin_s, end_s, length_s, processor))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_pauses", description=__doc__)
    parser.add_argument("processor", type=int, help="number of the processor, as the kernel counts them")
    processor: int = parser.parse_args().processor
    os.sched_setaffinity(0, {processor})
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    print("observing", flush=True)
    waits = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def waited_s() -> float:
        return int(os.pread(waits, 100, 0).split()[1]) / 1e9

    begin_s, waited_before_s = time.monotonic(), waited_s()
    while not ended.is_set():
        time.sleep(_SLEEP_S)
        end_s, waited_now_s = time.monotonic(), waited_s()
        pause = pause_of(begin_s, end_s, _SLEEP_S, waited_now_s - waited_before_s, processor)
        if pause is not None:
            print(pause.begin_s, pause.end_s, pause.length_s, flush=True)
        begin_s, waited_before_s = end_s, waited_now_s


if __name__ == "__main__":
    main()
