"""The paper's overload: more turns arrive than are served, so the queue shows the future."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.policies import Options
from benchmarks.policies.report import Section
from benchmarks.policies.runs import (
    BOUNDS,
    COLUMNS,
    POLICIES,
    on_time_of_hits,
    paper_load,
    paper_machine,
    play_all,
    points,
    row,
    rows,
    shrunk,
)
from kvservice.simulate import plot
from kvservice.simulate.settings import GIB

SSD_TB = (2.0, 4.0, 10.0)


def measure(options: Options) -> Section:
    load, warmup = paper_load(options.quick)
    scale = shrunk(options.quick)
    section = Section(
        "overload",
        "Overload: the queue shows the future",
        f"{load.sessions:,} conversations, one per second, at 1.9 turns per second ({load.turns:,} turns, "
        f"{warmup:,} of them to warm up); {128 * scale:g} GiB of DRAM, an SSD that moves 5 GiB/s, 0.78 MiB of KV per "
        "token.",
    )
    found = {}
    for ssd_tb in SSD_TB:
        machine = paper_machine(ssd_tb * scale, 128 * scale)
        found[ssd_tb] = play_all(load, machine, (*POLICIES, *BOUNDS), warmup)
        section.table(f"{ssd_tb * scale:g} TiB of SSD, shares in percent:", COLUMNS, rows(found[ssd_tb]))
    limited = found[2.0]
    ahead = limited["lookahead"].hit_rate
    section.at_least(
        f"`lookahead` over `lru`, {2 * scale:g} TiB, hits of all turns",
        points(ahead, limited["lru"].hit_rate),
        27,
        " points",
    )
    section.at_least(
        f"`lookahead` over `fifo`, {2 * scale:g} TiB", points(ahead, limited["fifo"].hit_rate), 31, " points"
    )
    section.at_least(
        "`lookahead`'s hits in DRAM on time, least of the three",
        100 * min(on_time_of_hits(each["lookahead"]) for each in found.values()),
        99,
        " %",
    )
    section.at_most(
        "DRAM hits of `lru` and `fifo`, most of the three",
        100 * max(each[name].dram_on_time for each in found.values() for name in ("lru", "fifo")),
        2,
        " %",
    )
    for ssd_tb, each in found.items():
        gained = points(each["foresight"].hit_rate, each["lookahead"].hit_rate)
        section.at_least(f"`foresight` over `lookahead`, {ssd_tb * scale:g} TiB, hits", gained, -1, " points")
        gained = points(each["foresight"].dram_on_time, each["lookahead"].dram_on_time)
        section.at_least(f"`foresight` over `lookahead`, {ssd_tb * scale:g} TiB, on time", gained, -1, " points")
    section.at_least(
        "`optimum` over the best policy, hits, least of the three",
        min(points(each["optimum"].hit_rate, max(each[name].hit_rate for name in POLICIES)) for each in found.values()),
        0,
        " points",
    )
    table = []
    for gbps in (4.0, 5.0, 6.0):
        machine = replace(paper_machine(10 * scale, 128 * scale), ssd_bytes_per_s=gbps * GIB)
        played = play_all(load, machine, ("lookahead", "foresight"), warmup)
        table += [(f"{gbps:g}", *row(result)) for result in played.values()]
    section.table(f"Bandwidth, {10 * scale:g} TiB of SSD:", ("GiB/s", *COLUMNS), table)
    section.commands = [
        f"kvctl simulate --trace sharegpt --sessions {load.sessions} --policy lookahead,lru,fifo,foresight,optimum "
        f"--dram-gb {128 * scale:g} --ssd-gb {2048 * scale:g} --ssd-gbps 5 --kv-mb-per-token 0.78125 "
        f"--service-turns-per-s 1.9 --warmup-turns {warmup} --always-load --blocking-loads"
    ]
    if options.pictures is not None:
        lines = [(name, [each[name] for each in found.values()]) for name in (*POLICIES, "optimum")]
        section.pictures = ["policies-overload.svg"]
        capacities = [ssd_tb * 1024 * scale for ssd_tb in found]
        picture, title = options.pictures / section.pictures[0], "Overload, 1.9 turns per second"
        plot.against_capacity(picture, lines, capacities, tier="ssd", title=title)
    return section
