"""The messages of the engine's process, one JSON object per line. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_TOKENS = 256  # A session keeps the partial block at the end of a history.
ANSWER_TOKENS_MIN, ANSWER_TOKENS_MAX = 24, 32


@dataclass(frozen=True, slots=True)
class Loaded:
    """The first message: the engine can answer."""

    model_id: str
    block_bytes: int  # Bytes of one block in a tier.
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One answered turn. Times run from the given text to the first token."""

    answer: str
    answer_tokens: int
    history_tokens: int
    new_tokens: int
    reused_tokens: int
    tier: str  # "dram", "ssd", "mixed" or "none".
    transport: str  # Of the load: "shm", "grpc", "grpc+shm" or "none".
    bytes: int
    ttft_reuse_s: float
    ttft_recompute_s: float | None  # None, like `identical`, if the turn was not computed twice.
    identical: bool | None
    problem: str  # Why a load or a save failed; empty if both succeeded.
    dropped_tokens: int = 0  # Tokens dropped before this turn, because the history overflowed its window.


@dataclass(frozen=True, slots=True)
class WindowedTurn:
    """A turn of a conversation that may overflow its window."""

    turn: Turn
    answer_ids: list[int]
    state: str  # An input of the next turn.


@dataclass(frozen=True, slots=True)
class InMemory:
    """The same turn by the engine that keeps its history in memory."""

    answer_ids: list[int]
    ttft_recompute_s: float  # All tokens in the window are recomputed.
