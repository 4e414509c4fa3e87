"""Starts a daemon again and again, and kills it a little later each time, until it serves."""

from __future__ import annotations

import signal

from tests.daemon import DaemonProcess

_EVENTS_MAX = 800


def deaths(daemon: DaemonProcess, *, first: int, step: int) -> int:
    """Each start of the daemon, whose program is ``tests.dying_daemon``, dies `step` events after the one before.

    The last start serves, and is killed then. Returns the number of starts that died.
    """
    for died, dies_at in enumerate(range(first, _EVENTS_MAX, step)):
        daemon.launch(environment={"TEST_DIES_AT": str(dies_at)})
        if daemon.serves():
            daemon.kill()
            return died
        assert daemon.wait_for_end() == -signal.SIGKILL, "".join(daemon.lines)
    raise AssertionError("the daemon never served")
