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

from benchmarks import leftovers
from kvservice.blocks import OBJECT_KEY_BYTES, BlockTable, TierName, pack_object_keys
from kvservice.index.block_index import BlockIndex
from kvservice.index.records import encode_records, new_records

_BATCH = 4000
_ROUNDS = 15
_MAP_BYTES = 256 << 20


def measure(dram_path: Path) -> dict[str, Any]:
    """Records per second, put and committed, and found by key: ours, and py-lmdb's.

    Both are on the tmpfs, where the index of the DRAM tier is, and take turns with each batch, because the speed of
    a machine changes within seconds.
    """
    batches = [[os.urandom(OBJECT_KEY_BYTES) for _ in range(_BATCH)] for _ in range(_ROUNDS)]
    sys.setswitchinterval(0.0005)  # As the daemon has it.
    with (
        leftovers.own_folder(dram_path) as directory,
        lmdb.open(str(directory / "plain"), map_size=_MAP_BYTES, sync=False, metasync=False) as plain,
    ):
        put_s, plain_put_s = asyncio.run(_puts(directory, plain, batches))
        get_s, plain_get_s = _gets(plain, batches)
    return {
        "put_per_s": _BATCH / put_s,
        "get_per_s": _BATCH / get_s,
        "lmdb_put_per_s": _BATCH / plain_put_s,
        "lmdb_get_per_s": _BATCH / plain_get_s,
    }


async def _puts(directory: Path, plain: lmdb.Environment, batches: list[list[bytes]]) -> tuple[float, float]:
    """Medians. Ours: encode, crc, commit, waiter woken. Plain: values are encoded beforehand, and nothing is flushed,
    as the index of the DRAM tier needs no flush.
    """
    index = BlockIndex.open(directory / "durable", map_bytes=_MAP_BYTES)
    index.open_volatile(directory / "volatile", os.urandom(16), map_bytes=_MAP_BYTES)

    async def put_ours(keys: list[bytes]) -> None:
        records = _records(len(keys))
        started = time.perf_counter()
        await index.put(TierName.DRAM, keys, records)
        ours_s.append(time.perf_counter() - started)

    def put_plain(keys: list[bytes]) -> None:
        items = list(zip(keys, encode_records(keys, _records(len(keys))), strict=True))
        started = time.perf_counter()
        with plain.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(items)
        plain_s.append(time.perf_counter() - started)

    ours_s: list[float] = []
    plain_s: list[float] = []
    try:
        for number, keys in enumerate(batches):
            if number % 2:
                put_plain(keys)
                await put_ours(keys)
            else:
                await put_ours(keys)
                put_plain(keys)
    finally:
        index.close()
    return median(ours_s), median(plain_s)


def _gets(plain: lmdb.Environment, batches: list[list[bytes]]) -> tuple[float, float]:
    """Medians. Ours: the rows of the keys, as a lookup finds them."""
    table = BlockTable()
    table.add_many(pack_object_keys([key for keys in batches for key in keys]), {})
    ours_s, plain_s = [], []
    for keys in batches:
        found = [key[:32] for key in keys]
        started = time.perf_counter()
        rows = table.rows_of_keys(found)
        ours_s.append(time.perf_counter() - started)
        assert (rows >= 0).all()
        started = time.perf_counter()
        with plain.begin() as transaction:
            for key in keys:
                transaction.get(key)
        plain_s.append(time.perf_counter() - started)
    return median(ours_s), median(plain_s)


def _records(count: int) -> Any:
    records = new_records(count)
    records["layout_id"] = records["token_count"] = 1
    records["size_bytes"] = 4096
    records["offset_bytes"] = np.arange(count) * 4096
    return records
