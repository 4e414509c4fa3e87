"""What the kernel knows of a TCP connection's link, and how far a sender is ahead of a receiver on the same host."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import Final

_MIN_RTT_OFFSET, _TCP_INFO_BYTES = 148, 152  # In struct tcp_info: tcpi_min_rtt, u32, us.
_NO_RTT_US = 2**32 - 1  # Before the first one was measured.

_ONE_HOST_RTT_S: Final = 20e-6  # Loopback has 3 to 10 us. On a network half a MiB may be too few for the link.
_SEND_BUFFER_BYTES: Final = 256 << 10  # The kernel doubles it.


def shortest_rtt_s(connected: socket.socket) -> float:
    """The shortest round trip that the kernel has seen lately: that of the link. Its estimate of the current one also
    has the time in queues, which is milliseconds where both hosts are busy. 0 if it is not known yet.

    Raises OSError if it is no TCP socket.
    """
    info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    rtt_us = int.from_bytes(info[_MIN_RTT_OFFSET:_TCP_INFO_BYTES], sys.byteorder)
    return 0.0 if rtt_us == _NO_RTT_US else rtt_us / 1e6


def limit_bytes_ahead(connected: socket.socket, rtt_s: float) -> bool:
    """If both ends are on one host, let this end send at most half a MiB that the other one has not acknowledged.
    Returns whether they are.

    `rtt_s` is its `shortest_rtt_s`. By default the kernel takes 4 MiB for each connection. While a receiver waits for
    a processor, the bytes of a few connections then leave the caches before they are received.
    """
    if not 0.0 < rtt_s <= _ONE_HOST_RTT_S:
        return False
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return True


def set_corked(connected: socket.socket, *, is_corked: bool) -> None:
    """While it is corked, the kernel sends whole segments only, and the rest after 200 ms. The end sends all.

    On loopback a segment has 64 KiB: without it each smaller write is a segment, which the receiver acknowledges. No
    effect if it is no TCP socket.
    """
    with suppress(OSError):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, is_corked)
