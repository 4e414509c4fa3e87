"""A daemon that is killed under load loses nothing that it acknowledged, and serves no wrong byte.

After each SIGKILL: ``kvservice check`` is clean; every stored block has the right bytes; every acknowledged block
is stored unless a client discarded it; no discarded block is stored. The marks of the daemon's writes prove what
the kill interrupted, and that bytes, flushes and records kept their order.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon import MIB
from tests.integration.crash_round import BLOCKS_MIN, CrashStore, Report

_TARGETS = ("write", "commit ssd", "commit dram", "any")


def run_rounds(folder: Path, count: int) -> list[Report]:
    """Rounds on two stores in turn: one whose DRAM holds everything, and one whose DRAM overflows to SSD.

    Every fifth round ends as with a power cut: DRAM is empty after it.
    """
    with ExitStack() as opened:
        stores = []
        for name, dram_bytes in (("roomy", 160 * MIB), ("tight", 16 * MIB)):
            stores.append(CrashStore(folder / name, dram_bytes=dram_bytes, evicts_from_ssd=name == "roomy"))
            opened.callback(stores[-1].remove)
        return [
            stores[(number + number // len(_TARGETS)) % 2].round(
                number, _TARGETS[number % len(_TARGETS)], power_cut=number % 5 == 4
            )
            for number in range(count)
        ]


def judge(reports: list[Report]) -> None:
    for report in reports:
        print(report)
    print(f"{sum(report.hit_a_write for report in reports)} of {len(reports)} kills came during a write or a commit")
    assert all(report.acknowledged >= BLOCKS_MIN for report in reports)
    assert all(report.survived >= report.promised for report in reports)
    assert sum(report.hit_a_write for report in reports) >= len(reports) / 2
    assert any(report.promised_dram for report in reports), "no block was only in DRAM"
    assert any(report.by_policy for report in reports), "the policy evicted nothing"
    for what in ("loaded", "evicted dram", "evicted ssd", "promoted", "discarded"):
        assert any(report.done[what] for report in reports), f"nothing was {what}"


def test_five_kills_at_work_lose_no_acknowledged_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = run_rounds(tmp_path, 5)
    with capsys.disabled():
        print()
        judge(reports)


@pytest.mark.slow
def test_a_hundred_kills_at_work_lose_no_acknowledged_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = run_rounds(tmp_path, 100)
    with capsys.disabled():
        print()
        judge(reports)
