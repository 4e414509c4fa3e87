"""The link between two hosts of `benchmarks.links`: what it does to packets, and to what runs over it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.links import raw_tcp
from benchmarks.links.hosts import NoLinks, linked_hosts
from benchmarks.links.wire import Direction, Link, Losses, segments_of, without
from tests.daemon import until

MEASURED = Link(bits_per_s=1e9, round_trip_s=0.002)
_CUT_TCP = 1  # As in <linux/virtio_net.h>.


def packet(payload: bytes, segment_bytes: int, sequence: int = 100) -> bytes:
    """As the kernel gives a long one: cut later, its checksum that of the pseudo header."""
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + len(payload), 7, 0, 64, 6, 0, bytes(4), bytes(4))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, sequence, 0, 0x50, 0x99, 1000, 0, 0)  # CWR, ACK, PSH, FIN.
    return struct.pack("<BBHHHH", 1, _CUT_TCP, 40, segment_bytes, 20, 16) + ip + tcp + payload


def words(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("lost", [[0], [1], [4], [0, 4], [1, 2], [0, 1, 2, 3, 4]], ids=str)
def test_a_long_packet_loses_single_segments_and_the_rest_says_where_it_belongs(lost: list[int]) -> None:
    payload = random.Random(1).randbytes(4 * 100 + 30)
    sent = packet(payload, 100)
    assert segments_of(sent) == 5

    there = dict[int, bytes]()
    flags = []
    for part in without(sent, lost):
        _, kind, header_bytes, segment_bytes, _, _ = struct.unpack_from("<BBHHHH", part)
        ip, tcp, data = part[10:30], part[30:50], part[50:]
        assert header_bytes == 40
        assert (kind, segment_bytes) == ((_CUT_TCP, 100) if len(data) > 100 else (0, 0))
        assert struct.unpack_from(">H", ip, 2) == (40 + len(data),)
        assert words(ip) == 0xFFFF, "the header's checksum is right"
        assert struct.unpack_from(">H", tcp, 16) == (words(ip[12:20] + struct.pack(">HH", 6, 20 + len(data))),)
        there[struct.unpack_from(">I", tcp, 4)[0] - 100] = data
        flags.append(tcp[13])

    kept = [place for place in range(5) if place not in lost]
    found = {start + at: data[at : at + 100] for start, data in there.items() for at in range(0, len(data), 100)}
    assert found == {place * 100: payload[place * 100 : place * 100 + 100] for place in kept}
    assert [flag & 0x80 for flag in flags] == [0x80 if start == 0 else 0 for start in there]
    ends = [start + len(data) == len(payload) for start, data in there.items()]
    assert [flag & 0x09 for flag in flags] == [0x09 if is_last else 0 for is_last in ends]


def test_the_share_of_lost_segments_is_what_was_asked_for_however_they_are_packed() -> None:
    losses, chooser, sent, lost = Losses(0.02, random.Random(1)), random.Random(2), 0, 0
    while sent < 100_000:
        segments = chooser.randrange(1, 46)
        places = losses.of(segments)
        assert places == sorted(set(places)) and all(0 <= place < segments for place in places)
        sent, lost = sent + segments, lost + len(places)
    assert 0.017 < lost / sent < 0.023
    assert Losses(0.0, random.Random(1)).of(10**9) == []


def test_packets_arrive_half_a_round_trip_later_in_their_order() -> None:
    direction = Direction(0.5, Losses(0.0, random.Random(1)))
    sent = [bytes(10) + bytes([number]) * 1000 for number in range(2)]

    direction.send(sent[0], 5.0)
    direction.send(sent[1], 5.25)

    assert direction.next_s == 5.5
    assert list(direction.arrived(5.5)) == [sent[0]]
    assert direction.next_s == 5.75
    assert list(direction.arrived(9.0)) == [sent[1]]
    assert direction.next_s is None


def made(link: Link) -> None:
    """Skip where no link can be made."""
    try:
        with linked_hosts(link):
            pass
    except NoLinks as error:
        pytest.skip(f"no hosts with a link: {error}")


def test_two_hosts_reach_each_other_over_the_link_alone() -> None:
    made(MEASURED)
    with linked_hosts(MEASURED) as (serving, loading):
        command = [*serving.prefix, sys.executable, "-m", raw_tcp.__name__, serving.address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
            assert peer.stdout is not None
            port = int(peer.stdout.readline())
            with pytest.raises(OSError, match=r"timed out|unreachable|refused"):
                socket.create_connection((serving.address, port), timeout=0.2)
            code = f"""
import json, time
from benchmarks.links import raw_tcp
begin_s = time.monotonic()
raw_tcp.load(("{serving.address}", {port}), 4 << 20, 2)
raw_tcp.save(("{serving.address}", {port}), 4 << 20, 2)
print(json.dumps(time.monotonic() - begin_s))
"""
            done = subprocess.run([*loading.prefix, sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout) > 2 * (4 << 20) * 8 / MEASURED.bits_per_s


def test_nothing_is_left_of_hosts_whose_maker_was_killed() -> None:
    made(MEASURED)
    code = """
import subprocess, sys, time
from benchmarks.links.hosts import linked_hosts
from tests.bench.test_links_bench import MEASURED
with linked_hosts(MEASURED) as hosts:
    running = subprocess.Popen([*hosts[0].prefix, "sleep", "600"])
    print(running.pid, flush=True)
    time.sleep(600)
"""
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ))
    assert maker.stdout is not None
    with maker.stdout:
        pid = int(maker.stdout.readline())
        until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"))
        namespace = os.readlink(f"/proc/{pid}/ns/net")
        maker.send_signal(signal.SIGKILL)
        maker.wait()

    def used() -> bool:
        return any(_namespace(each) == namespace for each in Path("/proc").glob("[0-9]*"))

    until(lambda: not used())


def _namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns" / "net")
    except OSError:  # It ended, or is being reaped.
        return ""
