"""Each example runs as its docstring says, with a daemon of its own, and shows what it promises."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvservice_api import cost
from tests.daemon import DaemonProcess

ROOT = Path(__file__).parents[2]
EXAMPLES = ("save_and_load", "two_processes", "chat_transformers", "batch")


def run_here(name: str, *arguments: str) -> str | int | None:
    """Runs the example in this process, which has torch already. Returns its exit code, or its last words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(cost, "_LEARN_S_MIN", 0.0)  # Else a process that is warm computes a short history again.
        try:
            runpy.run_module(f"examples.{name}", run_name="__main__")
        except SystemExit as ended:
            return ended.code
    return 0


def run(name: str, *arguments: str) -> str:
    """The output of the example."""
    command = [sys.executable, "-m", f"examples.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_saved_blocks_are_found_by_their_tokens_and_loaded_bit_for_bit() -> None:
    shown = run("save_and_load")

    assert "saved 3 blocks\nfound 192 of 292 tokens" in shown
    assert len(re.findall(r"layer \d: 98304 bytes, identical", shown)) == 2
    assert "DIFFERENT" not in shown


def test_the_worker_loads_with_the_ticket_what_the_scheduler_has_found() -> None:
    shown = run("two_processes")

    assert "scheduler: 512 of 512 tokens are stored" in shown
    assert len(re.findall(r"worker: layer \d, KV heads 2 and up, 512 tokens, 262144 bytes", shown)) == 2


def test_the_second_turn_of_the_chat_loads_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("chat_transformers") in (0, None)
    shown = capsys.readouterr().out

    assert "turn 1: 0 of 102 tokens loaded" in shown
    assert "turn 2: 125 of 192 tokens loaded, from dram" in shown
    assert "turn 3: " in shown


def test_the_second_batch_loads_the_common_prefix_of_all_its_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("batch") in (0, None)
    first, second = capsys.readouterr().out.splitlines()

    assert first.startswith("batch 1: 0 of ")
    assert second.startswith("batch 2: 864 of "), "9 blocks of 32 tokens for each of 3 prompts"


def test_an_example_uses_the_daemon_whose_address_it_is_given(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = new_daemon()

    assert "found 192 of 292 tokens" in run("save_and_load", daemon.address)
    assert "saved 0 blocks" in run("save_and_load", daemon.address), "the daemon has them from the first run"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "save_and_load",
            ["127.0.0.1:1"],
            r"no answer from the daemon at 127\.0\.0\.1:1.*\n.*`kvservice serve --store",
        ),
        ("two_processes", ["127.0.0.1:99999"], r"99999.*a port is a number from 1 to 65535"),
        ("chat_transformers", ["--model", "./no-such-folder"], r"the model '\./no-such-folder' cannot be loaded"),
        ("batch", ["127.0.0.1:1"], r"no answer from the daemon"),
    ],
)
def test_an_example_that_cannot_run_ends_with_a_message(name: str, arguments: list[str], message: str) -> None:
    said = run_here(name, *arguments)

    assert isinstance(said, str), "such a program ends with exit code 1 and these words, and without a traceback"
    assert re.search(message, said)


@pytest.mark.parametrize(("page", "shown"), [("fork.md", "[2, 2, 2]\n"), ("several-hosts.md", "[262144, 262144]\n")])
def test_the_program_of_a_page_runs(
    page: str, shown: str, new_daemon: Callable[..., DaemonProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    exec(program.replace("127.0.0.1:7070", new_daemon().address), {})
    assert capsys.readouterr().out == shown


def test_every_program_in_the_folder_is_tested_here_and_named_in_the_readme() -> None:
    programs = {path.stem for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()}

    assert programs == set(EXAMPLES)
    assert all(f"examples/{name}.py" in (ROOT / "README.md").read_text() for name in EXAMPLES)
