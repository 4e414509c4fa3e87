"""``kvctl bench``: how close the store is to this machine's limits."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from google.protobuf import json_format
from rich.progress import Progress

from benchmarks import leftovers
from benchmarks.client import limits, parts, rounds
from benchmarks.client.memory import VIEW_BYTES, Memory
from benchmarks.client.report import Report
from benchmarks.client.wire import LAYOUT, Wire, until_allocated
from benchmarks.report import why_not_writable
from kvservice_api.address import TcpAddress, parse_address
from kvservice_api.errors import KVError, TierFull
from kvservice_api.layout import Layout
from kvservice_api.v1 import types_pb2
from kvservice_client.cli import output
from kvservice_client.cli.options import AsJson, checked_address, connect, uses_tls
from kvservice_client.client import Client
from kvservice_client.tls import TlsFiles

_FIRST_LAYERS = 9  # Loads whose first layer is timed.
_INDEX_MEASURES = 9  # Half a second each. One of them may be a third off.
_BYTES_MOVED = 8 * LAYOUT.block_tokens * LAYOUT.bytes_per_token  # 256 MiB in each round.


def bench(
    address: Annotated[
        str,
        typer.Option(
            "--address",
            help="Measure this daemon's wire instead of one started for the purpose. Its shares of TCP are measured "
            "only if it is on this host and serves without TLS: the limit is TCP over this host's loopback.",
            callback=lambda address: checked_address(address) if address else "",
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Less data and fewer rounds: under a minute.")] = False,
    directory: Annotated[
        Path | None,
        typer.Option("--directory", help="A folder on the disk to measure; the system's temporary one if none."),
    ] = None,
    dram_path: Annotated[
        Path, typer.Option("--dram-path", help="The tmpfs for the daemon that is started.")
    ] = leftovers.SHARED_MEMORY,
    layout_file: Annotated[
        Path | None,
        typer.Option(
            "--layout",
            metavar="FILE",
            help="Move blocks of this layout: a JSON file with the fields of `Layout`, as `kvctl inspect --json` shows "
            "them. By default 32 layers of 8 KV heads of 128 in bfloat16.",
        ),
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Also write the table into this Markdown file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure loads, saves, the SSD tier, lookups and the index against the machine's own limits.

    Each limit is the best of pieces of 256 KiB to 8 MiB and 1 to 2 threads (of disks, 4 to 16 MiB and 4 or 8
    threads), measured before and after ours; where the two differ by more than 15 %, the round is repeated.
    """
    for hint, folder in (("--directory", directory), ("--dram-path", dram_path)):
        if folder is not None and not folder.is_dir():
            raise typer.BadParameter(f"{folder} is no folder", param_hint=hint)
        if address and folder not in (None, leftovers.SHARED_MEMORY):
            raise typer.BadParameter("belongs to a daemon that is started; --address names another", param_hint=hint)
    if write is not None and (why := why_not_writable(write)):
        raise typer.BadParameter(why, param_hint="--write")
    layout = LAYOUT if layout_file is None else _read_layout(layout_file)
    report = Report()
    leftovers.begin(directory, dram_path)
    with output.progress() as progress, ExitStack() as stack:
        _Bench(report, stack, layout, quick, progress).run(address, directory, dram_path)
    report.describe_machine(" ".join(["kvctl", *sys.argv[1:]]))
    if write is not None:
        report.write_into(write)
    if as_json:
        output.print_json(report.as_json())
        return
    table = output.table("measure", "figure", "budget", "setting and spread", right=("figure",))
    for row in report.rows():
        table.add_row(*row)
    output.console().print(table)


def _read_layout(path: Path) -> Layout:
    try:
        return Layout.from_proto(json_format.Parse(path.read_text(encoding="utf-8"), types_pb2.Layout()))
    except (OSError, UnicodeDecodeError, json_format.ParseError, KVError) as error:
        raise typer.BadParameter(f"{path} is not a layout: {error}", param_hint="--layout") from error


