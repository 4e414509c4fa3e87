"""The machine that is simulated."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """Tiers, links and a GPU. Sizes in bytes, rates in bytes, tokens or turns a second."""

    dram_bytes: int
    ssd_bytes: int
    ssd_bytes_per_s: float
    kv_bytes_per_token: int
    link_bytes_per_s: float = 26e9  # DRAM to GPU (PCIe 4 x16, as the paper measured it).
    service_turns_per_s: float | None = None  # A server that takes a turn every 1/S seconds; None: the GPU's model.
    prefill_tokens_per_s: float = 8000.0
    decode_tokens_per_s: float = 25.0  # Of each sequence in a batch.
    batch: int = 24  # Sequences that decode at a time.
    readiness_aware: bool = False  # One whose KV is there may go before one that waits for SSD.
    overflow_keeps: bool = True  # False: positions are coupled to keys: a cut loses the session's KV.
    session_ttl_s: float = float("inf")  # Idle sessions end after it.
    gpus: int = 1
