"""The SSD tier in the real store: write-behind and promotion, with verification.

No network is used. Blocks are first put into DRAM; then the benchmark measures the time of writing them
to SSD, and the time of promoting them. Flushes and commits count. In turn with these it reads or writes the same
part of the same file by plain calls: the limit.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.daemon.disk import READS, WRITES, RawFile
from benchmarks.leftovers import own_folder
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
_PASSES = 2
_CALLER = Caller("bench", DEFAULT_TENANT, b"")


def measure(directory: Path, dram_path: Path, size_bytes: int) -> dict[str, Any]:
    """GB/s of promotion ("read") and write-behind ("write"), and of the limit by setting: of each pass, in turn.

    Empty if the file system has no O_DIRECT, as a tmpfs.
    """
    tune_process()
    with own_folder(dram_path) as arena:
        return uvloop.run(_run(directory, arena, size_bytes))


async def _run(directory: Path, arena: Path, size_bytes: int) -> dict[str, Any]:
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
        if not all(tier.is_direct for tier in daemon.store.status.facts().tiers if tier.name != TierName.DRAM):
            return {}
        with RawFile(directory / "ssd-000.kv", size_bytes // _BLOCK_BYTES * _BLOCK_BYTES) as raw:
            return await _measure(daemon, raw, size_bytes // _BLOCK_BYTES)
    finally:
        await daemon.close()


async def _measure(daemon: Daemon, raw: RawFile, block_count: int) -> dict[str, Any]:
    store = daemon.store
    store.start()
    needed_bytes = (block_count + 2) * _BLOCK_BYTES
    while not _has_room(store.status.facts().tiers, needed_bytes):  # noqa: ASYNC110  (once)
        await asyncio.sleep(0.01)
    await store.layouts.open(_CALLER, _LAYOUT)
    client = store.leases.attach(_CALLER, "bench")
    moved = block_count * _BLOCK_BYTES
    reads, writes = list[dict[str, Any]](), list[dict[str, Any]]()

    async def written(turn: int) -> tuple[list[bytes], float]:
        keys = await _fill(store, client, block_count, first_token=turn)
        started = time.perf_counter()
        store.drain.begin(_CALLER)
        async for _ in store.drain.progress(_CALLER):  # It ends when all are written.
            pass
        took_s = time.perf_counter() - started
        store.drain.undo(_CALLER)
        return keys, moved / took_s / 1e9

    keys, _ = await written(0)  # Over a new file this converts its preallocated blocks: not counted.
    for number in range(_PASSES):
        writes.append({"limits": {}, "ours": []})
        for setting in WRITES:
            await store.operators.discard(_CALLER, keys)  # Now the file has no block.
            writes[-1]["limits"][str(setting)] = raw.write_gbps(setting)
            keys, gbps = await written(1 + number)
            writes[-1]["ours"].append(gbps)
    for _ in range(_PASSES):
        reads.append({"limits": {}, "ours": []})
        for setting in READS:
            await store.moves.evict(_CALLER, keys, TierName.DRAM)
            reads[-1]["limits"][str(setting)] = raw.read_gbps(setting)
            started = time.perf_counter()
            outcome = await store.moves.prefetch(_CALLER, keys, within_s=0, wait=True)
            reads[-1]["ours"].append(moved / (time.perf_counter() - started) / 1e9)
            assert outcome.promoted == block_count, outcome
    store.leases.detach(_CALLER, client)
    return {"read": reads, "write": writes}


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
