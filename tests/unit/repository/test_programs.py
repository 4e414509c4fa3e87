"""The programs of a checkout refuse arguments that they would ignore."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.dockerfile import ROOT

TOOLS = ("generate_docs.py", "generate_monitoring.py", "generate_protobuf.py", "image_contents.py")


@pytest.mark.parametrize(
    "module",
    [
        "tests.files_run",
        "benchmarks.client.shm_profile",
        "benchmarks.clients.memory",
        "benchmarks.placement.shadow_cost",
        "benchmarks.queue.reporting",
    ],
)
def test_a_program_without_arguments_refuses_one(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "nonsense"])
    monkeypatch.delitem(sys.modules, module, raising=False)  # A second copy of an imported module is a warning.

    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")

    assert ended.value.code == 2
    assert f"usage: python -m {module}" in (said := capsys.readouterr().err)
    assert "unrecognized arguments: nonsense" in said


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_refuses_a_second_path(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, str(tmp_path), "nonsense"])

    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")

    assert ended.value.code == 2
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err
