"""The index against plain py-lmdb: the same batch, in the same kind of environment."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import lmdb
import numpy as np

from kvservice.blocks import OBJECT_KEY_BYTES, BlockTable, TierName, pack_object_keys
from kvservice.index.block_index import BlockIndex
from kvservice.index.records import encode_records, new_records

_BATCH = 4000
_ROUNDS = 15
_MAP_BYTES = 256 << 20


def measure(directory: Path) -> dict[str, Any]:
    """Records per second, put and committed, and found by key: ours, and py-lmdb's."""
    batches = [[os.urandom(OBJECT_KEY_BYTES) for _ in range(_BATCH)] for _ in range(_ROUNDS)]
    sys.setswitchinterval(0.0005)  # As the daemon has it.
    put_s, get_s = asyncio.run(_ours(directory, batches))
    plain_put_s, plain_get_s = _plain(directory, batches)
    return {
        "put_per_s": _BATCH / put_s,
        "get_per_s": _BATCH / get_s,
        "lmdb_put_per_s": _BATCH / plain_put_s,
        "lmdb_get_per_s": _BATCH / plain_get_s,
    }


async def _ours(directory: Path, batches: list[list[bytes]]) -> tuple[float, float]:
    """Put: encode, crc, commit, waiter woken. Get: the rows of the keys, as a lookup finds them."""
    index = BlockIndex.open(directory / "durable", map_bytes=_MAP_BYTES)
    index.open_volatile(directory / "volatile", os.urandom(16), map_bytes=_MAP_BYTES)
    puts, gets = [], []
    try:
        for keys in batches:
            records = _records(len(keys))
            started = time.perf_counter()
            await index.put(TierName.DRAM, keys, records)
            puts.append(time.perf_counter() - started)
    finally:
        index.close()
    table = BlockTable()
    table.add_many(pack_object_keys([key for keys in batches for key in keys]), {})
    for keys in batches:
        found = [key[:32] for key in keys]
        started = time.perf_counter()
        rows = table.rows_of_keys(found)
        gets.append(time.perf_counter() - started)
        assert (rows >= 0).all()
    return median(puts), median(gets)


def _plain(directory: Path, batches: list[list[bytes]]) -> tuple[float, float]:
    """Values are encoded beforehand; no flush, as the index of the DRAM tier needs none."""
    puts, gets = [], []
    with lmdb.open(str(directory / "plain"), map_size=_MAP_BYTES, sync=False, metasync=False) as environment:
        for keys in batches:
            items = list(zip(keys, encode_records(keys, _records(len(keys))), strict=True))
            started = time.perf_counter()
            with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                cursor.putmulti(items)
            puts.append(time.perf_counter() - started)
        for keys in batches:
            started = time.perf_counter()
            with environment.begin() as transaction:
                for key in keys:
                    transaction.get(key)
            gets.append(time.perf_counter() - started)
    return median(puts), median(gets)


def _records(count: int) -> Any:
    records = new_records(count)
    records["layout_id"] = records["token_count"] = 1
    records["size_bytes"] = 4096
    records["offset_bytes"] = np.arange(count) * 4096
    return records
