"""``kvctl simulate``: compares policies on one load and one machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvservice.simulate import command_output as output
from kvservice.simulate import plot
from kvservice.simulate.command_options import LoadOptions, RateOptions, SizeOptions, fail, policies, with_options
from kvservice.simulate.engine import CONTENDERS
from kvservice.simulate.engine import simulate as run
from kvservice.simulate.notes import notes_of
from kvservice.simulate.result import Result
from kvservice.simulate.settings import GIB, Machine
from kvservice.simulate.workload import Workload
from kvservice_api.interrupts import interruptible

#: Factors on the capacity of the swept tier.
SWEEP = (0.25, 0.5, 1.0, 2.0, 4.0)

Sweep = Literal["dram", "ssd"]


@with_options
def simulate(
    load: LoadOptions,
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME[,NAME...]", help=f"Placement policies: {', '.join(CONTENDERS)}.")
    ],
    sizes: SizeOptions,
    rates: RateOptions,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Also draw hit rate and time to the first token against capacity, as .svg, .png or .pdf.",
        ),
    ] = None,
    sweep: Annotated[
        Sweep | None, typer.Option("--sweep", help="The tier whose capacity --plot varies.", show_default="dram")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Simulate placement policies on a load, and report how much KV each has in DRAM on time.

    Sizes are binary: GB means GiB, MB means MiB.

    Notes below the table, or in the JSON, say what the reader of a trace left out, derived or spread, and whether the
    server keeps up with the load.

    Five of the names are bounds. none recomputes everything, infinite has unlimited DRAM. optimum knows the future.
    ages-only knows the true distribution of return times, ages-and-answers also after each length of the last answer.
    """
    names = policies(policy)
    if plot_file is None and sweep is not None:
        raise typer.BadParameter("selects what --plot draws: give --plot too", param_hint="--sweep")
    swept: Sweep = sweep or "dram"
    if plot_file is not None:
        _check_plot(plot_file, swept, sizes)
    rates.machine(sizes.dram_gb, sizes.ssd_gb)  # Refuses contradictory options before a long trace is read.
    workload = load.workload()
    machine = rates.machine(sizes.dram_gb, sizes.ssd_gb, workload.kv_bytes_per_token)
    factors = SWEEP if plot_file is not None else (1.0,)
    found = _play(workload, machine, names, load.warmup_turns, swept, factors)
    if plot_file is not None:
        capacities_gb = [factor * (sizes.dram_gb if swept == "dram" else sizes.ssd_gb) for factor in factors]
        lines = [(name, [found[name, factor] for factor in factors]) for name in names]
        try:
            plot.against_capacity(plot_file, lines, capacities_gb, tier=swept, title=workload.name)
        except OSError as error:
            fail(f"--plot: {plot_file} cannot be written: {error.strerror}. Name another file.")
    results = [found[name, 1.0] for name in names]
    notes = (*workload.notes, *notes_of(results, machine))
    if as_json:
        output.print_json([output.as_json(each) | {"notes": " ".join(notes)} for each in results])
    else:
        output.print_results(results)
        output.print_notes(notes)


def _check_plot(file: Path, sweep: Sweep, sizes: SizeOptions) -> None:
    """Refuse before the simulation what would make the plot fail after it."""
    if file.suffix not in plot.SUFFIXES:
        raise typer.BadParameter(f"{file} does not end in {', '.join(plot.SUFFIXES)}", param_hint="--plot")
    if not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}", param_hint="--plot")
    if (sizes.dram_gb if sweep == "dram" else sizes.ssd_gb) == 0:
        raise typer.BadParameter(f"--{sweep}-gb is 0: there is no capacity to vary", param_hint="--sweep")
    try:
        existed = file.exists()
        file.open("ab").close()
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be written: {error.strerror}", param_hint="--plot") from None
    if not existed:
        file.unlink()
    if not plot.is_available():
        fail("--plot needs matplotlib, which is not installed. Install it: pip install matplotlib.")


def _play(
    workload: Workload,
    machine: Machine,
    names: list[str],
    warmup_turns: int,
    sweep: Sweep,
    factors: tuple[float, ...],
) -> dict[tuple[str, float], Result]:
    found = {}
    with interruptible(), output.Simulations(len(names) * len(factors)) as simulations:
        for name in names:
            for factor in factors:
                sized = scaled(machine, sweep, factor)
                simulations.begins(name, sized.dram_bytes / GIB, sized.ssd_bytes / GIB)
                try:
                    found[name, factor] = run(workload, sized, name, warmup_turns=warmup_turns)
                except ValueError as error:
                    fail(f"{error}.")
                simulations.ended()
    return found


def scaled(machine: Machine, tier: Sweep, factor: float) -> Machine:
    """The machine with one tier's capacity multiplied by `factor`."""
    if tier == "dram":
        return replace(machine, dram_bytes=round(machine.dram_bytes * factor))
    return replace(machine, ssd_bytes=round(machine.ssd_bytes * factor))
