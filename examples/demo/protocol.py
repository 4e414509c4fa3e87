"""What the engine's process says to the demo, one JSON object a line. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 256  # What is left over at the end of a history is kept by its session.
ANSWER_TOKENS_MIN, ANSWER_TOKENS_MAX = 24, 32


@dataclass(frozen=True, slots=True)
class Loaded:
    """Said once, when the engine can answer."""

    model_id: str
    block_bytes: int  # What one block takes in a tier.
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One answered turn. Times count from text in hand to the first token."""

    answer: str
    answer_tokens: int
    history_tokens: int
    new_tokens: int
    reused_tokens: int
    tier: str  # "dram", "ssd", "mixed" or "none".
    transport: str  # By what it came: "shm", "grpc", "grpc+shm" or "none".
    bytes: int
    ttft_reuse_s: float
    ttft_recompute_s: float | None  # None, as `identical`, where the turn was not computed a second time.
    identical: bool | None
    trouble: str  # Why nothing was reused, or not all was saved. Empty where all went well.
    dropped_tokens: int = 0  # What left the history before this turn, because it had overflowed its window.


@dataclass(frozen=True, slots=True)
class WindowedTurn:
    """A turn of a conversation that may overflow its window."""

    turn: Turn
    answer_ids: list[int]
    state: str  # What the engine has to be told with the next turn.


@dataclass(frozen=True, slots=True)
class InMemory:
    """The same turn by the engine that keeps its history in memory."""

    answer_ids: list[int]
    ttft_recompute_s: float  # With all that the window has left computed again.
