"""Two hosts: network namespaces that end with the process that made them, however it ends, and the link between."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.leftovers import ENDS_WITH_US
from benchmarks.links import wire
from benchmarks.links.wire import MTU, Link

NAMES = ("10.98.0.1", "10.98.0.2")
_PIPE = subprocess.PIPE
_BURST_BYTES, _QUEUE_BYTES = 128 << 10, 64 << 20  # More than a packet, and more than all connections have under way.


class NoLinks(Exception):
    """Hosts and links cannot be made here. Says why."""


@dataclass(frozen=True, slots=True)
class Host:
    address: str
    prefix: tuple[str, ...]  # Before a command, which then runs on this host. It is killed when this process ends.


@contextmanager
def linked_hosts(link: Link) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other by `link` alone. For the main thread. Raises NoLinks.

    Nothing of them is left when the block ends, or this process: a namespace without a process is no more.
    """
    with ExitStack() as running:
        delays = [str(each) for each in (link.round_trip_s, link.loss)]
        devices = _started(running, [sys.executable, "-m", wire.__name__, *delays]).split()
        hosts = []
        for address, device in zip(NAMES, devices, strict=True):
            pid = _started(running, ["unshare", "--net", "sh", "-c", "echo $$ && exec cat"]).strip()
            host = Host(address, (*ENDS_WITH_US, "nsenter", f"--net=/proc/{pid}/ns/net", "--"))
            rate = f"tbf rate {link.bits_per_s:.0f}bit burst {_BURST_BYTES} limit {_QUEUE_BYTES}"
            _run(["ip", "link", "set", device, "netns", pid])
            _run([*host.prefix, "ip", "link", "set", "lo", "up"])
            _run([*host.prefix, "ip", "address", "add", f"{address}/24", "dev", device])
            _run([*host.prefix, "tc", "qdisc", "add", "dev", device, "root", *rate.split()])
            _run([*host.prefix, "ip", "link", "set", device, "up", "mtu", str(MTU)])
            hosts.append(host)
        yield hosts[0], hosts[1]


def _started(running: ExitStack, command: Sequence[str]) -> str:
    """The first line of a process that runs until its standard input is closed. Raises NoLinks."""
    try:
        process = subprocess.Popen([*ENDS_WITH_US, *command], stdin=_PIPE, stdout=_PIPE, stderr=_PIPE, text=True)
    except OSError as error:
        raise NoLinks(str(error)) from error
    running.enter_context(process)  # Closes its standard input, and waits.
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    if not line:
        raise NoLinks(f"{command[0]}: {(process.stderr.read().strip() or 'it ended').splitlines()[-1]}")
    return line


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise NoLinks(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise NoLinks(f"{' '.join(command)}: {error.stderr.strip()}") from error
