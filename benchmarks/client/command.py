"""``kvctl bench``: how close the store is to this machine's limits."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf import json_format
from rich.progress import Progress

from benchmarks.client import limits, parts, rounds
from benchmarks.client.memory import VIEW_BYTES, Memory
from benchmarks.client.report import Report
from benchmarks.client.wire import LAYOUT, Wire
from kvservice_api.errors import KVError, NotShared
from kvservice_api.layout import Layout
from kvservice_api.v1 import types_pb2
from kvservice_client.cli import output
from kvservice_client.cli.options import AsJson, checked_address, connect

_BYTES_MOVED = 8 * LAYOUT.block_tokens * LAYOUT.bytes_per_token  # 256 MiB in each round.


def bench(
    address: Annotated[
        str,
        typer.Option(
            "--address",
            help="Measure this daemon's wire instead of one started for the purpose.",
            callback=lambda address: checked_address(address) if address else "",
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Less data and fewer rounds: under a minute.")] = False,
    directory: Annotated[
        Path | None,
        typer.Option("--directory", help="A folder on the disk to measure; the system's temporary one if none."),
    ] = None,
    dram_path: Annotated[Path, typer.Option("--dram-path", help="The tmpfs for the daemon that is started.")] = Path(
        "/dev/shm"
    ),
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

    Each limit is the best of pieces of 256 KiB to 8 MiB and 1 to 2 threads, measured before and after
    ours; where the two differ by more than 15 %, the round is repeated.
    """
    if directory is not None and not directory.is_dir():
        raise typer.BadParameter(f"{directory} is no folder", param_hint="--directory")
    layout = LAYOUT if layout_file is None else _read_layout(layout_file)
    report = Report()
    with ExitStack() as stack, output.progress() as progress:
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

    def _step(self, done: int, what: str) -> None:
        output.show_step(self._progress, self._task, done, what)

    def run(self, address: str, directory: Path | None, dram_path: Path) -> None:
        if address:
            with connect(address, 30, name="kvctl bench") as client:
                client.capabilities()  # Fail before the first measurement if the daemon does not answer.
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvctl-bench-", dir=directory)))
        self._step(0, "measuring memory copies")
        self._memory()
        block_bytes = self._layout.block_tokens * self._layout.bytes_per_token
        blocks = max(1, _BYTES_MOVED // (2 if self._quick else 1) // block_bytes)
        pid = None
        if not address:
            self._step(1, "starting a daemon")
            dram_bytes = (2 * blocks + 4) * block_bytes + max(VIEW_BYTES, block_bytes)
            address, pid = self._stack.enter_context(parts.daemon(folder, dram_path, dram_bytes))
        runs = 3 if self._quick else 5
        client = self._stack.enter_context(connect(address, 30, name="kvctl bench", transport="grpc"))
        self._wire(Wire(client, self._layout, blocks=blocks, runs=runs, pid=pid))
        self._step(3, "measuring shared memory")
        sharing = self._stack.enter_context(connect(address, 30, name="kvctl bench", transport="shm"))
        self._shared_memory(Memory(sharing, self._layout, blocks=2 * blocks, runs=runs))
        if pid is not None:
            with parts.parts(folder, quick=self._quick) as programs:
                self._step(4, "measuring the SSD tier")
                self._ssd(programs)
                self._step(5, "measuring the index")
                self._index(programs)

    def _memory(self) -> None:
        size_bytes = (256 if self._quick else 1024) << 20
        found = max(limits.memcpy(size_bytes).items(), key=lambda item: item[1])
        self._report.settings["memcpy_gbps"], self._report.memcpy_gbps = found

    def _wire(self, wire: Wire) -> None:
        report = self._report
        size_bytes = (128 if self._quick else 512) << 20
        with limits.tcp() as tcp:
            self._step(2, "measuring loads over gRPC")
            load = rounds.compare(lambda: tcp(size_bytes), wire.load, attempts_max=self._attempts_max)
            self._step(2, "measuring saves over gRPC")
            save = rounds.compare(lambda: tcp(size_bytes), wire.save, attempts_max=self._attempts_max)
        self._note("tcp_gbps", load)
        self._note("grpc_save_ratio", save)
        report.tcp_gbps = load.limit.value
        report.grpc_load_gbps, report.grpc_load_ratio = load.ours["gbps"], load.ours["gbps"] / load.limit.value
        report.grpc_save_gbps, report.grpc_save_ratio = save.ours["gbps"], save.ours["gbps"] / save.limit.value
        report.grpc_load_cpu_s_per_gb = load.ours["cpu_s_per_gb"]
        report.grpc_save_cpu_s_per_gb = save.ours["cpu_s_per_gb"]
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

        try:
            load = rounds.compare(limit, memory.load, attempts_max=self._attempts_max)
            save = rounds.compare(limit, memory.save, attempts_max=self._attempts_max)
            report.shm_view_ms_1gib = memory.view_ms()
            memory.check()
        except NotShared:
            return  # A daemon on another host, or one that does not share: there is nothing to measure.
        self._note("shm_load_ratio", load)
        self._note("shm_save_ratio", save)
        report.shm_load_gbps, report.shm_load_ratio = load.ours["gbps"], load.ours["gbps"] / load.limit.value
        report.shm_save_gbps, report.shm_save_ratio = save.ours["gbps"], save.ours["gbps"] / save.limit.value

    def _ssd(self, programs: parts.Parts) -> None:
        report = self._report
        for way in ("read", "write"):

            def limit(way: str = way) -> dict[str, float]:
                return programs.measure(f"disk-{way}")

            def ours(way: str = way) -> dict[str, float]:
                return {"gbps": programs.measure("ssd")[f"{way}_gbps"]}

            before = limit()
            if not before:
                return  # A tmpfs: there is no disk to compare with.
            found = rounds.compare(limit, ours, attempts_max=self._attempts_max, before=before)
            self._note(f"odirect_{way}_gbps", found)
            setattr(report, f"odirect_{way}_gbps", found.limit.value)
            setattr(report, f"ssd_{way}_gbps", found.ours["gbps"])
            setattr(report, f"ssd_{way}_ratio", found.ours["gbps"] / found.limit.value)

    def _index(self, programs: parts.Parts) -> None:
        found = [programs.measure("index") for _ in range(3)]
        for way in ("put", "get"):
            ratios = sorted(each[f"{way}_per_s"] / each[f"lmdb_{way}_per_s"] for each in found)
            setattr(self._report, f"index_{way}_ratio", ratios[1])

    def _note(self, name: str, found: rounds.Round) -> None:
        self._report.settings[name] = found.limit.setting
        self._report.spreads[name] = found.limit.spread
        self._report.attempts[name] = found.attempts
