"""``python -m tests.marked_daemon serve ...``: the real daemon, which marks what it writes; see ``marks``.

The environment variable TEST_MARKS_FD names the pipe.
"""

from __future__ import annotations

import functools
import os
import sys

import lmdb

from kvservice import __main__, daemon
from tests.marks import MarkedFileCalls, Marks, marked_open


def main() -> int:
    marks = Marks(int(os.environ.pop("TEST_MARKS_FD")))
    lmdb.open = marked_open(marks)  # type: ignore[assignment]
    open_daemon = functools.partial(daemon.Daemon.open, files=MarkedFileCalls(marks))
    daemon.Daemon.open = open_daemon  # type: ignore[method-assign]
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
