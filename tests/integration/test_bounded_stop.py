"""A daemon ends at SIGTERM: also if it hangs, and if standard error is closed or takes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvservice_client import Client
from tests.daemon import NEVER_S, SOON_S, DaemonProcess, until

_RUN = "import sys; from kvservice.__main__ import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("hangs", "where"),
    [
        (f"daemon.Daemon.drain = lambda self: time.sleep({NEVER_S})", "daemon.py"),
        # No thread of Python can run: this never gives the interpreter's lock back.
        (f"daemon.Daemon.drain = lambda self: ctypes.PyDLL(None).sleep({NEVER_S:.0f})", "daemon.py"),
        (f"import atexit; atexit.register(lambda: time.sleep({NEVER_S}))", "<lambda>"),
    ],
    ids=["drain", "drain with the lock", "interpreter"],
)
def test_a_daemon_that_hangs_at_its_end_is_ended_with_the_stacks_of_its_threads(
    tmp_path: Path, hangs: str, where: str
) -> None:
    timeout_s = 0 if "drain" in hangs else NEVER_S  # The interpreter's end has a time of its own.
    program = f"import ctypes, time; from kvservice import daemon, process; process.CLOSE_TIMEOUT_S = 0.5; {hangs}"
    with DaemonProcess(tmp_path, program=("-c", f"{program}; {_RUN}"), server__drain_timeout_s=timeout_s) as daemon:
        assert daemon.stop(SOON_S) == signal.SIGALRM
        text = "".join(daemon.lines)
        assert "most recent call first" in text
        assert where in text.partition("most recent call first")[2]


def test_a_daemon_that_hangs_ends_although_its_standard_error_has_no_reader() -> None:
    program = (
        "import os, time; from kvservice import process; process.STACKS_TIMEOUT_S = 0.1\n"
        "os.set_blocking(2, False)\n"
        "try:\n"
        "    while os.write(2, bytes(4096)): pass\n"
        "except BlockingIOError: os.set_blocking(2, True)\n"
        f"process.end_within(0.1); time.sleep({NEVER_S})"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as hanging:
        try:
            assert hanging.wait(SOON_S) == signal.SIGALRM
        finally:
            hanging.kill()


@pytest.mark.parametrize(
    "fault",
    [
        "import os; os.close(2); sys.stderr = None",  # As by `2>&-`.
        "from kvservice import process; process.end_within = lambda seconds: seconds < 99 or 1 / 0",
    ],
    ids=["no standard error", "no bound"],
)
def test_a_daemon_without_standard_error_or_without_a_bound_stops(tmp_path: Path, fault: str) -> None:
    """No file of the store takes the number of standard error: libraries would write into it."""
    daemon = DaemonProcess(tmp_path, program=("-c", f"import sys; {fault}; {_RUN}"), server__drain_timeout_s=NEVER_S)
    try:
        daemon.launch()
        until(daemon.socket_path.exists)
        with Client(f"unix:{daemon.socket_path}", timeout_s=SOON_S) as client:
            client.admin.status()
        at_standard_error = os.readlink(f"/proc/{daemon.process.pid}/fd/2")
        assert at_standard_error == "/dev/null" or at_standard_error.startswith("pipe:")
        assert daemon.stop(SOON_S) == 0
    finally:
        daemon.remove()
