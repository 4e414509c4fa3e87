"""What the tests of the simulator share."""

from __future__ import annotations

import pytest

from kvservice.simulate import command_output


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a busy machine takes long, and would say so."""
    monkeypatch.setattr(command_output, "_SILENT_S", 3600.0)
