"""How fast the simulator is, and how much memory it takes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from benchmarks.policies import Options
from benchmarks.policies.report import Section
from benchmarks.policies.runs import paper_load, paper_machine, shrunk
from benchmarks.policies.shared_prefixes import KV_BYTES, TRACE, first_part
from benchmarks.policies.short_queues import FORMER_PEOPLE, USER_RATE, machine
from kvservice.simulate import traces
from kvservice.simulate.engine import simulate
from kvservice.simulate.generate import people
from kvservice.simulate.plan import footprint_tokens
from kvservice.simulate.settings import GIB, Machine
from kvservice.simulate.workload import Workload

ROUNDS = 3

_MANY = """
import json, resource, sys
from kvservice.simulate.engine import simulate
from benchmarks.policies.short_queues import FORMER_PEOPLE, machine
from kvservice.simulate.generate import people
from kvservice.simulate.settings import GIB
load = people(users=int(sys.argv[1]), user_rate=0.2, **FORMER_PEOPLE)
found = simulate(load, machine(8 * GIB, 0.9), "lru")
peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([load.turns, found.turns_simulated_per_s, peak_bytes]))
"""


def measure(options: Options) -> Section:
    section = Section(
        "speed",
        "The simulator's speed",
        f"CPU time on one core; for `lru` and `foresight` the median of {ROUNDS} rounds. `overload` has thousands of "
        "waiting requests; `people` has a short queue, and DRAM for 10 % of the live set.",
    )
    scale = shrunk(options.quick)
    overload, _ = paper_load(options.quick)
    crowd = people(users=300 if options.quick else 1500, user_rate=USER_RATE, **FORMER_PEOPLE, seed=1)
    where = (
        ("overload", overload, paper_machine(2 * scale, 128 * scale)),
        ("people", crowd, machine(6 * GIB, 0.9)),
    )
    table = []
    for title, load, on in where:
        for name in ("lru", "fifo", "s3fifo", "lookahead", "foresight", "ages-only", "optimum"):
            speed = _turns_per_s(load, on, name, ROUNDS if name in ("lru", "foresight") and not options.quick else 1)
            table.append((title, f"`{name}`", f"{speed:,.0f}"))
            if name in ("lru", "foresight"):
                section.at_least(f"{title}: `{name}`", speed, 30_000 if name == "lru" else 8_000, " turns/s")
    section.table("Turns simulated per second:", ("Load", "Policy", "Turns/s"), table)
    _blocks(section, options)
    users = 5_000 if options.quick else 228_000
    done = subprocess.run([sys.executable, "-c", _MANY, str(users)], capture_output=True, text=True, check=True)
    turns, per_s, peak_bytes = json.loads(done.stdout)
    section.at_most(f"Memory of {turns:,} turns with `lru`", peak_bytes / GIB, 1.0, " GiB")
    section.notes.append(f"The {turns:,} turns of the memory test were simulated at {per_s:,.0f} turns per second.")
    return section


def _turns_per_s(load: Workload, on: Machine, name: str, rounds: int) -> float:
    return load.turns / statistics.median(cpu_s(load, on, name) for _ in range(rounds))


def cpu_s(load: Workload, on: Machine, name: str) -> float:
    """The CPU time of one run, without that of other processes."""
    began_s = time.process_time()
    simulate(load, on, name)
    return time.process_time() - began_s


def _blocks(section: Section, options: Options) -> None:
    if options.traces is None or not (options.traces / TRACE).is_file():
        section.notes.append("Blocks were not measured: there is no trace.")
        return
    load = traces.read(options.traces / TRACE)
    if options.quick:
        load = first_part(load, 2000)
    blocks = int(load.item_blocks[load.path_items].sum())
    footprint = footprint_tokens(load) * KV_BYTES
    on = Machine(round(footprint * 0.05), 0, 5 * GIB, KV_BYTES, service_turns_per_s=20.0)
    section.needs_traces = True
    table = []
    for name in ("lru", "fifo", "s3fifo", "lookahead", "foresight"):
        speed = blocks / cpu_s(load, on, name)
        table.append((f"`{name}`", f"{speed:,.0f}"))
        section.at_least(f"Mooncake: `{name}`", speed, 300_000, " blocks/s")
    section.table("Mooncake's trace, DRAM for 5 % of it: blocks requested per second:", ("Policy", "Blocks/s"), table)
