"""Users with think times between turns, and a server that is fast enough: policies know only return times."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

from benchmarks.policies import Options
from benchmarks.policies.report import Section, percent
from benchmarks.policies.runs import play
from kvservice.simulate import plot
from kvservice.simulate.generate import people
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB, MIB, Machine
from kvservice.simulate.think_times import Shape
from kvservice.simulate.workload import Workload

SHARES = (0.05, 0.1, 0.2, 0.4)  # DRAM, of the live set.
LOADS = (0.5, 0.9)  # Turns that arrive, as a share of those that the server could take.
RIVALS = ("lru", "fifo", "s3fifo", "lookahead")
NAMES = (*RIVALS, "foresight-unlearned", "foresight", "ages-only", "optimum")
USER_RATE, TURNS = 0.2, 22.0
#: People who begin with long prompts, and whose think times depend on nothing. With them, and with all that is on SSD
#: read, the figures of 21 November 2026 were measured.
FORMER_PEOPLE: dict[str, Any] = {"start_tokens": 2000.0, "answer_share": 0.0}
FORMER_OPTIONS = "--start-tokens 2000 --answer-share 0 --always-load"


@dataclass(frozen=True, slots=True)
class Setting:
    """A load, and a machine whose DRAM holds a share of its live set."""

    load: Workload
    warmup_turns: int
    machine: Machine

    @staticmethod
    def of(load: Workload, utilisation: float, share: float) -> Setting:
        warmup = load.turns // 5
        ample = machine(10 * 1024 * GIB, utilisation)
        live_gb = play(load, ample, "infinite", warmup).live_gb_mean
        return Setting(load, warmup, machine(round(live_gb * share * GIB), utilisation))

    def play(self, name: str) -> Result:
        return play(self.load, self.machine, name, self.warmup_turns)


def machine(dram_bytes: int, utilisation: float) -> Machine:
    """Llama-3-8B's KV, 128 KiB per token; an SSD that moves 5 GiB/s and holds everything."""
    return Machine(
        dram_bytes=dram_bytes,
        ssd_bytes=100 * 1024 * GIB,
        ssd_bytes_per_s=5 * GIB,
        kv_bytes_per_token=MIB // 8,
        service_turns_per_s=USER_RATE * TURNS / utilisation,
        always_load=True,
    )


def measure(options: Options) -> Section:
    users = 300 if options.quick else 1000
    seeds = (0,) if options.quick else (0, 1, 2)
    shares = quick_shares(options)
    section = Section(
        "short_queues",
        "Short queues: only return times are known",
        f"{users:,} users of a service ({users * 22:,} turns; gaps of 6/12/18/43/87/140 s at p1/p5/p10/p50/p90/p99), a "
        "server that is fast enough, DRAM for a share of the live set (the KV of all users that are present), an SSD "
        "of 5 GiB/s with space for everything. The figures are the share of turns with history whose KV is in DRAM "
        f"on time, in percent, as a mean of {len(seeds)} seeds (`optimum`: one seed).",
    )
    curves: dict[float, dict[str, list[Result]]] = {}
    for utilisation in LOADS:
        table = []
        curves[utilisation] = {name: [] for name in NAMES}
        for share in shares:
            found: dict[str, list[Result]] = {name: [] for name in NAMES}
            for seed in seeds:
                setting = Setting.of(_people(users, "people", seed), utilisation, share)
                for name in NAMES:
                    if seed == seeds[0] or name != "optimum":  # It is the slowest, and has no goal here.
                        found[name].append(setting.play(name))
            for name in NAMES:
                curves[utilisation][name].append(found[name][0])
            table.append((f"{share:.0%}", *(percent(_on_time(found[name])) for name in NAMES), _written(found)))
            _judge(
                section, f"{utilisation:g} of capacity, DRAM {share:.0%}", found, factor=2.0 if share < 0.4 else None
            )
        columns = ("DRAM", *(f"`{name}`" for name in NAMES), "Written: `foresight` / `lru`")
        section.table(f"At {utilisation:g} of the server's capacity:", columns, table)
    _other_shapes(section, users)
    section.notes.append(
        "A queue of a few requests also shows the future, and the SSD reads one of these sessions in 0.06 s. So "
        "`lookahead` has many sessions in DRAM on time. The bound does not see the queue, so policies that see it "
        "are above the bound."
    )
    section.commands = [
        f"kvctl simulate --trace people --sessions {users} --session-rate {USER_RATE:g} --policy "
        "lru,lookahead,foresight,"
        f"ages-only,optimum --dram-gb 6 --ssd-gb 102400 --kv-mb-per-token 0.125 "
        f"--service-turns-per-s {USER_RATE * TURNS / 0.5:g} --warmup-turns {users * 4} {FORMER_OPTIONS}"
    ]
    if options.pictures is not None:
        section.pictures = ["policies-short-queues.svg"]
        panels = [
            (
                f"in DRAM on time, server at {utilisation:g}",
                [(n, [r.dram_on_time for r in rs]) for n, rs in lines.items()],
            )
            for utilisation, lines in curves.items()
        ]
        x = [100 * share for share in shares]
        plot.draw(options.pictures / section.pictures[0], panels, x, "DRAM, % of the live set", "Short queues")
    return section


