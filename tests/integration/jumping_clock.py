"""The daemon on a machine whose wall clock is set while it runs. Not a test: a program for ``DaemonProcess``.

The file named by CLOCK_SHIFT_FILE says by how many seconds the wall clock is off.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

FILE_VARIABLE = "CLOCK_SHIFT_FILE"


def _set_clock() -> None:
    file = Path(os.environ[FILE_VARIABLE])
    real_time, real_time_ns = time.time, time.time_ns
    time.time = lambda: real_time() + int(file.read_text())
    time.time_ns = lambda: real_time_ns() + int(file.read_text()) * 10**9


if __name__ == "__main__":
    _set_clock()
    from kvservice.__main__ import main  # After it, so that no module has a reference to the real functions.

    sys.exit(main())
