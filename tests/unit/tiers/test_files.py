"""The daemon's knowledge of the file systems of its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvservice.tiers.files import file_system_of


@pytest.mark.parametrize(("path", "kind"), [("/dev/shm", "tmpfs"), ("/proc", "proc")])
def test_the_kind_of_a_file_system_is_the_kernels_word_for_it(path: str, kind: str) -> None:
    assert file_system_of(Path(path)) == kind
