"""The distance of policies from a policy that knows the future, with deep, short and empty queues."""

from __future__ import annotations

from benchmarks.policies import Options
from benchmarks.policies.report import Section, percent
from benchmarks.policies.runs import POLICIES, paper_load, paper_machine, play_all, points, shrunk

SERVICE = (1.9, 5.2, 20.0)


def measure(options: Options) -> Section:
    load, warmup = paper_load(options.quick)
    scale = shrunk(options.quick)
    section = Section(
        "optimum_gap",
        "The distance to the optimum",
        "The same load and sizes, on servers of three speeds: overloaded (1.9 turns per second), almost fast enough "
        "(5.2), and without a queue (20). `optimum` has the same tiers and bandwidth and knows every future request.",
    )
    names = (*POLICIES, "optimum")
    table = []
    for service in SERVICE:
        for ssd_tb in (2.0, 4.0, 10.0) if service == SERVICE[0] else (10.0,):
            machine = paper_machine(ssd_tb * scale, 128 * scale, service_turns_per_s=service)
            found = play_all(load, machine, names, warmup)
            where = f"{service:g} / {ssd_tb * scale:g}"
            for what in ("hit_rate", "dram_on_time"):
                table.append((where, what, *(percent(getattr(found[name], what)) for name in names)))
                if service == SERVICE[0]:
                    for name in ("lookahead", "foresight"):
                        gap = points(getattr(found["optimum"], what), getattr(found[name], what))
                        at = f"`{what}`, {ssd_tb * scale:g} TiB"
                        section.at_most(f"`{name}` below `optimum`, {at}", gap, 3, " points")
    section.table("In percent:", ("Turns/s / SSD (TiB)", "", *(f"`{name}`" for name in names)), table)
    section.notes.append(
        "With an empty queue `lookahead` sees no request. It treats all sessions as sessions without a request, "
        "and its promotions begin when the server starts the request."
    )
    return section
