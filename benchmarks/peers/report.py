"""The table and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.results import DIRECTIONS, Results
from benchmarks.peers.systems import GROUPS, Group, System
from benchmarks.report import markdown_table, write_section

SECTION = "peers bench"
_COLORS = {"limit": "#999999", "ours": "#1b6ca8"}
_PEER_COLORS = ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#c97b84", "#5b5f97")


def markdown(results: Results) -> str:
    lines = ["### KVService beside other stores"]
    for group in GROUPS:
        if group.name in results.cells:
            lines += ["", *_group(results, group)]
    return "\n".join(lines)


def write(results: Results, page: Path, plot: Path | None) -> None:
    text = markdown(results)
    if plot is not None:
        text += f"\n\n![KVService beside other stores]({plot.name})"
    write_section(page, SECTION, text)


def _group(results: Results, group: Group) -> list[str]:
    cells = results.cells[group.name]
    sizes = sorted({key[2] for key in cells})
    rows = []
    for clients in sorted({key[1] for key in cells}):
        for direction in DIRECTIONS:
            rows += [
                row
                for system in group.systems
                if (row := _row(results, group, system, clients, direction, sizes)) is not None
            ]
    names = [f"{size >> 20} MiB" for size in sizes]
    rounds = min((cell.rounds for cell in cells.values()), default=0)
    columns = ("Clients", "", "System", *names, f"CPU s/GB ({', '.join(names)})")
    skipped = [(system.title, results.skipped[group.name][system.name]) for system in group.systems
               if system.name in results.skipped[group.name]]  # fmt: skip
    return [
        f"#### {group.title}",
        "",
        *_runs(results, group),
        "",
        f"GB/s, in brackets the share of the faster limit; medians of {rounds} rounds, in which the order of the "
        "systems rotates.",
        "",
        *markdown_table(columns, rows),
        *[f"\n{title}: skipped: {_one_line(why)}" for title, why in skipped],
        "",
        *markdown_table(("Goal, for blocks of 4 MiB and more", "Met in", "Worst"), results.goals(group)),
    ]


def _runs(results: Results, group: Group) -> list[str]:
    """The runs that have cells. If there are several, cells name theirs."""
    used = sorted({cell.run for cell in results.cells[group.name].values()})
    if len(used) == 1:
        return [results.runs[group.name][used[0]]]
    more = "Figures of several runs: only those of one run are compared with each other."
    return [more, "", *(f"* [{run + 1}]: {results.runs[group.name][run]}" for run in used)]


def _row(
    results: Results, group: Group, system: System, clients: int, direction: str, sizes: Sequence[int]
) -> tuple[str, ...] | None:
    cells = [results.cells[group.name].get((system.name, clients, size, direction)) for size in sizes]
    if not any(cells):
        return None
    has_several_runs = len({cell.run for cell in results.cells[group.name].values()}) > 1
    speeds = []
    for cell, size in zip(cells, sizes, strict=True):
        if cell is None:
            speeds.append("")
            continue
        limit = results.limit(group, cell.run, clients, size, direction)
        share = f" ({cell.gbps / limit:.2f})" if limit else ""
        speeds.append(f"{cell.gbps:.2f}{share}{f' [{cell.run + 1}]' if has_several_runs else ''}")
    title = f"**{system.title}**" if system.kind == "ours" else system.title
    used = ", ".join("-" if cell is None else f"{cell.cpu_s_per_gb:.2f}" for cell in cells)
    return (str(clients), direction, title, *speeds, used)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def draw(results: Results, path: Path) -> None:
    """Bars of each group's speeds with the fewest clients. Raises ImportError without matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "peers"  # The same figures give the same file.
    groups = [group for group in GROUPS if group.name in results.cells]
    figure = Figure(figsize=(11, 3.4 * len(groups)), layout="constrained")
    for row, group in enumerate(groups):
        cells = results.cells[group.name]
        clients = min(key[1] for key in cells)
        sizes = sorted({key[2] for key in cells})
        systems = [system for system in group.systems if any(key[0] == system.name for key in cells)]
        width = 0.85 / max(1, len(systems))
        for column, direction in enumerate(DIRECTIONS):
            axes = figure.add_subplot(len(groups), 2, 2 * row + column + 1)
            peers = 0
            for number, system in enumerate(systems):
                color = _COLORS.get(system.kind) or _PEER_COLORS[peers % len(_PEER_COLORS)]
                peers += system.kind == "peer"
                heights = [
                    cell.gbps if (cell := cells.get((system.name, clients, size, direction))) else 0.0 for size in sizes
                ]
                places = [place + (number - (len(systems) - 1) / 2) * width for place in range(len(sizes))]
                lighter = system.kind != "peer" and number and systems[number - 1].kind == system.kind
                axes.bar(places, heights, width, label=system.title, color=color, alpha=0.55 if lighter else 1.0)
            axes.set_xticks(range(len(sizes)), [f"{size >> 20} MiB" for size in sizes])
            axes.set_title(f"{group.title}: {direction}, {clients} client{'s' if clients > 1 else ''}", fontsize=9)
            axes.set_ylabel("GB/s")
            if column:
                axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, format="svg", metadata={"Date": None})
