"""The cost if positions are coupled to keys: a conversation that outgrows its window loses its KV."""

from __future__ import annotations

from benchmarks.policies import Options
from benchmarks.policies.report import Section
from benchmarks.policies.runs import COLUMNS, paper_load, paper_machine, play, points, row, shrunk

#: Title, KV (MiB a token), window, turns per second, SSD (TiB), hits that may be lost. A model with five times the
#: weights takes 2.5 times as long for a turn on twice the GPUs.
MODELS = (
    ("13B, a window of 4,096", 0.78125, 4096, 1.9, 10.0, (15, 20)),
    ("65B, a window of 2,048", 2.5, 2048, 0.76, 10.0, (35, 45)),
    ("65B, an SSD for everything", 2.5, 2048, 0.76, 100.0, (35, 45)),
)


def measure(options: Options) -> Section:
    scale = shrunk(options.quick)
    section = Section(
        "overflow",
        "Conversations that outgrow the window",
        f"The load of the overload with `lookahead` and {10 * scale:g} TiB of SSD. A conversation that exceeds the "
        "window is cut by half of the window. Its KV is reused at its new positions. If positions are coupled to "
        "keys (`--overflow-drops`), its KV is lost. The paper reports losses of 17.6 and 41.5 points.",
    )
    table = []
    for title, kv_mb, context, service, ssd_tb, (least, most) in MODELS:
        load, warmup = paper_load(options.quick, 1.0, context)
        hits = []
        for keeps in (True, False):
            machine = paper_machine(
                ssd_tb * scale, 128 * scale, kv_mb=kv_mb, overflow_keeps=keeps, service_turns_per_s=service
            )
            result = play(load, machine, "lookahead", warmup)
            table.append((title, "kept" if keeps else "lost", *row(result)))
            hits.append(result.hit_rate)
        lost = points(hits[0], hits[1])
        section.at_least(f"{title}: hits lost", lost, least, " points")
        section.at_most(f"{title}: hits lost", lost, most, " points")
    section.table("In percent:", ("Model", "KV at a cut", *COLUMNS), table)
    section.notes.append(
        "With coupled positions, every cut makes one turn lose its history. If the SSD is also too small, some of "
        "these turns would have missed in any case, so fewer hits are lost."
    )
    return section
