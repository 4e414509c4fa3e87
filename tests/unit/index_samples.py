"""Keys, records and layouts for the tests of the index."""

from __future__ import annotations

import hashlib

import numpy as np

from kvservice.index.records import Records, new_records
from kvservice_api.layout import Layout, Shard

LAYOUT = Layout(model_id="test", dtype="float16", layers=2, kv_heads=2, k_head_dim=8, v_head_dim=8, block_tokens=16)
SHARD = Shard.whole(LAYOUT)


def some_keys(count: int, first: int = 0) -> list[bytes]:
    """Object keys with the distribution of real ones."""
    return [hashlib.sha256(b"%d" % number).digest() + SHARD.encode() for number in range(first, first + count)]


def some_records(count: int, first: int = 0, layout_id: int = 1) -> Records:
    """Records of adjacent blocks, one page each."""
    numbers = np.arange(first, first + count)
    records = new_records(count)
    records["layout_id"] = layout_id
    records["token_count"] = 16
    records["offset_bytes"] = numbers * 4096
    records["size_bytes"] = 4096
    records["trailer_checksum"] = numbers + 7
    records["parent_key"] = np.frombuffer(bytes(31 * count) + bytes(count), "V32")
    return records
