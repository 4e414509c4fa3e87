"""The GPU's benchmark to its end, in tiny sizes: what runs on a GPU only once must not fail there."""

from __future__ import annotations

import signal
import sys

import pytest

from benchmarks.gpu import PARTS
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.rig import TRANSPORTS

pytestmark = pytest.mark.gpu


def test_a_rehearsal_measures_every_part_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--rehearsal"])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    assert main() == 0

    printed = capsys.readouterr().out
    assert printed.count("#### ") == len(PARTS) + 1  # The goals.
    assert "Not measured" not in printed
    for transport in TRANSPORTS:
        assert f"to the GPU, {transport} / pinned" in printed
        assert f"{transport}, layer by layer, from SSD" in printed
        assert f"PageSaver, {transport}: slower with saving by" in printed
    assert printed.count("| computed again |") == 2, "both transports are compared with one figure per history"
