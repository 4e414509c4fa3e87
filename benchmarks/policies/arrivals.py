"""More and fewer sessions per second."""

from __future__ import annotations

from benchmarks.policies import Options
from benchmarks.policies.report import Section
from benchmarks.policies.runs import COLUMNS, paper_load, paper_machine, play, points, row, shrunk

RATES = (0.5, 1.0, 1.5, 2.0)
NAMES = ("lru", "lookahead", "foresight")


def measure(options: Options) -> Section:
    scale = shrunk(options.quick)
    section = Section(
        "arrivals",
        "Arrivals",
        f"0.5 to 2 sessions per second, {10 * scale:g} TiB of SSD: at 1.9 turns per second, which is overload "
        "throughout, and at 20, "
        "where there is no queue.",
    )
    rates = (0.5, 2.0) if options.quick else RATES
    hits: dict[tuple[str, float], float] = {}
    for service in (1.9, 20.0):
        table = []
        for rate in rates:
            load, warmup = paper_load(options.quick, rate)
            machine = paper_machine(10 * scale, 128 * scale, service_turns_per_s=service)
            for name in NAMES:
                result = play(load, machine, name, warmup)
                table.append((f"{rate:g}", *row(result)))
                if service == 1.9:
                    hits[name, rate] = result.hit_rate
        section.table(f"{service:g} turns per second, in percent:", ("Sessions/s", *COLUMNS), table)
    for name in ("lookahead", "foresight"):
        worst = max(points(hits[name, 0.5], hits[name, rate]) for rate in rates)
        section.at_most(f"`{name}`, hits lost from 0.5 to 2 sessions per second, in overload", worst, 8, " points")
    return section
