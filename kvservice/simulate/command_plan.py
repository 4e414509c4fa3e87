"""``kvctl plan``: the DRAM and SSD that a hit rate needs, and their cost."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import typer

from kvservice.simulate import command_output as output
from kvservice.simulate.command_options import LoadOptions, RateOptions, fail, number, policies, with_options
from kvservice.simulate.cost import PAPER_PRICES, Prices
from kvservice.simulate.engine import CONTENDERS, simulate
from kvservice.simulate.notes import notes_of
from kvservice.simulate.plan import Mix, footprint_tokens, mixes
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB
from kvservice_api.interrupts import interruptible

Share = Literal["history", "on-time", "all"]

_FIELDS: dict[Share, str] = {"history": "hit_rate_history", "on-time": "dram_on_time", "all": "hit_rate"}
_WORDS: dict[Share, str] = {
    "history": "of turns with history found in DRAM or on SSD",
    "on-time": "of turns with history found in DRAM when they were dispatched",
    "all": "of all turns found in DRAM or on SSD",
}
_PRICES = "Prices in dollars per hour: the paper's, AWS on demand"


@with_options
def plan(
    load: LoadOptions,
    target_hit: Annotated[
        float, number("--target-hit", "The share of hits to reach, such as 0.8.", above=True, most=1)
    ],
    rates: RateOptions,
    of: Annotated[
        Share,
        typer.Option("--of", help="Hits of turns with history; of these, hits that are in DRAM on time; of all turns."),
    ] = "history",
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME", help=f"Placement policy: {', '.join(CONTENDERS)}.")
    ] = "foresight",
    dram_price: Annotated[float, number("--dram-price", "A GiB of DRAM.", _PRICES)] = PAPER_PRICES.dram_gb,
    ssd_price: Annotated[float, number("--ssd-price", "A GiB of SSD.", _PRICES)] = PAPER_PRICES.ssd_gb,
    gpu_price: Annotated[float, number("--gpu-price", "A GPU.", _PRICES)] = PAPER_PRICES.gpu,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Find the cheapest DRAM and SSD that reach a hit rate, by simulating a load with different sizes.

    If no size reaches it, the exit code is 1 and one line says what the largest size reaches.
    """
    if policies(policy) != [policy]:
        raise typer.BadParameter("give one policy, not several", param_hint="--policy")
    prices = Prices(dram_price, ssd_price, gpu_price)
    rates.machine(0, 0)  # Refuses contradictory options before a long trace is read.
    workload = load.workload()
    machine_of = functools.partial(rates.machine, kv_bytes_per_token=workload.kv_bytes_per_token)
    footprint_gb = max(footprint_tokens(workload) * machine_of(0, 0).kv_bytes_per_token / GIB, 1.0)

    def share(result: Result) -> float:
        return float(getattr(result, _FIELDS[of]))

    with interruptible(), output.Simulations(None) as simulations:

        @functools.cache
        def simulated(name: str, dram_gb: float, ssd_gb: float) -> Result:
            simulations.begins(name, dram_gb, ssd_gb)
            try:
                result = simulate(workload, machine_of(dram_gb, ssd_gb), name, warmup_turns=load.warmup_turns)
            except ValueError as error:
                fail(f"{error}.")
            simulations.ended()
            return result

        ceiling = share(simulated("infinite", footprint_gb, footprint_gb))
        if not ceiling >= target_hit:
            fail(_beyond(target_hit, of, ceiling, "even unlimited DRAM"))
        measure = functools.partial(simulated, policy)
        found = mixes(measure, lambda result: share(result) >= target_hit, footprint_gb, prices, rates.gpus)
        if not found:
            most = share(measure(footprint_gb, footprint_gb))
            fail(_beyond(target_hit, of, most, f"{policy} with space for everything that is stored"))
        without = simulated("none", 0.0, 0.0)
    notes = (*workload.notes, *notes_of([found[0].result], machine_of(0, 0)))
    cheapest, *others = (_mix(each) for each in found)
    document = {
        "policy": policy,
        "target_hit": target_hit,
        "of": of,
        "ceiling": ceiling,
        "footprint_gb": footprint_gb,
        **cheapest,
        "others": others,
        "notes": " ".join(notes),
        "without_storage": {"dollars": prices.dollars(without.gpu_hours, 0.0, rates.gpus), **_figures(without)},
    }
    if as_json:
        output.print_json(document)
    else:
        _print(document, of)
        output.print_notes(notes)


def _beyond(target_hit: float, of: Share, most: float, who: str) -> str:
    return f"no size reaches {target_hit:g} {_WORDS[of]}: {who} has {most:.3f}. Ask for less with --target-hit."


def _mix(mix: Mix) -> dict[str, Any]:
    return {
        "dram_gb": mix.dram_gb,
        "ssd_gb": mix.ssd_gb,
        "storage_dollars_per_h": mix.storage_dollars_per_h,
        "dollars": mix.dollars,
        **_figures(mix.result),
    }


def _figures(result: Result) -> dict[str, Any]:
    whole = output.as_json(result)
    names = (
        "hit_rate", "hit_rate_history", "dram_on_time", "dram_late", "ssd", "miss", "ttft_p50_s", "ttft_p99_s",
        "gpu_hours", "ssd_written_gb", "moved_gb",
    )  # fmt: skip
    return {name: whole[name] for name in names}


def _print(document: dict[str, Any], of: Share) -> None:
    columns = ("dram", "ssd", "storage", "the load", "hits of history", "on time", "ttft p50", "p99")
    rows = output.table(*columns, right=columns)
    for each in (document, *document["others"]):
        rows.add_row(
            output.size(each["dram_gb"]),
            output.size(each["ssd_gb"]),
            f"${each['storage_dollars_per_h']:.3f}/h",
            f"${each['dollars']:,.2f}",
            output.share(each["hit_rate_history"]),
            output.share(each["dram_on_time"]),
            output.seconds(each["ttft_p50_s"]),
            output.seconds(each["ttft_p99_s"]),
        )
    without = document["without_storage"]
    saved = 1 - document["dollars"] / without["dollars"] if without["dollars"] else 0.0
    out = output.console()
    out.print(
        f"With {document['policy']}, {document['target_hit']:g} {_WORDS[of]} takes "
        f"{output.size(document['dram_gb'])} of DRAM and {output.size(document['ssd_gb'])} of SSD, for "
        f"${document['storage_dollars_per_h']:.3f} per hour. An unlimited store has {document['ceiling']:.3f}.\n"
    )
    out.print(rows)
    how = f"saves {saved:.0%}" if saved >= 0 else f"costs {-saved:.0%} more: loading takes longer than recomputing"
    out.print(
        f"\nThe load costs ${without['dollars']:,.2f} without storage; the first row {how}. "
        f"The cost is that of the GPUs while they prefill and decode, and of the storage for the same time."
    )
