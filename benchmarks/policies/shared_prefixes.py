"""Prompts that share prefixes, counted in blocks: Mooncake's trace of conversations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.policies import Options
from benchmarks.policies.report import Section, percent
from benchmarks.policies.runs import play
from kvservice.simulate import plot, traces
from kvservice.simulate.plan import footprint_tokens
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.workload import Workload

TRACE = "mooncake_conversation_trace.jsonl"
SHARES = (0.01, 0.05, 0.2, 1.0)  # DRAM as a share of the footprint.
POLICIES = ("lru", "fifo", "s3fifo", "lookahead", "foresight")
KV_BYTES = MIB // 8  # Per token of Llama-3-8B.


def measure(options: Options) -> Section | None:
    if options.traces is None or not (options.traces / TRACE).is_file():
        return None
    load = traces.read(options.traces / TRACE)
    if options.quick:
        load = first_part(load, 2000)
    footprint = footprint_tokens(load) * KV_BYTES
    section = Section(
        "shared_prefixes",
        "Shared prefixes, per block",
        f"Mooncake's conversation trace: {load.turns:,} requests, blocks of {load.block_tokens} tokens, "
        f"{footprint / GIB:,.0f} GiB of KV in all (128 KiB per token). DRAM has space for a share of that, and there "
        "is no SSD. The figures are hit blocks as a share of all requested blocks, in percent. A path's hits end at "
        "its first missing block.",
        needs_traces=True,
    )
    table = []
    curves: dict[str, list[Result]] = {name: [] for name in (*POLICIES, "optimum")}
    for share in SHARES:
        machine = Machine(
            dram_bytes=round(footprint * share),
            ssd_bytes=0,
            ssd_bytes_per_s=5 * GIB,
            kv_bytes_per_token=KV_BYTES,
            service_turns_per_s=20.0,
        )
        found = {name: play(load, machine, name, 0) for name in (*POLICIES, "optimum", "infinite")}
        table.append((f"{share:.0%}", *(percent(each.hit_rate) for each in found.values())))
        for name, results in curves.items():
            results.append(found[name])
        best = max(found[name].hit_rate for name in POLICIES if name != "foresight")
        ours = 100 * (found["foresight"].hit_rate - best)
        section.at_least(f"DRAM {share:.0%}: `foresight` over the best of the others", ours, -1, " points")
        most = max(found[name].hit_rate for name in POLICIES)
        section.at_least(
            f"DRAM {share:.0%}: `optimum` over the best", 100 * (found["optimum"].hit_rate - most), 0, " points"
        )
    section.table("", ("DRAM", *(f"`{name}`" for name in (*POLICIES, "optimum", "infinite"))), table)
    if options.pictures is not None:
        section.pictures = ["policies-shared-prefixes.svg"]
        panels = [("blocks found, of all", [(name, [each.hit_rate for each in rs]) for name, rs in curves.items()])]
        x = [100 * share for share in SHARES]
        plot.draw(options.pictures / section.pictures[0], panels, x, "DRAM, % of the footprint", load.name)
    return section


def first_part(load: Workload, turns: int) -> Workload:
    """The first requests of a trace with shared prefixes."""
    turns = min(turns, load.turns)
    ends = int(load.path_begins[turns])
    items = load.path_items[:ends]
    _, numbers = np.unique(items, return_inverse=True)
    return replace(
        load,
        session=load.session[:turns],
        arrives_s=load.arrives_s[:turns],
        think_s=load.think_s[:turns],
        new_tokens=load.new_tokens[:turns],
        output_tokens=load.output_tokens[:turns],
        path_begins=load.path_begins[: turns + 1],
        path_items=numbers.astype(np.int32),
        item_blocks=load.item_blocks[np.unique(items)],
    )
