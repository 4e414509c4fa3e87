"""All measures of one run, as one flat object for programs and as a table for people."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- kvctl bench: begin -->", "<!-- kvctl bench: end -->"

BUDGETS: dict[str, tuple[str, float]] = {
    "grpc_load_ratio": ("at least", 0.35),
    "grpc_save_ratio": ("at least", 0.30),
    "shm_load_ratio": ("at least", 0.85),
    "shm_save_ratio": ("at least", 0.80),
    "shm_view_ms_1gib": ("under", 5),
    "ssd_read_ratio": ("at least", 0.85),
    "ssd_write_ratio": ("at least", 0.80),
    "lookup_512_ratio": ("at most", 2.0),
    "local_lookup_us_per_key": ("at most", 5.0),
    "index_put_ratio": ("at least", 0.70),
    "index_get_ratio": ("at least", 0.70),
}


@dataclass(slots=True)
class Report:
    """Speeds in GB/s (10^9 bytes), times in microseconds or as named. None: could not be measured here."""

    memcpy_gbps: float | None = None
    tcp_gbps: float | None = None
    odirect_read_gbps: float | None = None
    odirect_write_gbps: float | None = None
    grpc_load_gbps: float | None = None
    grpc_load_ratio: float | None = None
    grpc_load_cpu_s_per_gb: float | None = None
    grpc_save_gbps: float | None = None
    grpc_save_ratio: float | None = None
    grpc_save_cpu_s_per_gb: float | None = None
    shm_load_gbps: float | None = None
    shm_load_ratio: float | None = None
    shm_save_gbps: float | None = None
    shm_save_ratio: float | None = None
    shm_view_ms_1gib: float | None = None
    ssd_read_gbps: float | None = None
    ssd_read_ratio: float | None = None
    ssd_write_gbps: float | None = None
    ssd_write_ratio: float | None = None
    rpc_empty_us_p50: float | None = None
    lookup_512_us_p50: float | None = None
    lookup_512_ratio: float | None = None
    local_lookup_us_per_key: float | None = None
    index_put_ratio: float | None = None
    index_get_ratio: float | None = None
    settings: dict[str, str] = field(default_factory=dict)  # How each limit was reached.
    spreads: dict[str, float] = field(default_factory=dict)  # How far each limit's measures lay apart.
    attempts: dict[str, int] = field(default_factory=dict)
    date: str = ""
    commit: str = ""
    cpu: str = ""
    command: str = ""

    def as_json(self) -> dict[str, Any]:
        return {name: _rounded(value) for name, value in asdict(self).items()}

    def describe_machine(self, command: str) -> None:
        self.date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        self.commit = _commit()
        self.cpu = _cpu()
        self.command = command

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, figure, budget, and what else there is to know."""
        found = []
        for name, value in self.as_json().items():
            if name in ("settings", "spreads", "attempts", "date", "commit", "cpu", "command"):
                continue
            budget = " ".join(map(str, BUDGETS[name])) if name in BUDGETS else ""
            notes = [self.settings[name]] if name in self.settings else []
            if name in self.spreads:
                notes.append(f"spread {self.spreads[name]:.0%} in round {self.attempts[name]}")
            found.append((name, "not measured here" if value is None else f"{value:g}", budget, ", ".join(notes)))
        return found

    def markdown(self) -> str:
        lines = [
            f"Commit {self.commit}, {self.date}, {self.cpu}. Reproduce with `{self.command}`.",
            "",
            "| Measure | Figure | Budget | Setting and spread |",
            "|---|---|---|---|",
            *(f"| `{name}` | {value} | {budget} | {note} |" for name, value, budget, note in self.rows()),
        ]
        return "\n".join(lines)

    def write_into(self, path: Path) -> None:
        """Replace the part of a Markdown file between the two marks, or append it with them."""
        write_section(path, BEGIN, self.markdown(), END)


def write_section(path: Path, begin: str, markdown: str, end: str) -> None:
    """Replace the part of a Markdown file between two marks, or append it with them."""
    part = f"{begin}\n{markdown}\n{end}"
    text = path.read_text() if path.exists() else "# Benchmarks\n\n"
    marked = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    text = marked.sub(lambda _: part, text) if marked.search(text) else f"{text.rstrip()}\n\n{part}\n"
    path.write_text(text)


def where_and_when() -> str:
    """The commit, the time and the machine, as each section begins with them."""
    return f"Commit {_commit()}, {datetime.now(UTC):%Y-%m-%d %H:%M UTC}, {_cpu()}."


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return f"version {metadata.version('kvservice')}"


def _cpu() -> str:
    model = platform.processor() or platform.machine()
    cores = 0
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model, cores = line.partition(":")[2].strip(), cores + 1
    except OSError:
        pass
    return f"{model}, {cores} cores" if cores else model
