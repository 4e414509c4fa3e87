"""The demo's output: a row per turn and totals, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from examples.demo.script import BLOCK_TOKENS, KILL_AFTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One answered turn. Times run from the given text to the first token."""

    answer: str
    answer_ids: list[int]
    problem: str  # Why a load or a save failed; empty if both succeeded.
    history_tokens: int
    new_tokens: int
    answer_tokens: int
    reused_tokens: int
    tier: str  # "dram", "ssd", "mixed" or "none".
    transport: str  # Of the load: "shm", "bulk", "grpc", "grpc+shm" or "none".
    bytes: int
    ttft_recompute_s: float = 0.0  # Of the same answer without the daemon.
    ttft_reuse_s: float
    identical: bool = False
    dropped_tokens: int = 0  # Tokens dropped before this turn, because the history overflowed its window.


def header(overflow: bool) -> str:
    return "  ".join(name.rjust(_width(name)) for name in _columns(overflow))


def row(number: int, turn: Turn, overflow: bool) -> str:
    cells = {
        "turn": str(number),
        "dropped": str(turn.dropped_tokens),
        "history": str(turn.history_tokens),
        "reused": str(turn.reused_tokens),
        "tier": turn.tier,
        "by": turn.transport,
        "MiB": f"{turn.bytes / 2**20:.1f}",
        "TTFT recompute": f"{turn.ttft_recompute_s:.3f} s",
        "TTFT reuse": f"{turn.ttft_reuse_s:.3f} s",
        "ratio": f"{turn.ttft_reuse_s / turn.ttft_recompute_s:.3f}",
        "identical": "yes" if turn.identical else "NO",
    }
    return "  ".join(cells[name].rjust(_width(name)) for name in _columns(overflow))


def totals(turns: Sequence[Turn], overflow: bool) -> str:
    summary = _summary(turns, overflow)
    overflows = f" {summary['overflows']} overflows;" if overflow else ""
    return (
        f"{summary['turns']} turns;{overflows} {summary['reused_fraction']:.1%} of the history reused; "
        f"TTFT {sum(turn.ttft_recompute_s for turn in turns):.2f} s recomputing, "
        f"{sum(turn.ttft_reuse_s for turn in turns):.2f} s reusing; "
        f"at the last turn {summary['ttft_ratio_last']:.3f} of recomputing; "
        f"answers {'all identical' if summary['all_identical'] else 'NOT all identical'}."
    )


def as_object(turns: Sequence[Turn], overflow: bool) -> dict[str, Any]:
    """The object of ``--json``."""
    hidden = {"answer", "answer_ids", "problem"} | (set() if overflow else {"dropped_tokens"})
    rows = [
        {"turn": number, **{name: value for name, value in asdict(turn).items() if name not in hidden}}
        | {"after_kill": number == KILL_AFTER + 1}
        for number, turn in enumerate(turns, start=1)
    ]
    return {"turns": rows, "summary": _summary(turns, overflow)}


def _summary(turns: Sequence[Turn], overflow: bool) -> dict[str, Any]:
    return {
        "turns": len(turns),
        "block_tokens": BLOCK_TOKENS,
        "reused_fraction": sum(turn.reused_tokens for turn in turns) / sum(turn.history_tokens for turn in turns),
        "ttft_ratio_last": turns[-1].ttft_reuse_s / turns[-1].ttft_recompute_s,
        "all_identical": all(turn.identical for turn in turns),
        **({"overflows": sum(turn.dropped_tokens > 0 for turn in turns)} if overflow else {}),
    }


def _columns(overflow: bool) -> list[str]:
    counts = ["dropped", "history", "reused"] if overflow else ["history", "reused"]
    return ["turn", *counts, "tier", "by", "MiB", "TTFT recompute", "TTFT reuse", "ratio", "identical"]


def _width(name: str) -> int:
    return max(7, len(name))
