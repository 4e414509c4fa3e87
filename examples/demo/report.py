"""The demo's output: a row per turn and totals, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.demo.protocol import BLOCK_TOKENS, Turn
from examples.demo.script import KILL_AFTER

_COLUMNS = ("turn", "history", "reused", "tier", "by", "MiB", "TTFT recompute", "TTFT reuse", "ratio", "identical")


def header(overflow: bool = False) -> str:
    return _row(_columns(overflow), overflow)


def row(number: int, turn: Turn, overflow: bool = False) -> str:
    recompute_s = turn.ttft_recompute_s or 0.0
    cells = (
        str(number),
        str(turn.history_tokens),
        str(turn.reused_tokens),
        turn.tier,
        turn.transport,
        f"{turn.bytes / 2**20:.1f}",
        f"{recompute_s:.3f} s",
        f"{turn.ttft_reuse_s:.3f} s",
        f"{turn.ttft_reuse_s / recompute_s:.3f}",
        "yes" if turn.identical else "NO",
    )
    return _row((*cells[:1], str(turn.dropped_tokens), *cells[1:]) if overflow else cells, overflow)


def totals(turns: Sequence[Turn], overflow: bool = False) -> str:
    summary = summarized(turns, overflow)
    recompute_s = sum(turn.ttft_recompute_s or 0.0 for turn in turns)
    reuse_s = sum(turn.ttft_reuse_s for turn in turns)
    overflows = f" {summary['overflows']} overflows;" if overflow else ""
    return (
        f"{summary['turns']} turns;{overflows} {summary['reused_fraction']:.1%} of the history reused; "
        f"TTFT {recompute_s:.2f} s recomputing, {reuse_s:.2f} s reusing; "
        f"at the last turn {summary['ttft_ratio_last']:.3f} of recomputing; "
        f"answers {'all identical' if summary['all_identical'] else 'NOT all identical'}."
    )


def as_object(turns: Sequence[Turn], overflow: bool = False) -> dict[str, Any]:
    """The object of ``--json``."""
    names = (
        "history_tokens new_tokens answer_tokens reused_tokens tier transport bytes ttft_recompute_s ttft_reuse_s "
        "identical"
    ).split()
    names += ["dropped_tokens"] if overflow else []
    return {
        "turns": [
            {"turn": number, **{name: getattr(turn, name) for name in names}, "after_kill": number == KILL_AFTER + 1}
            for number, turn in enumerate(turns, start=1)
        ],
        "summary": summarized(turns, overflow),
    }


def summarized(turns: Sequence[Turn], overflow: bool = False) -> dict[str, Any]:
    last = turns[-1]
    history_tokens = sum(turn.history_tokens for turn in turns)
    return {
        "turns": len(turns),
        "block_tokens": BLOCK_TOKENS,
        "reused_fraction": sum(turn.reused_tokens for turn in turns) / history_tokens,
        "ttft_ratio_last": last.ttft_reuse_s / (last.ttft_recompute_s or float("nan")),
        "all_identical": all(turn.identical for turn in turns),
        **({"overflows": sum(turn.dropped_tokens > 0 for turn in turns)} if overflow else {}),
    }


def _columns(overflow: bool) -> tuple[str, ...]:
    """With `overflow`, the column of dropped tokens precedes the column of the history."""
    return (*_COLUMNS[:1], "dropped", *_COLUMNS[1:]) if overflow else _COLUMNS


def _row(cells: Sequence[str], overflow: bool) -> str:
    widths = (max(7, len(name)) for name in _columns(overflow))
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
