"""Pauses of a virtual machine's processors, as they are observed beside a measurement."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.host_pauses import HostPauses, pause_of


def test_an_observer_stays_on_its_processor() -> None:
    """Else a pause of one processor is not seen while the observer runs on another one."""
    for processor in sorted(os.sched_getaffinity(0)):
        command = [sys.executable, "-m", "benchmarks.host_pauses", str(processor)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == "observing\n"
            assert os.sched_getaffinity(process.pid) == {processor}
            process.stdin.close()


def test_all_processors_of_this_process_are_observed() -> None:
    with HostPauses() as host:
        pass
    assert host.processors == sorted(os.sched_getaffinity(0))
    assert {pause.processor for pause in host.pauses} <= set(host.processors)


def test_a_pause_is_what_was_no_sleep_and_no_wait_for_a_processor() -> None:
    pause = pause_of(10.0, 10.05, 0.002, 0.008, 1)
    assert pause is not None and pause.processor == 1
    assert round(pause.length_s, 6) == 0.04
    assert pause_of(10.0, 10.011, 0.002, 0.0085, 1) is None
