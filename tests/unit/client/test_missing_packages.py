"""Programs whose packages are not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("missing", "program", "message"),
    [
        (
            "typer",
            "from kvctl import main; main()",
            "kvctl: typer is not installed. Install KVService with the extra 'cli'.\n",
        ),
        (
            "pydantic",
            "from kvservice.__main__ import main; sys.exit(main(['serve', '--store.path', '/nowhere']))",
            "kvservice: pydantic is not installed. Install KVService with the extra 'daemon'.\n",
        ),
        (
            "uvloop",
            "from kvservice.__main__ import main; sys.exit(main(['serve']))",
            "kvservice: uvloop is not installed. Install KVService with the extra 'daemon'.\n",
        ),
    ],
)
def test_a_program_without_its_packages_says_what_to_install(missing: str, program: str, message: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; {program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, message)
