"""``python -m benchmarks.links``: loads and saves between two hosts, beside plain TCP on the same link.

The hosts are network namespaces of this machine, with a link between them that has the rate, the round trip and the
loss of each case. Needs root, and `/dev/net/tun`. Both hosts and the link share this machine's cores: where they do
not suffice for a rate, the figures of plain TCP show it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import leftovers
from benchmarks.client import parts
from benchmarks.client.wire import LAYOUT
from benchmarks.links import client, raw_tcp
from benchmarks.links.hosts import NoLinks, linked_hosts
from benchmarks.links.wire import Link
from benchmarks.report import checked, markdown_table, parser_of, where_and_when, write_section

RATES = {"1g": 1e9, "10g": 10e9}
_BLOCKS = {"1g": 2, "10g": 8}  # Of 32 MiB: about half a second.
_ROUND_TRIPS_S, _LOSSES = (0.0002, 0.005), (0.0, 0.001)
_CONNECTIONS = [1, 4]
TRANSPORTS = ["bulk", "grpc"]


@dataclass(frozen=True, slots=True)
class Case:
    """What one link showed. Rates in Gbit/s of payload."""

    link: Link
    round_trip_ms: float  # As measured.
    ways: client.Measured


def measure(link: Link, *, blocks: int, rounds: int, transports: list[str]) -> Case:
    """Raises NoLinks."""
    dram_bytes = (len(transports) + 2) * blocks * LAYOUT.block_tokens * LAYOUT.bytes_per_token
    with ExitStack() as stack:
        folder = stack.enter_context(leftovers.own_folder(None))
        serving, loading = stack.enter_context(linked_hosts(link))
        where = (folder, Path("/dev/shm"), dram_bytes, 0, "--insecure")
        daemon = stack.enter_context(parts.daemon(*where, host=serving.address, prefix=serving.prefix))
        command = [*serving.prefix, sys.executable, "-m", raw_tcp.__name__, serving.address]
        peer = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert peer.stdout is not None
        orders = client.Orders(
            daemon.address, int(peer.stdout.readline()), daemon.pid, transports, _CONNECTIONS, blocks, rounds
        )
        done = subprocess.run([*loading.prefix, *client.command(orders)], stdout=subprocess.PIPE, check=True)
    return Case(link, **json.loads(done.stdout))


def table(cases: list[Case]) -> str:
    columns = ["Link", "Round trip (ms)", "", *(f"TCP x {count}" for count in _CONNECTIONS)]
    for transport in TRANSPORTS:
        columns += [transport, "of TCP", "CPU s/GB"]
    rows = []
    for case in cases:
        for move in ("load", "save"):
            rate = {
                way.removesuffix(f" {move}"): of["gbit_per_s"] for way, of in case.ways.items() if way.endswith(move)
            }
            limit = max(value for way, value in rate.items() if way.startswith("TCP"))
            row = [
                f"{case.link.bits_per_s / 1e9:g} Gbit/s, {case.link.round_trip_s * 1e3:g} ms, {case.link.loss:.1%} lost"
            ]
            row += [f"{case.round_trip_ms:.2f}", move, *(f"{rate[f'TCP x {count}']:.2f}" for count in _CONNECTIONS)]
            for transport in TRANSPORTS:
                if transport in rate:
                    cpu = case.ways[f"{transport} {move}"]["cpu_s_per_gb"]
                    row += [f"{rate[transport]:.2f}", f"{rate[transport] / limit:.2f}", f"{cpu:.2f}"]
                else:
                    row += ["", "", ""]
            rows.append(row)
    return "\n".join(markdown_table(columns, rows))


def page(name: str, cases: list[Case], rounds: int) -> str:
    return (
        f"### Between hosts at {name.removesuffix('g')} Gbit/s\n\n{where_and_when()} "
        f"Reproduce with `python -m benchmarks.links {name}`, as root.\n\n"
        f"Gbit/s of payload; medians of {rounds} rounds in rotated order, of {_BLOCKS[name] * 32} MiB each: a load "
        "with its lookup, a save until it is acknowledged. TCP: new plain connections; `of TCP`: of the "
        "better of the two. Round trip: of connecting, as measured. CPU: of daemon and client together.\n\n"
        f"{table(cases)}"
    )


def main() -> int:
    parser = parser_of("python -m benchmarks.links", __doc__, RATES, "64 MiB or less, two rounds, without loss")
    parser.add_argument("--json", action="store_true", help="print the figures for programs")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, help="both if none is given")
    given = checked(parser, "rate", list(RATES))
    leftovers.begin(None)
    rounds = 2 if given.quick else 5
    found = {}
    for name in given.names:
        links = [
            Link(RATES[name], s, loss) for s in _ROUND_TRIPS_S for loss in (_LOSSES[:1] if given.quick else _LOSSES)
        ]
        blocks = min(2, _BLOCKS[name]) if given.quick else _BLOCKS[name]
        try:
            cases = [measure(link, blocks=blocks, rounds=rounds, transports=given.transports) for link in links]
        except NoLinks as error:
            print(f"There can be no hosts with a link here: {error}", file=sys.stderr)
            return 1
        found[name] = [asdict(case) | {"link": case.link._asdict()} for case in cases]
        if given.write is not None:
            write_section(given.write, f"links bench {name}", page(name, cases, rounds))
        if not given.json:
            print(page(name, cases, rounds), flush=True)
    if given.json:
        print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