def quick_shares(options: Options) -> tuple[float, ...]:
    return (0.1, 0.4) if options.quick else SHARES


def _other_shapes(section: Section, users: int) -> None:
    """Other users: gaps of other distributions, users with a pace of their own, and gaps that follow answer lengths."""
    kinds = {
        "lognormal": _people(users, "lognormal", 7),
        "exponential (nothing to learn)": _people(users, "exponential", 7),
        "bimodal": _people(users, "bimodal", 7),
        "own paces": people(users=users, user_rate=USER_RATE, **FORMER_PEOPLE, pace_sigma=0.5, seed=7),
        "longer after long answers": people(
            users=users, user_rate=USER_RATE, **FORMER_PEOPLE, answer_power=0.5, seed=7
        ),
    }
    table = []
    for kind, load in kinds.items():
        setting = Setting.of(load, 0.7, 0.2)
        found = {name: [setting.play(name)] for name in NAMES}
        table.append((kind, *(percent(_on_time(found[name])) for name in NAMES), _written(found)))
        part = _on_time(found["foresight"]) / _on_time(found["ages-only"])
        section.at_least(f"{kind}, DRAM 20%: `foresight`, of the bound", part, 0.9)
    columns = ("Gaps", *(f"`{name}`" for name in NAMES), "Written: `foresight` / `lru`")
    section.table("Other distributions of gaps, at 0.7 of the server's capacity, DRAM 20 %:", columns, table)


@cache
def _people(users: int, shape: Shape, seed: int) -> Workload:
    return people(users=users, user_rate=USER_RATE, **FORMER_PEOPLE, shape=shape, seed=seed)


def _on_time(results: list[Result]) -> float:
    return fmean(each.dram_on_time for each in results)


def _written(found: dict[str, list[Result]]) -> str:
    ours, theirs = (fmean(each.ssd_written_gb for each in found[name]) for name in ("foresight", "lru"))
    return f"{ours / theirs:.2f}" if theirs else "-"


def _judge(section: Section, where: str, found: dict[str, list[Result]], factor: float | None) -> None:
    ours, bound = _on_time(found["foresight"]), _on_time(found["ages-only"])
    best = max(_on_time(found[name]) for name in RIVALS)
    section.at_least(f"{where}: `foresight`, of the bound", ours / bound, 0.9)
    if factor is not None:
        section.at_least(f"{where}: `foresight`, times the best of the others", ours / best, factor)
    section.at_least(
        f"{where}: gain from learning", 100 * (ours - _on_time(found["foresight-unlearned"])), 10, " points"
    )
    written = [fmean(each.ssd_written_gb for each in found[name]) for name in ("foresight", "lru")]
    section.at_most(f"{where}: written to SSD, of what `lru` writes", round(written[0] / written[1], 3), 1.0)
