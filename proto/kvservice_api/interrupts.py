"""What Ctrl-C (SIGINT) does in the programs.

It ends the process at once, without an exception: some packages do not survive one while they are imported, and
Python prints one that comes at the interpreter's end. Only the code in `interruptible` gets KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def end_at_interrupts() -> None:
    """From now on Ctrl-C ends the process. A background job of a shell ignores it, and continues to do so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The first process of a container does not get signals that it does not handle.
        is_first = os.getpid() == 1
        signal.signal(signal.SIGINT, (lambda *_: os._exit(128 + signal.SIGINT)) if is_first else signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[None]:
    """In this block Ctrl-C raises KeyboardInterrupt, if it would end the process. Use it on the main thread."""
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.default_int_handler, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
