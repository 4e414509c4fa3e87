"""All measures of one run, as one flat object for programs and as a table for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.report import commit, cpu, markdown_table, now, write_section

SECTION = "kvctl bench"

BUDGETS: dict[str, tuple[str, float]] = {
    "bulk_load_ratio": ("at least", 0.85),
    "bulk_save_ratio": ("at least", 0.85),
    "bulk_tls_load_ratio": ("at least", 0.80),
    "grpc_load_ratio": ("at least", 0.35),
    "grpc_save_ratio": ("at least", 0.30),
    "shm_load_ratio": ("at least", 0.85),
    "shm_save_ratio": ("at least", 0.80),
    "shm_view_ms_1gib": ("under", 5),
    "ssd_read_ratio": ("at least", 0.85),
    "ssd_write_ratio": ("at least", 0.80),
    "cold_first_layer_ratio": ("at most", 1.5),
    "bulk_cold_first_layer_ratio": ("at most", 1.5),
    "grpc_cold_first_layer_ratio": ("at most", 1.5),
    "lookup_512_ratio": ("at most", 1.5),
    "local_lookup_us_per_key": ("at most", 5.0),
    "index_put_ratio": ("at least", 0.70),
    "index_get_ratio": ("at least", 0.70),
}


@dataclass(slots=True)
class Report:
    """Speeds in GB/s (10^9 bytes), times in microseconds or as named. None: see `not_measured`."""

    memcpy_gbps: float | None = None
    tcp_gbps: float | None = None
    tcp_memory_gbps: float | None = None
    odirect_read_gbps: float | None = None
    odirect_write_gbps: float | None = None
    tls_gbps: float | None = None
    bulk_load_gbps: float | None = None
    bulk_load_ratio: float | None = None
    bulk_load_cpu_s_per_gb: float | None = None
    bulk_save_gbps: float | None = None
    bulk_save_ratio: float | None = None
    bulk_save_cpu_s_per_gb: float | None = None
    bulk_first_layer_us_p50: float | None = None
    bulk_tls_load_gbps: float | None = None
    bulk_tls_load_ratio: float | None = None
    bulk_tls_load_cpu_s_per_gb: float | None = None
    grpc_load_gbps: float | None = None
    grpc_load_ratio: float | None = None
    grpc_load_cpu_s_per_gb: float | None = None
    grpc_save_gbps: float | None = None
    grpc_save_ratio: float | None = None
    grpc_save_cpu_s_per_gb: float | None = None
    grpc_first_layer_us_p50: float | None = None
    shm_load_gbps: float | None = None
    shm_load_ratio: float | None = None
    shm_save_gbps: float | None = None
    shm_save_ratio: float | None = None
    shm_view_ms_1gib: float | None = None
    hit_256_us_p50: float | None = None
    hit_256_copy_us_p50: float | None = None
    ssd_read_gbps: float | None = None
    ssd_read_ratio: float | None = None
    ssd_write_gbps: float | None = None
    ssd_write_ratio: float | None = None
    cold_first_layer_ms: float | None = None
    cold_first_layer_ratio: float | None = None
    bulk_cold_first_layer_ratio: float | None = None
    grpc_cold_first_layer_ratio: float | None = None
    rpc_empty_us_p50: float | None = None
    lookup_512_us_p50: float | None = None
    lookup_512_ratio: float | None = None
    local_lookup_us_per_key: float | None = None
    index_put_ratio: float | None = None
    index_get_ratio: float | None = None
    settings: dict[str, str] = field(default_factory=dict)  # How each limit was reached.
    spreads: dict[str, float] = field(default_factory=dict)  # The difference of each limit's two measures.
    attempts: dict[str, int] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)  # Why a figure is None.
    date: str = ""
    commit: str = ""
    cpu: str = ""
    command: str = ""

    def as_json(self) -> dict[str, Any]:
        return {name: _rounded(value) for name, value in asdict(self).items()}

    def explain(self, beginnings: Iterable[str], why: str) -> None:
        """Why the figures whose names begin so have no value, those that have none."""
        for name in (each.name for each in fields(self)):
            if name.startswith(tuple(beginnings)) and getattr(self, name) is None:
                self.not_measured[name] = " ".join(why.split())

    def describe_machine(self, command: str) -> None:
        self.date = now()
        self.commit = commit()
        self.cpu = cpu()
        self.command = command

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Name, figure, budget, and remarks."""
        found = []
        for name, value in self.as_json().items():
            if name in ("settings", "spreads", "attempts", "not_measured", "date", "commit", "cpu", "command"):
                continue
            budget = " ".join(map(str, BUDGETS[name])) if name in BUDGETS else ""
            notes = [self.settings[name]] if name in self.settings else []
            if name in self.spreads:
                notes.append(f"spread {self.spreads[name]:.0%} in round {self.attempts[name]}")
            if name in self.not_measured:
                notes.append(self.not_measured[name])
            found.append((name, "not measured here" if value is None else f"{value:g}", budget, ", ".join(notes)))
        return found

    def markdown(self) -> str:
        head = f"Commit {self.commit}, {self.date}, {self.cpu}. Reproduce with `{self.command}`."
        rows = [(f"`{name}`", *others) for name, *others in self.rows()]
        return "\n".join([head, "", *markdown_table(("Measure", "Figure", "Budget", "Setting and spread"), rows)])

    def write_into(self, path: Path) -> None:
        """Replace the section of this benchmark in a Markdown page, or append it."""
        write_section(path, SECTION, self.markdown())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value
