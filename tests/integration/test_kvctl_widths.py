"""``kvctl`` in terminals of several widths, and in pipes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

import pytest

from kvservice_client import Durability
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save
from tests.integration.test_client_kvctl import KVCTL, kvctl

WIDTHS = (40, 60, 80, 120, 200)


class Screen:
    """What a terminal of this width shows after some output: as much of one as Rich's live display uses."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.row, self.column = width, [""], 0, 0

    def write(self, text: str) -> None:
        for sequence, character in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|(.)", text, re.DOTALL):
            if sequence.endswith("A"):
                self.row = max(0, self.row - int(sequence[:-1] or 1))
            elif sequence == "2K":
                self.lines[self.row] = ""
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self._next_row()
            elif character:
                if self.column == self.width:  # The terminal breaks the line.
                    self._next_row()
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    def _next_row(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")


def started_in_terminal(width: int, *arguments: str) -> tuple[int, subprocess.Popen[bytes]]:
    """The terminal's other end, and the program that writes to the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    running = subprocess.Popen([str(KVCTL), *arguments], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    return ours, running


def everything_from(ours: int) -> str:
    read = b""
    try:
        while some := os.read(ours, 65536):
            read += some
    except OSError:  # The program has closed its end.
        pass
    os.close(ours)
    return read.decode()


def test_top_replaces_its_samples_in_a_terminal_of_any_width(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        save(client, SMALL, new_chain(SMALL, 3), Durability.SSD)
    arguments = ("top", "--interval", "0.05", "--count", "3", "--address", daemon.address)
    runs = {width: started_in_terminal(width, *arguments) for width in WIDTHS}
    for width, (ours, running) in runs.items():
        screen = Screen(width)
        screen.write(everything_from(ours))
        assert running.wait() == 0
        shown = "\n".join(screen.lines)
        assert shown.count("kvservice 0.") == shown.count("per second") == 1, "no older sample is left"
        assert "…" not in shown, "nothing is cut"
        assert re.search(r"(?m)^dram +\S+ \w+ +\S+ \w+ +3\b", shown)
        assert re.search(r"(?m)^evicted from ssd +0\.0 *$", shown)
        assert ("━" in shown) == (width >= 60), "a narrow terminal has no space for a bar"


@pytest.mark.parametrize("arguments", [("ls",), ("status",), ("top", "--interval", "0.05", "--count", "1")])
def test_what_goes_into_a_pipe_is_never_cut(daemon: DaemonProcess, arguments: tuple[str, ...]) -> None:
    with daemon.client() as client:
        chain = new_chain(SMALL, 3)
        save(client, SMALL, chain, Durability.SSD)
    done = kvctl(*arguments, address=daemon.address)
    assert done.returncode == 0
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 80, "a line is as long as it is"
