"""Messages to the service manager that started the daemon: systemd's protocol of sd_notify(3), as datagrams."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

from kvservice.clock import Clock

log = logging.getLogger(__name__)

_SENT_PER_INTERVAL = 3  # Of a watchdog's interval. systemd asks for two; one more makes a lost message harmless.
_SEND_TIMEOUT_S = 1.0  # A service manager that reads no messages must not keep the daemon from its end.


class ServiceManager:
    """Reports to the socket that NOTIFY_SOCKET names; without that variable it does nothing.

    Call it on the event loop: a watchdog's message shows that the loop runs.
    """

    def __init__(self, clock: Clock, environ: Mapping[str, str] = os.environ) -> None:
        self._clock = clock
        name = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{name[1:]}" if name.startswith("@") else name  # An abstract socket begins with a zero.
        watched_pid = environ.get("WATCHDOG_PID", "")
        is_watched = bool(self._address) and watched_pid in ("", str(os.getpid()))
        interval_us = environ.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(interval_us) / 1e6 if is_watched and interval_us.isdecimal() else 0.0

    async def notify(self, *assignments: str) -> None:
        """Send assignments such as ``READY=1``. A failure is logged: the daemon serves without a service manager."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
                connection.setblocking(False)
                connection.connect(self._address)
                async with self._clock.timeout(_SEND_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_sendall(connection, "\n".join(assignments).encode())
        except OSError as error:  # TimeoutError is one.
            log.warning("the service manager does not get %s: %s", assignments[0], error.strerror or "it reads nothing")

    async def keep_watchdog(self) -> None:
        """Send ``WATCHDOG=1`` three times per interval until cancelled. Without a watchdog, return at once."""
        while self.watchdog_s:
            await self.notify("WATCHDOG=1")
            await self._clock.sleep(self.watchdog_s / _SENT_PER_INTERVAL)
