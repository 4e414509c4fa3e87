"""What each tier is worth."""

from __future__ import annotations

from benchmarks.policies import Options
from benchmarks.policies.report import Section
from benchmarks.policies.runs import COLUMNS, paper_load, paper_machine, play_all, row, shrunk

MACHINES = (("10 GiB, as GPU memory alone would have", 10, 0.0), ("DRAM alone", 128, 0.0), ("DRAM and SSD", 128, 10.0))


def measure(options: Options) -> Section:
    load, warmup = paper_load(options.quick)
    scale = shrunk(options.quick)
    section = Section(
        "tiers",
        "What each tier is worth",
        f"The load of the overload, on three machines: 10 GiB of memory, {128 * scale:g} GiB of DRAM without an SSD, "
        f"and the same DRAM with {10 * scale:g} TiB of SSD.",
    )
    table, hits = [], {}
    for title, dram_gb, ssd_tb in MACHINES:
        machine = paper_machine(ssd_tb * scale, dram_gb * scale)
        for name, result in play_all(load, machine, ("lru", "lookahead", "foresight"), warmup).items():
            table.append((title, *row(result)))
            hits[title, name] = 100 * result.hit_rate
    section.table("In percent:", ("Tiers", *COLUMNS), table)
    small, dram, both = (title for title, _, _ in MACHINES)
    section.at_most("`lookahead`, 10 GiB, hits of all turns", hits[small, "lookahead"], 2, " %")
    section.at_most("`lookahead`, DRAM alone", hits[dram, "lookahead"], 10, " %")
    section.at_least("`lookahead`, DRAM and SSD", hits[both, "lookahead"], 80, " %")
    return section
