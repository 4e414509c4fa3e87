"""Reads a daemon's marks and kills the daemon during a chosen one. A separate process, because it must be fast.

usage: killer.py MARKS_FD PID LOG_PATH

A line ``armed SKIP TARGET`` among the marks starts it: the daemon is killed once SKIP further marks
have begun TARGET, such as ``write`` or ``commit ssd``, and the next one does; ``any`` is any mark.
All marks are then written to LOG_PATH.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    fd, pid, log_path = sys.argv[1:]
    with contextlib.suppress(OSError):  # If it is allowed, because a write takes a fraction of a millisecond.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    chunks: list[bytes] = []
    rest = b""
    target: bytes | None = None
    skip = 0
    killed = False
    while chunk := os.read(int(fd), 65536):
        chunks.append(chunk)
        if killed:
            continue
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"armed "):
                _, number, words = line.split(maxsplit=2)
                skip, target = int(number), b"" if words == b"any" else b" begin %s " % words
            elif target is not None and target in line:
                skip -= 1
                if skip < 0:
                    os.kill(int(pid), signal.SIGKILL)
                    killed = True
                    break
    with open(log_path, "wb") as log:
        log.write(b"".join(chunks))


if __name__ == "__main__":
    main()
