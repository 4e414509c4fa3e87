"""What policies save in seconds: people as at the service, and a GPU that loads aside and recomputes where faster."""

from __future__ import annotations

from benchmarks.policies import Options
from benchmarks.policies.report import Section, percent
from benchmarks.policies.runs import play
from benchmarks.policies.short_queues import USER_RATE
from kvservice.simulate.generate import people
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB, MIB, Machine

NAMES = ("none", "lru", "s3fifo", "lookahead", "foresight", "ages-only", "ages-and-answers", "infinite")
KV_MIB = {"GQA, 0.125 MiB per token": 0.125, "13B, 0.78125 MiB per token": 0.78125}
DRAM_SHARE = 0.2  # Of the live set.
COLUMNS = (
    "Policy", "On time", "Late", "SSD", "Again", "Miss", "TTFT mean (ms)", "p50", "p99", "GPU (h)",
    "Read (GiB)", "Unused", "Written (GiB)", "Dropped",
)  # fmt: skip


def measure(options: Options) -> Section:
    users = 150 if options.quick else 600
    load = people(users=users, user_rate=USER_RATE)
    warmup = load.turns // 5
    section = Section(
        "seconds",
        "What hits save",
        f"{users:,} users as at the service ({load.turns:,} turns), the default GPU, DRAM for {DRAM_SHARE:.0%} of the "
        "live set, and an SSD of 5 GiB/s with space for everything, or none. Shares are in percent of turns with "
        "history; `Again` is a part of `Late` and `SSD`. TTFT is from the request.",
    )
    for size, kv_mib in KV_MIB.items():
        ample = _machine(10 * 1024, 10 * 1024, kv_mib)
        dram_gb = DRAM_SHARE * play(load, ample, "infinite", warmup).live_gb_mean
        for ssd_gb, tiers in ((10 * 1024, "with SSD"), (0, "DRAM alone")):
            machine = _machine(dram_gb, ssd_gb, kv_mib)
            found = {name: play(load, machine, name, warmup) for name in NAMES}
            section.table(
                f"{size}, {dram_gb:.1f} GiB of DRAM, {tiers}:", COLUMNS, [_row(found[name]) for name in NAMES]
            )
            if not ssd_gb:
                nothing, most, ours = (found[name].gpu_hours for name in ("none", "infinite", "foresight"))
                saved = 100 * (nothing - ours) / (nothing - most)
                section.at_least(f"{size}, DRAM alone: GPU time saved, of what endless DRAM saves", saved, 30, " %")
            for name in ("none", "lru"):
                times = found["foresight"].ttft_mean_s / found[name].ttft_mean_s
                section.at_most(f"{size}, {tiers}: mean TTFT of `foresight`, of `{name}`'s", times, 1.0)
    section.commands = [
        f"kvctl simulate --trace people --sessions {users} --session-rate {USER_RATE:g} --policy {','.join(NAMES)} "
        f"--dram-gb {dram_gb:.3f} --ssd-gb 0 --kv-mb-per-token {kv_mib:g} --warmup-turns {warmup}"
    ]
    return section


def _machine(dram_gb: float, ssd_gb: float, kv_mib: float) -> Machine:
    return Machine(
        dram_bytes=round(dram_gb * GIB),
        ssd_bytes=round(ssd_gb * GIB),
        ssd_bytes_per_s=5 * GIB,
        kv_bytes_per_token=round(kv_mib * MIB),
    )


def _row(result: Result) -> tuple[str, ...]:
    shares = (result.dram_on_time, result.dram_late, result.ssd, result.recomputed_hits, result.miss)
    return (
        f"`{result.policy}`",
        *map(percent, shares),
        *(f"{1000 * each:.0f}" for each in (result.ttft_mean_s, result.ttft_p50_s, result.ttft_p99_s)),
        f"{result.gpu_hours:.3f}",
        *(
            f"{each:.0f}"
            for each in (result.read_gb, result.promoted_unused_gb, result.ssd_written_gb, result.writes_dropped_gb)
        ),
    )
