"""When this machine stood still: its host gave a virtual machine no processor, as by a limit per tenth of a second.

A process beside the measured ones sleeps for 2 ms again and again, and notes when it woke up late, less the time for
which it waited for a processor that others used: that is the machine's own load. So only what no program here could
have prevented is left. Run as a module it prints each pause as it ends, until its standard input ends.
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
from typing import Self

from benchmarks.leftovers import ENDS_WITH_US

_SLEEP_S = 0.002
_PAUSE_S = 0.001  # Timers are late by a tenth of it.


@dataclass(frozen=True, slots=True)
class Pause:
    """By the monotonic clock, which all processes of a host share. `begin_s` is the earliest it can have begun."""

    begin_s: float
    end_s: float
    length_s: float


def paused_s(pauses: Iterable[Pause], begin_s: float, end_s: float) -> float:
    """For how much of this time the machine stood still, at most."""
    return sum(min(each.length_s, max(0.0, min(each.end_s, end_s) - max(each.begin_s, begin_s))) for each in pauses)


def pause_of(begin_s: float, end_s: float, slept_s: float, waited_s: float) -> Pause | None:
    """What was no sleep and no wait for a processor between two readings of the clock; None for less than 1 ms."""
    length_s = end_s - begin_s - slept_s - waited_s
    return Pause(begin_s, end_s, length_s) if length_s > _PAUSE_S else None


class HostPauses:
    """Observes the machine until the block is left. Then `pauses` has all of them."""

    def __init__(self) -> None:
        self.pauses: list[Pause] = []

    def __enter__(self) -> Self:
        command: Sequence[str] = (*ENDS_WITH_US, sys.executable, "-m", "benchmarks.host_pauses")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # It observes from here on.
        self._reader = threading.Thread(target=self._read, name="host pauses")
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                begin_s, end_s, length_s = map(float, line.split())
                self.pauses.append(Pause(begin_s, end_s, length_s))


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.host_pauses", description=__doc__).parse_args()
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
        pause = pause_of(begin_s, end_s, _SLEEP_S, waited_now_s - waited_before_s)
        if pause is not None:
            print(pause.begin_s, pause.end_s, pause.length_s, flush=True)
        begin_s, waited_before_s = end_s, waited_now_s


if __name__ == "__main__":
    main()
