"""The measurement of saves in place runs, and prints both ways."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_both_ways_are_measured_for_each_size_of_page() -> None:
    command = [sys.executable, "-m", "benchmarks.client.in_place", "--rounds", "1", "--page-tokens", "128", "256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"pages of +(\d+) tokens: by a copy [\d.]+ .* in place [\d.]+ .*: [\d.]+\n", done.stdout)
    assert found == ["128", "256"]
