"""The same users and a server without a queue: policies know only return times, as in the fluid calculation."""

from __future__ import annotations

from benchmarks.policies import Options
from benchmarks.policies.report import Section, percent
from benchmarks.policies.short_queues import FORMER_PEOPLE, NAMES, RIVALS, SHARES, USER_RATE, Setting
from kvservice.simulate.generate import people

UTILISATION = 0.001
#: A fluid calculation on the real gaps, in percent: LRU, and the bound by the distribution of return times.
FLUID = {0.05: (0.1, 10.0), 0.1: (0.4, 19.0), 0.2: (3.0, 37.0), 0.4: (14.0, 66.0)}


def measure(options: Options) -> Section:
    users = 300 if options.quick else 1000
    section = Section(
        "no_queue",
        "No queue: only return times are known",
        f"The {users:,} users of the section before, and a server that is a thousand times as fast as their requests. "
        "Turns with history in DRAM on time, in percent. A fluid calculation with the same gaps gives the values for "
        "LRU and the bound.",
    )
    load = people(users=users, user_rate=USER_RATE, **FORMER_PEOPLE, seed=0)
    table = []
    for share in SHARES:
        setting = Setting.of(load, UTILISATION, share)
        found = {name: setting.play(name) for name in NAMES}
        on_time = {name: each.dram_on_time for name, each in found.items()}
        table.append(
            (f"{share:.0%}", *(percent(on_time[name]) for name in NAMES), *(f"{each:g}" for each in FLUID[share]))
        )
        best = max(on_time[name] for name in RIVALS)
        where = f"DRAM {share:.0%}"
        section.at_least(f"{where}: `foresight`, of the bound", on_time["foresight"] / on_time["ages-only"], 0.9)
        if share < 0.4:
            section.at_least(f"{where}: `foresight`, times the best of the others", on_time["foresight"] / best, 2.0)
        worth = 100 * (on_time["foresight"] - on_time["foresight-unlearned"])
        section.at_least(f"{where}: gain from learning", worth, 10, " points")
        written = round(found["foresight"].ssd_written_gb / found["lru"].ssd_written_gb, 3)
        section.at_most(f"{where}: written to SSD, of what `lru` writes", written, 1.0)
    section.table(
        "",
        ("DRAM", *(f"`{name}`" for name in NAMES), "Fluid: LRU", "Fluid: bound"),
        table,
    )
    return section
