"""The goals of `foresight` in seconds, bytes and GPU time: worst values over loads, sizes of DRAM, and seeds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import fmean
from typing import NamedTuple

import numpy as np

from benchmarks.policies import Options
from benchmarks.policies.report import Section, percent
from benchmarks.policies.runs import paper_load, paper_machine, play
from benchmarks.policies.shared_prefixes import KV_BYTES, TRACE
from benchmarks.policies.speed import cpu_s
from kvservice.policy import PLACEMENTS
from kvservice.simulate import traces
from kvservice.simulate.engine import simulate
from kvservice.simulate.generate import people
from kvservice.simulate.plan import footprint_tokens
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.workload import Hints, Workload

USER_RATE = 0.2  # 4.4 turns per second, of which each needs 1.8 s of a place of the batch.
BATCH = {"0.5": 16, "0.9": 9, "overload": 6}  # Of the server's load: places of the batch. Overload is 1.3.
KV_MIB = {"GQA": 0.125, "13B": 0.78125}
SHARES = (0.05, 0.2, 0.4)  # DRAM, of the live set.
FALSE_HINTS = 0.6
NAMES = ("none", "lru", "foresight", "ages-and-answers", "infinite")
#: Hits of `lookahead` in a tenth of the paper's overload by TiB of SSD in the whole, in percent, at commit 9d06c87.
LOOKAHEAD_WAS = {2.0: 47.19, 4.0: 78.37, 10.0: 88.25}

Figure = Callable[[Result], float]
FIGURES: tuple[tuple[str, Figure], ...] = (
    ("mean TTFT", lambda result: result.ttft_mean_s),
    ("mean TTFT from the turn", lambda result: result.service_ttft_mean_s),
    ("p99 of TTFT from the turn", lambda result: result.service_ttft_p99_s),
    ("GPU seconds", lambda result: result.gpu_hours),
)


class Case(NamedTuple):
    """One setting; its runs of all seeds are averaged."""

    size: str
    load: str
    share: float
    ssd: bool
    hints: bool = False


Found = dict[Case, dict[str, list[Result]]]


def measure(options: Options) -> Section:
    users, seeds = (150, (0,)) if options.quick else (300, (0,))
    shares = (0.2,) if options.quick else SHARES
    cases = [Case(*each) for each in itertools.product(KV_MIB, BATCH, shares, (True, False))]
    cases += [Case(size, load, 0.2, True, hints=True) for size in KV_MIB for load in ("0.5", "0.9")]
    section = Section(
        "goals",
        "The goals",
        f"{users} users arrive in {users / USER_RATE:,.0f} s, as at the service, and the load ends when the last has "
        "arrived, as a trace does. GQA is 0.125 MiB of KV per token, 13B 0.78125 MiB. Load 0.5 and 0.9 are batches of "
        f"{BATCH['0.5']} and {BATCH['0.9']} places, overload is one of {BATCH['overload']} (1.3 of what it can take). "
        f"DRAM has {', '.join(f'{share:.0%}' for share in shares)} of the live set; an SSD of 5 GiB/s has space for "
        f"everything, or there is none. The first 40 % of the turns are the warm-up. Figures are means of {len(seeds)} "
        "seeds, and the worst of the sizes of DRAM.",
    )
    found: Found = {case: {} for case in cases}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        done = pool.map(_play, *zip(*itertools.product(cases, seeds, (users,)), strict=True))
        for (case, _), results in zip(itertools.product(cases, seeds), done, strict=True):
            for name, result in results.items():
                found[case].setdefault(name, []).append(result)
    _judge(section, found)
    load, warmup = paper_load(quick=True)
    for tib, was in LOOKAHEAD_WAS.items():
        away = abs(100 * play(load, paper_machine(0.1 * tib, 12.8), "lookahead", warmup).hit_rate - was)
        where = f"a tenth of the paper's overload, {0.1 * tib:g} TiB"
        section.at_most(f"`lookahead` in {where}: hits, away from before", away, 1, " points")
    _blocks(section, options)
    crowd = workload(users, 9, hints=False)
    on = _machine(Case("GQA", "0.5", 0.1, True), 3.0)
    section.at_least("Speed: `foresight`, sessions", crowd.turns / cpu_s(crowd, on, "foresight"), 8000, " turns/s")
    section.notes.append(
        f"`lru` on the same sessions: {crowd.turns / cpu_s(crowd, on, 'lru'):,.0f} turns per CPU second."
    )
    section.table("With SSD and alone, DRAM for 20 %, first seed:", COLUMNS, _rows(found))
    return section


def workload(users: int, seed: int, hints: bool) -> Workload:
    """People that come and go for as long as they arrive: the turns after that are cut off, and their hints."""
    lead_s = (2.0, 5.0) if hints else None
    whole = people(
        users=users, user_rate=USER_RATE, typing_lead_s=lead_s, false_hints=FALSE_HINTS if hints else 0.0, seed=seed
    )
    firsts = np.flatnonzero(np.diff(whole.session, prepend=-1))
    counts = np.diff(np.append(firsts, whole.turns))
    decode_s = np.concatenate([[0.0], whole.output_tokens[:-1] / Machine(0, 0, 1.0, 1).decode_tokens_per_s])
    passed_s = np.cumsum(whole.think_s + decode_s)
    begins_s = passed_s - np.repeat(passed_s[firsts], counts) + np.repeat(whole.arrives_s[firsts], counts)
    kept = begins_s < users / USER_RATE
    number = np.cumsum(kept) - 1
    turn = np.where(whole.hints.turn >= 0, whole.hints.turn, -whole.hints.turn - 1)
    here = kept[turn] if len(turn) else np.empty(0, np.bool_)
    turn = number[turn[here]]
    return replace(
        whole,
        session=whole.session[kept],
        arrives_s=whole.arrives_s[kept],
        think_s=whole.think_s[kept],
        new_tokens=whole.new_tokens[kept],
        output_tokens=whole.output_tokens[kept],
        hints=Hints(
            np.where(whole.hints.turn[here] >= 0, turn, -turn - 1), whole.hints.kind[here], whole.hints.lead_s[here]
        ),
    )


def _machine(case: Case, dram_gb: float) -> Machine:
    return Machine(
        dram_bytes=round(dram_gb * GIB),
        ssd_bytes=10 * 1024 * GIB if case.ssd else 0,
        ssd_bytes_per_s=5 * GIB,
        kv_bytes_per_token=round(KV_MIB[case.size] * MIB),
        batch=BATCH[case.load],
    )


def _play(case: Case, seed: int, users: int) -> dict[str, Result]:
    load = workload(users, seed, case.hints)
    warmup = load.turns * 2 // 5
    endless = simulate(load, _machine(case, 10 * 1024), "infinite", warmup_turns=warmup)
    on = _machine(case, case.share * endless.live_gb_mean)
    names = ("lru", "foresight") if case.hints else NAMES[:-1]
    return {**{name: simulate(load, on, name, warmup_turns=warmup) for name in names}, "infinite": endless}


def _judge(section: Section, found: Found) -> None:
    for size, load, ssd in itertools.product(KV_MIB, BATCH, (True, False)):
        cases = [case for case in found if case[:2] == (size, load) and case.ssd == ssd and not case.hints]
        where = f"{size}, {load}, {'with SSD' if ssd else 'DRAM alone'}"
        for other in ("none", "lru"):
            worst, what = max((_times(found, cases, other, figure), what) for what, figure in FIGURES)
            section.at_most(f"{where}: worst of four figures, times `{other}`'s ({what})", _rounded(worst), 1.0)
        for what, figure in FIGURES[1:3]:
            bound = _times(found, cases, "ages-and-answers", figure)
            section.at_most(f"{where}: {what}, times the bound's", _rounded(bound), 1.3)
        if ssd:
            section.at_most(
                f"{where}: read, times `lru`'s", _rounded(_times(found, cases, "lru", lambda each: each.read_gb)), 1.25
            )
            written = _times(found, cases, "lru", lambda each: each.ssd_written_gb)
            section.at_most(f"{where}: written, times `lru`'s", round(written, 2), 1.0)
        else:
            saved = [_saved(found[case]) for case in cases if case.share == 0.2]
            section.at_least(f"{where}, 20 %: GPU time saved, of what endless DRAM saves", min(saved), 30, " %")
    for case in found:
        if case.hints:
            read = _times(found, [case], "lru", lambda each: each.read_gb)
            section.at_most(
                f"{case.size}, {case.load}, {FALSE_HINTS:.0%} false hints: read, times `lru`'s", _rounded(read), 1.5
            )


def _times(found: Found, cases: Iterable[Case], other: str, figure: Figure) -> float:
    return max(
        fmean(map(figure, found[case]["foresight"])) / max(fmean(map(figure, found[case][other])), 1e-12)
        for case in cases
    )


def _rounded(value: float) -> float:
    return round(value, 3)


def _saved(results: dict[str, list[Result]]) -> float:
    none, ours, endless = (
        fmean(each.gpu_hours for each in results[name]) for name in ("none", "foresight", "infinite")
    )
    return 100 * (none - ours) / (none - endless)


COLUMNS = (
    "Size", "Load", "SSD", "Policy", "On time", "TTFT (ms)", "From the turn", "p99", "GPU (h)", "Read (GiB)", "Unused",
    "Written",
)  # fmt: skip


def _rows(found: Found) -> list[tuple[str, ...]]:
    rows = []
    for case, results in found.items():
        if case.share == 0.2:
            where = case.size, case.load, "false hints" if case.hints else "yes" if case.ssd else "no"
            for name, each in ((name, each[0]) for name, each in results.items()):
                times = (each.ttft_mean_s, each.service_ttft_mean_s, each.service_ttft_p99_s)
                bytes_ = (each.read_gb, each.promoted_unused_gb, each.ssd_written_gb)
                rows.append(
                    (
                        *where,
                        f"`{name}`",
                        percent(each.dram_on_time),
                        *(f"{1000 * time_s:.0f}" for time_s in times),
                        f"{each.gpu_hours:.3f}",
                        *(f"{size_gb:.0f}" for size_gb in bytes_),
                    )
                )
    return rows


def _blocks(section: Section, options: Options) -> None:
    if options.traces is None or not (options.traces / TRACE).is_file():
        section.notes.append("Blocks were not measured: there is no trace.")
        return
    section.needs_traces = True
    load = traces.read(options.traces / TRACE)
    footprint = footprint_tokens(load) * KV_BYTES
    for share in (0.01, 0.05, 0.2, 1.0):
        on = Machine(round(footprint * share), 0, 5 * GIB, KV_BYTES, service_turns_per_s=20.0)
        ours, theirs = (play(load, on, name, 0).hit_rate for name in ("foresight", "lru"))
        section.at_least(
            f"Blocks, DRAM {share:.0%} of all: `foresight` over `lru`", 100 * (ours - theirs), 0, " points"
        )
    blocks = int(load.item_blocks[load.path_items].sum())
    on = Machine(round(footprint * 0.05), 0, 5 * GIB, KV_BYTES, service_turns_per_s=20.0)
    for name in PLACEMENTS:
        if name != "foresight-unlearned":
            section.at_least(f"Speed: `{name}`, blocks", blocks / cpu_s(load, on, name), 300_000, " blocks/s")
