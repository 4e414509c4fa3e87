"""``python -m tests.dying_daemon serve ...``: the real daemon, which kills itself in the middle of its start.

The environment variable TEST_DIES_AT is the number of the audit event of Python (a file is opened, renamed, truncated,
mapped, ...) at which it does so. If there are fewer events, the daemon is not killed.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count

from kvservice import __main__, daemon

_EVENTS = ("fcntl.flock", "mmap.__new__", "open", "os.mkdir", "os.remove", "os.rename", "os.truncate", "shutil.rmtree")


def main() -> int:
    dies_at = int(os.environ.pop("TEST_DIES_AT"))
    numbers = count()

    def die(event: str, arguments: tuple[object, ...]) -> None:
        if event in _EVENTS and next(numbers) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    open_store = daemon.Daemon.open

    async def open_dying(*args: object, **options: object) -> daemon.Daemon:
        sys.addaudithook(die)
        return await open_store(*args, **options)  # type: ignore[arg-type]  # It passes on all arguments.

    daemon.Daemon.open = open_dying  # type: ignore[method-assign]  # Otherwise the daemon under test is the real one.
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
