"""The SSD tier in the real store: write-behind and promotion, with verification.

No network is used. Blocks are first put into DRAM; then the benchmark measures the time of writing them
to SSD, and the time of promoting them. Flushes and commits count.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from kvservice.blocks import TierName
from kvservice.config_sources import load_settings
from kvservice.daemon import Daemon, tune_process
from kvservice.store.caller import DEFAULT_TENANT, Caller
from kvservice.store.store import BlockStore
from kvservice.store.types import Client, SaveChain, SaveHeader, TierFacts
from kvservice_api.frames import Frame
from kvservice_api.image import checksum
from kvservice_api.keys import block_chain
from kvservice_api.layout import Layout

# Llama-3-8B in bf16 with blocks of 256 tokens: slices of 1 MiB, 32 MiB per block.
_LAYOUT = Layout("bench", "bfloat16", layers=32, kv_heads=8, k_head_dim=128, v_head_dim=128)
_BLOCK_BYTES = 32 << 20
_CALLER = Caller("bench", DEFAULT_TENANT, b"")


def measure(directory: Path, size_bytes: int) -> dict[str, Any]:
    """GB/s of write-behind and promotion."""
    tune_process()
    with tempfile.TemporaryDirectory(prefix="kvservice-bench-", dir="/dev/shm") as arena:
        return uvloop.run(_run(directory, arena, size_bytes))


async def _run(directory: Path, arena: str, size_bytes: int) -> dict[str, Any]:
    settings = load_settings(
        [
            f"--store.path={directory}",
            f"--dram.path={arena}",
            "--server.address=127.0.0.1:0",
            "--server.unix_socket=off",
            "--server.metrics_address=",
            f"--dram.capacity_bytes={size_bytes + (256 << 20)}",
            f"--ssd.capacity_bytes={size_bytes + (256 << 20)}",
        ],
        {},
    )

    daemon = await Daemon.open(settings)
    try:
        return await _measure(daemon, size_bytes // _BLOCK_BYTES)
    finally:
        await daemon.close()


async def _measure(daemon: Daemon, block_count: int) -> dict[str, Any]:
    store = daemon.store
    store.start()
    needed_bytes = (block_count + 2) * _BLOCK_BYTES
    while not _has_room(store.status.facts().tiers, needed_bytes):  # noqa: ASYNC110  (once)
        await asyncio.sleep(0.01)
    await store.layouts.open(_CALLER, _LAYOUT)
    client = store.leases.attach(_CALLER, "bench")
    for turn in range(2):
        # The first pass over a new file converts its preallocated blocks: only the second one is counted.
        keys = await _fill(store, client, block_count, first_token=turn)
        started = time.perf_counter()
        store.drain.begin(_CALLER)
        async for _ in store.drain.progress(_CALLER):  # It ends when all are written.
            pass
        write_s = time.perf_counter() - started
        store.drain.undo(_CALLER)
        await store.moves.evict(_CALLER, keys, TierName.DRAM)
        started = time.perf_counter()
        outcome = await store.moves.prefetch(_CALLER, keys, within_s=0, wait=True)
        read_s = time.perf_counter() - started
        assert outcome.promoted == block_count, outcome
        await store.operators.discard(_CALLER, keys)
    store.leases.detach(_CALLER, client)
    moved = block_count * _BLOCK_BYTES
    return {
        "write_gbps": moved / write_s / 1e9,
        "read_gbps": moved / read_s / 1e9,
        "is_direct": any(tier.is_direct for tier in store.status.facts().tiers),
        "io_threads": daemon.settings.ssd.io_threads,
    }


def _has_room(tiers: Sequence[TierFacts], size_bytes: int) -> bool:
    """Whether DRAM has grown to this size, or will not grow any more."""
    (dram,) = (tier for tier in tiers if tier.name == TierName.DRAM)
    return dram.capacity_bytes >= size_bytes or bool(dram.short_because)


async def _fill(store: BlockStore, client: Client, block_count: int, *, first_token: int) -> list[bytes]:
    """Put blocks into DRAM, as a save would."""
    chain = block_chain(_LAYOUT, np.arange(block_count * _LAYOUT.block_tokens) + first_token)
    slice_bytes = _BLOCK_BYTES // _LAYOUT.layers
    payload = memoryview(os.urandom(slice_bytes))
    sums = np.full(block_count * _LAYOUT.layers, checksum(payload), np.uint64)
    fingerprint = _LAYOUT.fingerprint
    parent = secrets.token_bytes(32)
    header = SaveHeader(fingerprint, None, [SaveChain(parent, chain.keys, 0)])
    async with store.saves.save(replace(_CALLER, client=client.client_id), header) as upload:
        for block in range(block_count):
            for layer in range(_LAYOUT.layers):
                upload.write(Frame(layer, block, 0, payload))
            await asyncio.sleep(0)
        # Not queued for write-behind yet: the clock is not running.
        outcome = await upload.commit(sums, on_ssd=False, then_write=False)
    assert len(outcome.stored) == block_count, outcome
    return list(chain.keys)
