"""The socket of a service manager, as systemd makes it for a unit of Type=notify."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_BYTES_MAX = 4096


class Message(NamedTuple):
    at_s: float  # Monotonic, when the test has read it.
    fields: dict[str, str]


class NotifySocket:
    def __init__(self, listener: socket.socket, name: str) -> None:
        self._listener = listener
        self.name = name  # For NOTIFY_SOCKET.

    def wait_for(self, field: str, timeout_s: float = 120.0) -> Message:
        """The next message with this field; those before it are dropped. Raises TimeoutError."""
        end_s = time.monotonic() + timeout_s
        while True:
            self._listener.settimeout(max(0.001, end_s - time.monotonic()))
            text = self._listener.recv(_BYTES_MAX).decode()
            fields = dict(line.split("=", 1) for line in text.splitlines())
            if field in fields:
                return Message(time.monotonic(), fields)

    def is_silent(self, field: str, seconds: float) -> bool:
        """Whether a time of so many seconds begins in which no such message comes. Those before it are dropped."""
        end_s = time.monotonic() + 10 * seconds
        while time.monotonic() < end_s:
            try:
                self.wait_for(field, seconds)
            except TimeoutError:
                return True
        return False

    def is_empty(self) -> bool:
        self._listener.setblocking(False)
        try:
            self._listener.recv(_BYTES_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


@contextlib.contextmanager
def notify_socket(folder: Path, *, abstract: bool = False) -> Iterator[NotifySocket]:
    name = f"@{folder}/notify" if abstract else str(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name[1:]}" if abstract else name)
        yield NotifySocket(listener, name)
