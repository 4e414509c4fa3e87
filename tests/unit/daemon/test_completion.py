"""The shell completes ``kvservice``."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable

import pytest

from kvservice import __main__, check, remove
from kvservice.completion import _COMMANDS, script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["re"], ["remove"]),
        (["serve", "--dram.cap"], ["--dram.capacity_bytes"]),
        (["config", "--js"], ["--json"]),
        (["check", "/etc/passw"], ["/etc/passwd"]),
        (["remove", "--y"], ["--yes"]),
    ],
)
def test_bash_completes_commands_flags_and_files(typed: list[str], offered: list[str]) -> None:
    words = " ".join(["kvservice", *typed])
    ask = f"{script()}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}; _kvservice; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line != "/etc/passwd-"] == offered


@pytest.mark.parametrize(("command", "main"), [("check", check.main), ("remove", remove.main)])
def test_the_flags_are_those_of_the_help(
    command: str, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out.partition("options:")[2]))
    assert set(_COMMANDS[command]) == {"--help", *flags}


@pytest.mark.parametrize("command", ["completion", "--version"])
def test_an_argument_too_many_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([command, "bash"]) == 2
    assert capsys.readouterr() == ("", f"kvservice {command}: it has no arguments\n")