def why_no_shares_of_tcp(address: str, *, with_tls: bool) -> str:
    """Why this daemon's speeds are not compared with TCP over loopback. Empty if they are."""
    if with_tls:
        return "not comparable: the daemon serves with TLS, and the limit is plain TCP"
    found = parse_address(address)
    if isinstance(found, TcpAddress) and not found.is_loopback:
        try:
            family, kind, _, _, place = socket.getaddrinfo(found.host, 0, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as tried:
                tried.bind(place)  # Only an address of this host can be bound.
        except OSError:
            return "not comparable: the daemon is on another host, and the limit is TCP over this host's loopback"
    return ""


class _Bench:
    """One run: its measures, one after another, into the report."""

    def __init__(self, report: Report, stack: ExitStack, layout: Layout, quick: bool, progress: Progress) -> None:
        self._report = report
        self._layout = layout
        self._stack = stack
        self._quick = quick
        self._attempts_max = 3 if quick else 6
        self._progress = progress
        self._task = progress.add_task("", total=6)
        self._without_shares = ""  # Why speeds are not compared with TCP.

    def _step(self, done: int, what: str) -> None:
        output.show_step(self._progress, self._task, done, what)

    @contextmanager
    def _figures(self, *beginnings: str) -> Iterator[None]:
        """Those whose names begin so. If they cannot be measured in this block, the report says why."""
        try:
            yield
        except TierFull as error:
            self._report.explain(beginnings, f"the daemon needs a larger dram.capacity_bytes: {error.message}")
        except (KVError, parts.MeasureFailed, OSError, subprocess.CalledProcessError) as error:
            self._report.explain(beginnings, str(error) or type(error).__name__)

    def run(self, address: str, directory: Path | None, dram_path: Path) -> None:
        if address:
            with connect(address, 30, name="kvctl bench") as client:
                client.capabilities()  # Fail before the first measurement if the daemon does not answer.
            self._without_shares = why_no_shares_of_tcp(address, with_tls=uses_tls())
            not_there = ("odirect", "ssd", "cold", "bulk_cold", "grpc_cold", "index", "tls", "bulk_tls")
            self._report.explain(not_there, "not with --address")
        folder = self._stack.enter_context(leftovers.own_folder(directory))
        self._step(0, "measuring memory copies")
        self._memory()
        block_bytes = self._layout.block_tokens * self._layout.bytes_per_token
        blocks = max(1, _BYTES_MOVED // (2 if self._quick else 1) // block_bytes)
        pid = None
        if not address:
            self._step(1, "starting a daemon")
            dram_bytes = (2 * blocks + 4) * block_bytes + max(VIEW_BYTES, block_bytes)
            address, pid, _ = self._stack.enter_context(parts.daemon(folder, dram_path, dram_bytes))
        runs = 3 if self._quick else 5
        client = self._stack.enter_context(connect(address, 30, name="kvctl bench", transport="grpc"))
        if pid is not None:
            until_allocated(client)
        bulk = self._stack.enter_context(connect(address, 30, name="kvctl bench", transport="bulk"))
        of_bulk, of_grpc = (Wire(each, self._layout, blocks=blocks, runs=runs, pid=pid) for each in (bulk, client))
        with limits.tcp() as tcp:
            with self._figures("bulk_load", "bulk_save", "bulk_first"):
                self._bulk(of_bulk, tcp)
            with self._figures("tcp", "grpc_load", "grpc_save", "grpc_first"):
                self._wire(of_grpc, tcp)
        if not self._without_shares:
            with limits.tcp(memory_bytes=self._tcp_bytes) as tcp:
                found = max(tcp(self._tcp_bytes).items(), key=lambda item: item[1])
                self._report.settings["tcp_memory_gbps"], self._report.tcp_memory_gbps = found
        with self._figures("rpc", "lookup", "local_lookup"):
            self._calls(of_grpc)
        if pid is not None:
            with self._figures("tls", "bulk_tls"):
                self._bulk_with_tls(folder, dram_path, (2 * blocks + 4) * block_bytes, blocks=blocks, runs=runs)
        with self._figures("shm", "hit"):
            self._step(3, "measuring shared memory")
            sharing = self._stack.enter_context(connect(address, 30, name="kvctl bench", transport="shm"))
            self._shared_memory(Memory(sharing, self._layout, blocks=2 * blocks, runs=runs))
        if pid is not None:
            with parts.parts(folder, dram_path, quick=self._quick) as programs:
                self._step(4, "measuring the SSD tier")
                with self._figures("odirect", "ssd"):
                    self._ssd(programs)
                self._step(4, "measuring loads that begin on SSD")
                with self._figures("cold"):
                    cold = programs.measure("cold")
                    self._report.cold_first_layer_ms = cold["first_layer_ms"]
                    self._report.cold_first_layer_ratio = cold["ratio"]
                for transport in ("bulk", "grpc"):
                    with self._figures(f"{transport}_cold"):
                        ratio = programs.measure(f"cold {transport}")["ratio"]
                        setattr(self._report, f"{transport}_cold_first_layer_ratio", ratio)
                self._step(5, "measuring the index")
                with self._figures("index"):
                    self._index(programs)

    def _memory(self) -> None:
        size_bytes = (256 if self._quick else 1024) << 20
        found = max(limits.memcpy(size_bytes).items(), key=lambda item: item[1])
        self._report.settings["memcpy_gbps"], self._report.memcpy_gbps = found

    def _bulk(self, wire: Wire, tcp: Callable[[int], dict[str, float]]) -> None:
        report = self._report
        self._step(2, "measuring loads through the bulk port")
        load, of_tcp = self._beside_tcp(wire.load, tcp)
        self._step(2, "measuring saves through the bulk port")
        save, of_tcp_too = self._beside_tcp(wire.save, tcp)
        first_us = wire.first_layer_us(_FIRST_LAYERS)
        wire.check("bulk")
        report.bulk_load_ratio = self._share("bulk_load_ratio", load, of_tcp)
        report.bulk_save_ratio = self._share("bulk_save_ratio", save, of_tcp_too)
        report.bulk_load_gbps, report.bulk_save_gbps = load["gbps"], save["gbps"]
        report.bulk_load_cpu_s_per_gb, report.bulk_save_cpu_s_per_gb = load["cpu_s_per_gb"], save["cpu_s_per_gb"]
        report.bulk_first_layer_us_p50 = first_us

    def _bulk_with_tls(self, folder: Path, dram_path: Path, dram_bytes: int, *, blocks: int, runs: int) -> None:
        """Beside Python's own TLS sockets, with the same certificate and the same cipher."""
        if (pair := limits.make_pair(folder)) is None:
            raise parts.MeasureFailed("there is no program `openssl` to make a certificate with")
        report, size_bytes = self._report, self._tcp_bytes // 4
        self._step(2, "measuring loads through the bulk port with TLS")
        flags = (f"--tls.certificate={pair.certificate}", f"--tls.key={pair.key}")
        (folder / "tls").mkdir()
        with (
            parts.daemon(folder / "tls", dram_path, dram_bytes, 0, *flags) as (address, pid, _),
            Client(address, timeout_s=30, tls=TlsFiles(pair.certificate), transport="bulk") as client,
            limits.tcp(pair) as tls,
        ):
            until_allocated(client)
            wire = Wire(client, self._layout, blocks=blocks, runs=runs, pid=pid)
            load = rounds.compare(lambda: tls(size_bytes), wire.load, attempts_max=self._attempts_max)
            wire.check("bulk")
        self._note("tls_gbps", load)
        report.tls_gbps = load.limit.value
        report.bulk_tls_load_gbps, report.bulk_tls_load_ratio = load.ours["gbps"], load.ours["gbps"] / load.limit.value
        report.bulk_tls_load_cpu_s_per_gb = load.ours["cpu_s_per_gb"]

    @property
    def _tcp_bytes(self) -> int:
        return (128 if self._quick else 512) << 20

    def _wire(self, wire: Wire, tcp: Callable[[int], dict[str, float]]) -> None:
        report = self._report
        self._step(2, "measuring loads over gRPC")
        load, of_tcp = self._beside_tcp(wire.load, tcp)
        self._step(2, "measuring saves over gRPC")
        save, of_tcp_too = self._beside_tcp(wire.save, tcp)
        if of_tcp is None:
            report.explain(("tcp",), self._without_shares)
        else:
            report.tcp_gbps = of_tcp.limit.value
        report.grpc_load_ratio = self._share("tcp_gbps", load, of_tcp)
        report.grpc_save_ratio = self._share("grpc_save_ratio", save, of_tcp_too)
        report.grpc_load_gbps, report.grpc_save_gbps = load["gbps"], save["gbps"]
        report.grpc_load_cpu_s_per_gb, report.grpc_save_cpu_s_per_gb = load["cpu_s_per_gb"], save["cpu_s_per_gb"]
        report.grpc_first_layer_us_p50 = wire.first_layer_us(_FIRST_LAYERS)

    def _beside_tcp(
        self, ours: Callable[[], Mapping[str, float]], tcp: Callable[[int], dict[str, float]]
    ) -> tuple[Mapping[str, float], rounds.Round | None]:
        """Ours, and the round with the limit; None where the two have nothing to do with each other."""
        if self._without_shares:
            return ours(), None
        found = rounds.compare(lambda: tcp(self._tcp_bytes), ours, attempts_max=self._attempts_max)
        return found.ours, found

    def _share(self, noted: str, ours: Mapping[str, float], found: rounds.Round | None) -> float | None:
        """Of the limit, whose setting and spread stand beside the figure `noted`."""
        if found is None:
            self._report.explain(("bulk_load_ratio", "bulk_save_ratio", "grpc_load_ratio", "grpc_save_ratio"),
                                 self._without_shares)  # fmt: skip
            return None
        self._note(noted, found)
        return ours["gbps"] / found.limit.value

    def _calls(self, wire: Wire) -> None:
        report = self._report
        self._step(2, "lookups")
        count = 300 if self._quick else 1000
        calls = rounds.compare(
            lambda: {"one at a time": wire.empty_call_us(count)},
            lambda: {"us": wire.lookup_us(count)},
            attempts_max=self._attempts_max,
        )
        self._note("rpc_empty_us_p50", calls)
        report.rpc_empty_us_p50 = calls.limit.value
        report.lookup_512_us_p50, report.lookup_512_ratio = calls.ours["us"], calls.ours["us"] / calls.limit.value
        report.local_lookup_us_per_key = wire.local_lookup_us_per_key(count)

    def _shared_memory(self, memory: Memory) -> None:
        report = self._report
        size_bytes = (256 if self._quick else 1024) << 20

        def limit() -> dict[str, float]:
            return limits.memcpy(size_bytes)

        load = rounds.compare(limit, memory.load, attempts_max=self._attempts_max)
        save = rounds.compare(limit, memory.save, attempts_max=self._attempts_max)
        view_ms, hit_us = memory.view_ms(), memory.hit_us(100 if self._quick else 300)
        memory.check()
        report.shm_view_ms_1gib = view_ms
        report.hit_256_us_p50, report.hit_256_copy_us_p50 = hit_us
        self._note("shm_load_ratio", load)
        self._note("shm_save_ratio", save)
        report.shm_load_gbps, report.shm_load_ratio = load.ours["gbps"], load.ours["gbps"] / load.limit.value
        report.shm_save_gbps, report.shm_save_ratio = save.ours["gbps"], save.ours["gbps"] / save.limit.value

    def _ssd(self, programs: parts.Parts) -> None:
        report = self._report
        for way in ("read", "write"):

            def turns(way: str = way) -> Iterator[rounds.Turn]:
                while found := programs.measure("ssd"):
                    before, after = found[way]
                    # As of the limit, the best of each pass.
                    ours = (max(before["ours"]) + max(after["ours"])) / 2
                    yield before["limits"], {"gbps": ours}, after["limits"]

            found = rounds.quietest(turns(), attempts_max=self._attempts_max)
            if found is None:
                raise parts.MeasureFailed("the folder's file system has no O_DIRECT: there is no disk to compare with")
            self._note(f"odirect_{way}_gbps", found)
            setattr(report, f"odirect_{way}_gbps", found.limit.value)
            setattr(report, f"ssd_{way}_gbps", found.ours["gbps"])
            setattr(report, f"ssd_{way}_ratio", found.ours["gbps"] / found.limit.value)

    def _index(self, programs: parts.Parts) -> None:
        found = [programs.measure("index") for _ in range(_INDEX_MEASURES)]
        for way in ("put", "get"):
            ratios = [each[f"{way}_per_s"] / each[f"lmdb_{way}_per_s"] for each in found]
            setattr(self._report, f"index_{way}_ratio", median(ratios))

    def _note(self, name: str, found: rounds.Round) -> None:
        self._report.settings[name] = found.limit.setting
        self._report.spreads[name] = found.limit.spread
        self._report.attempts[name] = found.attempts
