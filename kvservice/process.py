"""The daemon's process: its event loop, and a bound on the time in which it ends."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys

import uvloop

from kvservice.tiers.files import executor_of

CLOSE_TIMEOUT_S = 30.0  # For the end of a daemon after its drain, and for the interpreter's own end after that.
STACKS_TIMEOUT_S = 5.0  # For writing the stacks of a daemon that did not end in time.


class EventLoop(uvloop.Loop):
    """uvloop's loop. The threads of its executor run from the start on, and end without the help of another thread.

    uvloop starts a thread to end the executor, and the process may get none by then: the daemon would fail at its end.
    Raises RuntimeError if a thread cannot be started.
    """

    def __init__(self) -> None:
        super().__init__()
        self._threads = executor_of(min(16, (os.cpu_count() or 1) + 4), "asyncio")
        self.set_default_executor(self._threads)

    async def shutdown_default_executor(self, *_: object) -> None:
        """Blocks until running jobs have ended: nothing else runs on the loop any more."""
        self._threads.shutdown()


def open_standard_files() -> None:
    """Open those of the three that the process was started without, as by ``2>&-``: on the null device.

    Call it before anything else opens a file: a file of the store that took the number of standard error would get
    the lines that libraries write there.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def end_within(timeout_s: float) -> None:
    """From now on the process ends after `timeout_s` at the latest, with exit code 14, the number of SIGALRM.

    It writes the stacks of all threads to standard error before, for at most `STACKS_TIMEOUT_S` more: a full
    pipe takes none. The kernel's timer needs no thread and no lock of the interpreter. What was
    acknowledged stays, as after SIGKILL. A second call replaces the first.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    faulthandler.unregister(signal.SIGALRM)  # Otherwise `register` would leave the handler that is set here.
    # A handler, because the first process of a container ignores signals that it does not handle. It is called with
    # the signal's number.
    libc.signal(signal.SIGALRM, ctypes.cast(libc._exit, ctypes.c_void_p))
    # It writes the stacks and calls `_exit`. While it writes, it calls `_exit` for the next signal at once.
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.setitimer(signal.ITIMER_REAL, timeout_s, STACKS_TIMEOUT_S)
