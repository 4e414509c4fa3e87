"""The cost by the paper's prices, with the paper's speedups and with the simulator's."""

from __future__ import annotations

from benchmarks.policies import Options
from benchmarks.policies.report import Section, percent
from benchmarks.policies.runs import paper_load, paper_machine, play, shrunk
from kvservice.simulate import cost

#: Model, GPUs, how often its GPU time is saved (PAPER, Fig. 16), cost saved and storage's share (Fig. 17), in percent.
MODELS = (
    ("13B", 2, 4.0, 70.0, 16.4),
    ("65B", 4, 1.9, 43.0, 9.0),
    ("70B", 4, 3.3, 66.0, 9.0),
    ("Falcon-40B", 4, 3.4, 68.0, 9.0),
)


def measure(options: Options) -> Section:
    section = Section(
        "cost",
        "Cost",
        "Prices per hour: $5 for a GPU, $0.0088 for a GB of DRAM and $0.000082 for a GB of SSD; 128 GB and 10 TB. "
        "First our formula with the paper's speedups, then the simulator with the load of the overload.",
    )
    formula(section)
    load, warmup = paper_load(options.quick)
    scale = shrunk(options.quick)
    machine, bare = paper_machine(10 * scale, 128 * scale), paper_machine(0, 0)
    without = play(load, bare, "none", warmup)
    rows = [
        (
            "`none`",
            f"{without.gpu_hours:.2f}",
            "1",
            f"{without.prefill_tokens_per_s:,.0f}",
            f"{without.cost_dollars:.2f}",
            "",
        )
    ]
    for name in ("lru", "lookahead", "foresight"):
        found = play(load, machine, name, warmup)
        rows.append(
            (
                f"`{name}`",
                f"{found.gpu_hours:.2f}",
                f"{without.gpu_hours / found.gpu_hours:.2f}",
                f"{found.prefill_tokens_per_s:,.0f}",
                f"{found.cost_dollars:.2f}",
                percent(1 - found.cost_dollars / without.cost_dollars),
            )
        )
    columns = ("Policy", "GPU hours", "Times", "Prefill (tokens/s)", "Dollars", "Saved (%)")
    section.table(
        f"The simulator, with {machine.prefill_tokens_per_s:,.0f} tokens of prefill per second:", columns, rows
    )
    return section


def formula(section: Section) -> None:
    """The paper's speedups make the paper's savings."""
    table = []
    for model, gpus, speedup, paper_saved, paper_share in MODELS:
        machine, bare = paper_machine(10, gpus=gpus), paper_machine(0, 0, gpus=gpus)
        saved = 100 * (1 - cost.dollars(1 / speedup, machine) / cost.dollars(1, bare))
        share = 100 * cost.storage_share(machine)
        table.append((model, f"{speedup:g}", f"{saved:.1f}", f"{paper_saved:g}", f"{share:.1f}", f"{paper_share:g}"))
        section.at_most(f"{model}: cost saved, away from the paper's", abs(saved - paper_saved), 1, " points")
        section.at_most(f"{model}: storage's share, away from the paper's", abs(share - paper_share), 0.5, " points")
    columns = ("Model", "GPU time saved, times", "Cost saved (%)", "Paper", "Storage's share (%)", "Paper")
    section.table("The formula:", columns, table)
