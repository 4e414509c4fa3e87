"""The machine that is simulated."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """Tiers, links and a GPU. Sizes are in bytes, rates in bytes, tokens or turns per second."""

    dram_bytes: int
    ssd_bytes: int
    ssd_bytes_per_s: float
    kv_bytes_per_token: int
    link_bytes_per_s: float = 26e9  # DRAM to GPU (PCIe 4 x16, as the paper measured it).
    service_turns_per_s: float | None = None  # A server with this fixed rate; None: the model of a GPU.
    prefill_tokens_per_s: float = 8000.0
    decode_tokens_per_s: float = 25.0  # Per sequence in a batch.
    batch: int = 24  # Sequences that decode at the same time.
    blocking_loads: bool = False  # True: the GPU waits for the KV of the request that it has started.
    always_load: bool = False  # True: what is on SSD is read, also where computing it again takes less time.
    reports_answers: bool = True  # False: no engine tells the store how long an answer was (see docs/hints.md).
    overflow_keeps: bool = True  # False: stored keys contain positions, so that a cut loses the session's KV.
    session_ttl_s: float = float("inf")  # A session ends when it is idle for longer.
    gpus: int = 1
