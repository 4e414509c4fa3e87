"""What the client does when its process forks.

A forked child has copies of its parent's objects and none of its parent's threads, and it shares the parent's
open files and connections. A lock that another thread held at the fork stays locked in the child for ever. So each
object of the client that has locks, threads or open files registers itself here, and its `reset_in_child` puts it
in the state of a new object, before ``os.fork`` returns in the child. Nothing of this touches the parent.

The hooks run for ``os.fork``, ``os.forkpty`` and ``multiprocessing``; not where a C library forks by itself.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet

log = logging.getLogger(__name__)

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


class Forkable(Protocol):
    """An object with state that a forked child cannot use."""

    def reset_in_child(self) -> None:
        """Called in the child, while it has one thread. Must not wait, raise, or touch what the parent uses."""


_objects: WeakSet[Any] = WeakSet()
generation = 0  # Another number in each forked child: tells which objects were made before the fork.
_fork_lock = threading.RLock()


def register(made: Forkable) -> None:
    """Have `made.reset_in_child` called in forked children. Keeps no reference to `made`."""
    _objects.add(made)


@contextmanager
def held_off() -> Iterator[None]:
    """No thread of this process forks while the block runs: for steps of which a child must see all or nothing.

    Keep it short: a thread that wants to fork waits for it.
    """
    with _fork_lock:
        yield


def keep_forever(made: object) -> None:
    """Never destroy the object. For those whose destruction would wait for threads that only the parent has."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))


def give_up_sockets(is_peer: Callable[[Any], bool]) -> None:
    """In a child: give up the parent's connections to certain peers, so that they end when the parent ends.

    `is_peer` judges what ``getpeername`` returns. The file descriptors stay in use and lead to ``/dev/null``: gRPC's
    objects remember the numbers, and might close them. The connections stay open in the parent.
    """
    with suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            for name in os.listdir("/proc/self/fd"):
                if (peer := _peer(int(name))) is not None and is_peer(peer):
                    os.dup2(null, int(name), inheritable=False)
        finally:
            os.close(null)


def _peer(fd: int) -> Any:
    """What the socket is connected to; None where it is no socket or not connected."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        found = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        return found.getpeername() if found.family in _FAMILIES else None
    except OSError:
        return None
    finally:
        found.detach()


def _before() -> None:
    _fork_lock.acquire()


def _after_in_parent() -> None:
    _fork_lock.release()


def _after_in_child() -> None:
    global generation, _fork_lock
    generation += 1
    _fork_lock = threading.RLock()
    for made in list(_objects):
        try:
            made.reset_in_child()
        except Exception:  # The other objects' hooks must run too.
            log.exception("a %s cannot be used in this forked child", type(made).__name__)


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
