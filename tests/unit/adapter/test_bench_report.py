"""How the adapter's benchmark reports. No machine is measured here."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest

from benchmarks.adapter import MEASUREMENTS
from benchmarks.adapter import __main__ as bench
from benchmarks.adapter.report import Section


def test_each_measurement_replaces_its_own_section(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n\n<!-- kvctl bench: begin -->\ntheirs\n<!-- kvctl bench: end -->\n")
    first, second = Section("first", "The first", "About it."), Section("second", "The second", "About that.")
    first.add("speed_ms", 12.3456, "under 20", "a note")
    second.add("share", 0.5)

    first.write_into(page, "command one")
    second.write_into(page, "command two")
    first.figures.clear()
    first.add("speed_ms", 99.0)
    first.write_into(page, "command one")

    text = page.read_text()
    assert text.startswith("# Benchmarks\n\n<!-- kvctl bench: begin -->\ntheirs\n<!-- kvctl bench: end -->\n\n")
    assert text.index("### The first") < text.index("### The second")
    assert text.count("begin -->") == text.count("end -->") == 3
    assert "| `speed_ms` | 99 |  |  |" in text
    assert "12.35" not in text
    assert "Reproduce with `command two`." in text


def test_a_figure_is_found_by_its_name() -> None:
    section = Section("some", "Some", "About.")
    section.add("is_fast", True)
    section.add("speed_ms", 12.5, "under 20")

    assert section["speed_ms"] == 12.5
    assert "| `is_fast` | true |" in section.markdown("command")
    assert section.as_json()["figures"][1] == {"name": "speed_ms", "value": 12.5, "goal": "under 20", "note": ""}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_each_measurement_that_is_named_is_there(name: str) -> None:
    module = importlib.import_module(f"benchmarks.adapter.{name}")

    assert list(inspect.signature(module.measure).parameters) == ["quick"]


def test_a_measurement_that_is_not_there_is_refused_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "nonsense"])

    with pytest.raises(SystemExit) as ended:
        bench.main()

    assert ended.value.code == 2
    assert f"no measurement is called nonsense; there are {', '.join(MEASUREMENTS)}" in capsys.readouterr().err


def test_a_file_in_a_folder_that_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "missing" / "page.md"
    monkeypatch.setattr("examples.models._PACKAGE", "no_such_package")
    monkeypatch.setattr(sys, "argv", ["bench", "truncation", "--write", str(page)])

    with pytest.raises(SystemExit) as ended:
        bench.main()

    assert ended.value.code == 2
    assert f"there is no folder {page.parent}" in capsys.readouterr().err


def test_a_model_that_is_not_installed_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("examples.models._PACKAGE", "no_such_package")
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["bench", "truncation", "--quick"])

    assert bench.main() == 1

    assert "truncation cannot be measured: the model is not installed" in capsys.readouterr().err
