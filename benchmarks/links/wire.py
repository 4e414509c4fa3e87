"""The link: a process that carries IP packets between two network devices, with a delay and losses.

The kernel's own emulation (`netem`) is not in every kernel; the devices (`tun`) are. Packets of up to 64 KiB go
through as the kernel gives them, to be cut at the other end, so that a link of some Gbit/s needs a part of one core.
Loss takes single segments out of them. The devices' own queues limit the rate (`hosts`), as network cards do: packets
wait there as long as TCP lets them, and none is dropped.

Run as a module with the round trip in seconds and the share that is lost: prints the names of its two devices, and
carries packets until its standard input ends. The devices are gone with the process.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from benchmarks.leftovers import end_with_parent

MTU = 1500
_TUN_SET_INTERFACE, _TUN_SET_OFFLOAD = 0x400454CA, 0x400454D0  # <linux/if_tun.h>
_TUN_WITH_HEADERS = 0x0001 | 0x1000 | 0x4000  # IP packets, without the protocol's number, with `_HEADER`.
_CHECKSUM_AND_TCP4 = 0x01 | 0x02  # Checksums and the cutting of IPv4 TCP are left to the other end.
_HEADER = struct.Struct("<BBHHHH")  # struct virtio_net_hdr: flags, kind of cutting, header, segment, checksum's places.
_PACKET_BYTES_MAX = _HEADER.size + (64 << 10)
_SET_TIMER_SLACK = 29  # <linux/prctl.h>
_ONLY_LAST, _ONLY_FIRST = 0x01 | 0x08, 0x80  # TCP's flags FIN and PSH, and CWR.


class Link(NamedTuple):
    """The same in both directions."""

    bits_per_s: float  # Of IP packets.
    round_trip_s: float
    loss: float = 0.0  # The share of segments that are lost.


class Losses:
    """Which segments are lost: each with the same chance."""

    def __init__(self, share: float, chooser: random.Random) -> None:
        self._share, self._chooser = share, chooser
        self._left = self._next()  # Segments until the next one that is lost.

    def of(self, segments: int) -> list[int]:
        """The places of those lost among the next `segments`."""
        lost, at = list[int](), 0
        while self._left < segments - at:
            at += self._left
            lost.append(at)
            at += 1
            self._left = self._next()
        self._left -= segments - at
        return lost

    def _next(self) -> int:
        if not self._share:
            return sys.maxsize
        passed = 0
        while self._chooser.random() >= self._share:
            passed += 1
        return passed


def segments_of(packet: bytes) -> int:
    """As how many packets it would go over a cable."""
    kind: int
    kind, header_bytes, segment_bytes = _HEADER.unpack_from(packet)[1:4]
    return -(-(len(packet) - _HEADER.size - header_bytes) // segment_bytes) if kind else 1


def without(packet: bytes, lost: list[int]) -> Iterator[bytes]:
    """The packet without these segments, as shorter packets."""
    segments = segments_of(packet)
    if segments > 1:
        begin = 0
        for end in [*lost, segments]:
            if begin < end:
                yield _part(packet, begin, end, is_last=end == segments)
            begin = end + 1


def _part(packet: bytes, begin: int, end: int, *, is_last: bool) -> bytes:
    """Segments `begin` to `end` of an IPv4 TCP packet whose checksum is still to be made."""
    flags, kind, header_bytes, segment_bytes, checksum_start, checksum_place = _HEADER.unpack_from(packet)
    ip = bytearray(packet[_HEADER.size : _HEADER.size + header_bytes])
    payload = packet[_HEADER.size + header_bytes :][begin * segment_bytes : end * segment_bytes]
    tcp = (ip[0] & 15) * 4
    (number,), (sequence,) = struct.unpack_from(">H", ip, 4), struct.unpack_from(">I", ip, tcp + 4)
    struct.pack_into(">HH", ip, 2, len(ip) + len(payload), (number + begin) & 0xFFFF)
    struct.pack_into(">I", ip, tcp + 4, (sequence + begin * segment_bytes) & 0xFFFFFFFF)
    ip[tcp + 13] &= ~((0 if is_last else _ONLY_LAST) | (_ONLY_FIRST if begin else 0))
    struct.pack_into(">H", ip, 10, 0)
    struct.pack_into(">H", ip, 10, 0xFFFF ^ _sum(ip[:tcp]))
    pseudo_header = bytes(ip[12:20]) + struct.pack(">HH", 6, len(ip) - tcp + len(payload))
    struct.pack_into(">H", ip, tcp + 16, _sum(pseudo_header))
    if len(payload) <= segment_bytes:
        kind = segment_bytes = 0
    return _HEADER.pack(flags, kind, header_bytes, segment_bytes, checksum_start, checksum_place) + ip + payload


def _sum(data: bytes | bytearray) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Direction:
    """Packets that have left one device and have not reached the other. Times in seconds, given by the caller."""

    def __init__(self, delay_s: float, losses: Losses) -> None:
        self._delay_s = delay_s
        self._losses = losses
        self._on_the_way: deque[tuple[float, bytes]] = deque()

    @property
    def next_s(self) -> float | None:
        """When the next packet arrives. None if there is none."""
        return self._on_the_way[0][0] if self._on_the_way else None

    def send(self, packet: bytes, now_s: float) -> None:
        lost = self._losses.of(segments_of(packet))
        for each in without(packet, lost) if lost else (packet,):
            self._on_the_way.append((now_s + self._delay_s, each))

    def arrived(self, now_s: float) -> Iterator[bytes]:
        while self._on_the_way and self._on_the_way[0][0] <= now_s:
            yield self._on_the_way.popleft()[1]


def _carry(source: int, target: int, direction: Direction) -> None:
    while True:
        next_s = direction.next_s
        wait_s = None if next_s is None else max(0.0, next_s - time.monotonic())
        if select.select([source], [], [], wait_s)[0]:
            direction.send(os.read(source, _PACKET_BYTES_MAX), time.monotonic())
        for packet in direction.arrived(time.monotonic()):
            with suppress(OSError):  # The other end is not up, or has no room: it is lost, as on a cable.
                os.write(target, packet)


def _device(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUN_SET_INTERFACE, struct.pack("16sH14x", name.encode(), _TUN_WITH_HEADERS))
    fcntl.ioctl(device, _TUN_SET_OFFLOAD, _CHECKSUM_AND_TCP4)
    return device


def main() -> None:
    round_trip_s, loss = map(float, sys.argv[1:])
    names = [f"kvlink{os.getpid() % 10**7}{end}" for end in "ab"]
    one, other = map(_device, names)
    prctl = ctypes.CDLL(None).prctl
    for source, target in ((one, other), (other, one)):
        if not os.fork():
            end_with_parent()
            prctl(_SET_TIMER_SLACK, 1000)  # Nanoseconds: 50 us would be half the way of a short link.
            _carry(source, target, Direction(round_trip_s / 2, Losses(loss, random.Random(source))))
    print(*names, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
