"""Forked children of a test: returns their results or errors within a time, and leaves no child behind."""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from typing import Any, Self

TIMEOUT_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36


class Forked:
    """A child by ``os.fork`` that does `work` and reports. A context manager: leaving it kills and reaps the child.

    With `waits` the child does nothing before `go`.
    """

    def __init__(self, work: Callable[[], object], *, waits: bool = False) -> None:
        self._report, into = os.pipe()
        start, self._start = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(work, start, into, (self._report, self._start))
        os.close(into)
        os.close(start)
        self._is_over = False
        if not waits:
            self.go()

    def go(self) -> None:
        os.write(self._start, b"!")

    def result(self) -> Any:
        """The result of `work`. Raises its error, and AssertionError if there is neither in time."""
        returned, value = pickle.loads(self._received())
        if not returned:
            raise value
        return value

    def _received(self) -> bytes:
        data, end_s = b"", time.monotonic() + TIMEOUT_S
        while True:
            ready, _, _ = select.select([self._report], [], [], max(0.0, end_s - time.monotonic()))
            assert ready, f"the child did not end within {TIMEOUT_S:g} s"
            piece = os.read(self._report, 1 << 16)
            if not piece:
                break
            data += piece
        assert data, "the child ended without a report"
        return data

    def kill(self) -> None:
        """SIGKILL, and reap."""
        if not self._is_over:
            self._is_over = True
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        os.close(self._report)
        os.close(self._start)


def in_child(work: Callable[[], object]) -> Any:
    """The result of `work` in a forked child; raises its error."""
    with Forked(work) as child:
        return child.result()


def adopt_orphans() -> None:
    """Make this process reap the children of its dead children."""
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def _be_child(work: Callable[[], object], start: int, into: int, parents: tuple[int, ...]) -> None:
    """Never returns."""
    try:
        for fd in parents:
            os.close(fd)
        signal.alarm(int(3 * TIMEOUT_S))  # So that the child does not stay if the parent is killed.
        os.read(start, 1)
        try:
            report = pickle.dumps((True, work()))
        except BaseException as error:
            report = pickle.dumps((False, _portable(error)))
        while report:
            report = report[os.write(into, report) :]
    finally:
        os._exit(0)


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # An error that does not survive pickling: its text is enough for a test.
        return AssertionError(f"{type(error).__name__}: {error}")
    return error
