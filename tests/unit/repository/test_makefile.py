"""The Makefile, with stand-ins for what it runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.dockerfile import ROOT

_PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 0
mkdir -p .venv/bin
printf '#!/bin/sh\\nexit 1\\n' > .venv/bin/python  # It has no pip that could install anything.
chmod +x .venv/bin/python
"""


def test_an_environment_is_made_also_where_the_package_index_lacks_the_new_pip(tmp_path: Path) -> None:
    """A mirror, or an older index: Python's own pip installs the rest."""
    python = tmp_path / "python"
    python.write_text(_PYTHON)
    python.chmod(0o755)

    command = ["make", "-f", str(ROOT / "Makefile"), f"PYTHON={python}", ".venv/bin/python"]
    made = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MAKEFLAGS": ""}, capture_output=True, text=True)

    assert made.returncode == 0, made.stderr
    assert "The package index lacks pip==" in made.stderr
