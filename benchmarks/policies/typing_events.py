"""Typing events: hints a few seconds before a request, true ones and false ones."""

from __future__ import annotations

from benchmarks.policies import Options
from benchmarks.policies.report import Section, percent
from benchmarks.policies.short_queues import (
    FORMER_OPTIONS,
    FORMER_PEOPLE,
    LOADS,
    TURNS,
    USER_RATE,
    Setting,
    quick_shares,
)
from kvservice.simulate.generate import people

LEAD_S = (2.0, 5.0)
FALSE_SHARE = 0.6
BUSY_MAX = 0.7  # Of the SSD's bandwidth. Above it, the bandwidth is the limit, not the policy.


def measure(options: Options) -> Section:
    users = 300 if options.quick else 1000
    section = Section(
        "typing_events",
        "Typing events",
        f"The same people, with typing hints {LEAD_S[0]:g} to {LEAD_S[1]:g} s before a request: before every request, "
        f"with {FALSE_SHARE:.0%} of the hints wrong, and never. Turns with history in DRAM on time, in percent.",
    )
    loads = {
        kind: people(users=users, user_rate=USER_RATE, **FORMER_PEOPLE, typing_lead_s=lead_s, false_hints=share, seed=3)
        for kind, lead_s, share in (("true", LEAD_S, 0.0), ("false", LEAD_S, FALSE_SHARE), ("none", None, 0.0))
    }
    table = []
    for utilisation in LOADS:
        for share in quick_shares(options):
            settings = {kind: Setting.of(load, utilisation, share) for kind, load in loads.items()}
            ours = {kind: setting.play("foresight") for kind, setting in settings.items()}
            optimum, lru = settings["true"].play("optimum"), settings["true"].play("lru")
            where = f"{utilisation:g} of capacity, DRAM {share:.0%}"
            on_time = {kind: 100 * each.dram_on_time for kind, each in ours.items()}
            table.append(
                (
                    f"{utilisation:g}",
                    f"{share:.0%}",
                    *(percent(ours[kind].dram_on_time) for kind in ("true", "false", "none")),
                    percent(optimum.dram_on_time),
                    percent(lru.dram_on_time),
                    percent(ours["true"].read_busy),
                    f"{ours['true'].ssd_written_gb / lru.ssd_written_gb:.2f}" if lru.ssd_written_gb else "-",
                )
            )
            if optimum.read_busy < BUSY_MAX:
                section.at_least(f"{where}: of the optimum", on_time["true"] / (100 * optimum.dram_on_time), 0.9)
            section.at_most(f"{where}: lost by false hints", on_time["true"] - on_time["false"], 5, " points")
            section.at_most(f"{where}: worse than without hints", on_time["none"] - on_time["false"], 2, " points")
            section.at_most(
                f"{where}: written, of `lru`'s", round(ours["true"].ssd_written_gb / lru.ssd_written_gb, 3), 1.0
            )
    section.table(
        "`foresight` beside `optimum` and `lru`:",
        (
            "Server",
            "DRAM",
            "True",
            f"{FALSE_SHARE:.0%} false",
            "None",
            "`optimum`",
            "`lru`",
            "SSD reads",
            "Written / `lru`'s",
        ),
        table,
    )
    section.notes.append(
        f"At most {USER_RATE * TURNS:g} requests arrive per second. With {FALSE_SHARE:.0%} wrong hints, "
        f"{USER_RATE * TURNS / (1 - FALSE_SHARE):g} hints arrive per second, and each may be true for "
        f"{LEAD_S[1]:g} s. A policy that follows them needs DRAM for "
        f"{USER_RATE * TURNS / (1 - FALSE_SHARE) * LEAD_S[1]:.0f} sessions. The live set has about 220. If DRAM "
        "holds less than a quarter of it, false hints displace true ones with every policy."
    )
    section.commands = [
        f"kvctl simulate --trace people --sessions {users} --session-rate {USER_RATE:g} --typing-lead-s 2:5 "
        "--false-hints 0.6 --policy foresight,optimum,lru --dram-gb 8 --ssd-gb 102400 --ssd-gbps 5 "
        "--kv-mb-per-token 0.125 "
        f"--service-turns-per-s 4.9 {FORMER_OPTIONS}"
    ]
    return section
