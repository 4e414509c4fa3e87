"""The paper's rule for capacity: the store needs a share of what all sessions of an hour could fill."""

from __future__ import annotations

import heapq

import numpy as np

from benchmarks.policies import Options
from benchmarks.policies.report import Section
from benchmarks.policies.runs import (
    COLUMNS,
    PAPER_SERVICE,
    paper_load,
    paper_machine,
    play,
    row,
    shrunk,
)
from kvservice.simulate.settings import GIB
from kvservice.simulate.workload import Workload

TTL_S = 3600.0
SHARES = (0.05, 0.1, 0.15, 0.25, 0.5)


def measure(options: Options) -> Section:
    load, warmup = paper_load(options.quick)
    scale = shrunk(options.quick)
    kv_bytes = paper_machine(0).kv_bytes_per_token
    distinct = distinct_sessions(load, PAPER_SERVICE, TTL_S, warmup)
    need_gb = distinct * load.context_tokens * kv_bytes / GIB
    section = Section(
        "capacity_rule",
        "How much is enough",
        f"Sessions end after an hour without a request. In an hour {distinct:.0f} distinct sessions have a turn, each "
        f"of at most {load.context_tokens} tokens: together they could fill {need_gb / 1024:.1f} TiB. Both tiers "
        f"together have a share of that; {128 * scale:g} GiB of it is DRAM. The paper reports 51 % at 0.1 and 98 % at "
        "0.25.",
    )
    names = ("lru", "lookahead", "foresight")
    ceiling = play(load, paper_machine(0, session_ttl_s=TTL_S), "infinite", warmup).hit_rate_history
    table, hits = [], {}
    for share in (0.1, 0.25) if options.quick else SHARES:
        ssd_tb = max(need_gb * share - 128 * scale, 0) / 1024
        machine = paper_machine(ssd_tb, 128 * scale, session_ttl_s=TTL_S)
        for name in names:
            result = play(load, machine, name, warmup)
            table.append((f"{share:g}", *row(result)))
            hits[name, share] = 100 * result.hit_rate_history
    section.table("In percent:", ("Share of the rule", *COLUMNS), table)
    for name in ("lookahead", "foresight"):
        section.at_least(f"`{name}`, hits of history at 0.1", hits[name, 0.1], 40, " %")
        section.at_least(
            f"`{name}` at 0.25, share of what an unlimited store reaches", hits[name, 0.25] / ceiling, 95, " %"
        )
    return section


def distinct_sessions(load: Workload, turns_per_s: float, window_s: float, warmup_turns: int) -> float:
    """The mean number of sessions with a turn in a window, if a server takes `turns_per_s` in their order."""
    session, count = load.session, load.turns
    waiting = [(float(load.arrives_s[turn]), turn) for turn in np.flatnonzero(np.diff(session, prepend=-1)).tolist()]
    heapq.heapify(waiting)
    served_s = np.empty(count)
    order = np.empty(count, np.int64)
    free_s = 0.0
    for place in range(count):
        arrives_s, turn = heapq.heappop(waiting)
        free_s = max(free_s, arrives_s) + 1 / turns_per_s
        served_s[place], order[place] = free_s, turn
        following = turn + 1
        if following < count and session[following] == session[turn]:
            heapq.heappush(waiting, (free_s + float(load.think_s[following]), following))
    found = []
    begin_s, end_s = served_s[min(warmup_turns, count - 1)], served_s[-1]
    for low_s in np.arange(begin_s, max(end_s - window_s, begin_s) + 1, window_s / 2):
        inside = (served_s >= low_s) & (served_s < low_s + window_s)
        found.append(len(np.unique(session[order[inside]])))
    return float(np.mean(found))
