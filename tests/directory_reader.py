"""A process that searches a residency directory while another one changes it: ``python -m tests.directory_reader``.

Key number n is only stored as `object_of(n)`; keys from `NEVER` on are never stored. Prints how often it found keys
that are always stored, sometimes stored, and never stored.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter

import numpy as np

from kvservice_api.layout import Shard
from kvservice_client.local_directory import LocalDirectory
from tests.directories import LAYOUTS, SHARDS, STORE_ID

ALWAYS, NEVER, END = 40, 400, 500  # Numbers below ALWAYS are stored all the time.


def key_of(number: int) -> bytes:
    """All keys hash to a hundred slots, so that they collide and searches are long."""
    digest = hashlib.sha256(str(number).encode()).digest()
    return (number % 100).to_bytes(8, "little") + digest[8:]


def object_of(number: int) -> tuple[bytes, Shard, int]:
    return key_of(number), SHARDS[number % 3], 1 + number % 2


def search(path: str, epoch: int, questions: int) -> Counter[str]:
    directory = LocalDirectory()
    random = np.random.default_rng()
    found: Counter[str] = Counter()
    while found["questions"] < questions:
        number = int(random.integers(END))
        key, shard, layout_id = object_of(number)
        asked_shard, asked_layout = SHARDS[int(random.integers(3))], int(random.integers(1, 3))
        mark = LAYOUTS[asked_layout].fingerprint
        hit = directory.look_up(path, STORE_ID, epoch, key, mark, asked_shard)
        found["questions"] += 1
        is_right = layout_id == asked_layout and shard.covers(asked_shard)
        if hit is None:
            found["unknown"] += 1
        elif not hit.blocks:
            found["misses"] += 1
            found["lost"] += number < ALWAYS and is_right
        elif number >= NEVER or not is_right:
            found["wrong"] += 1
        else:
            found["hits"] += 1
    return found


if __name__ == "__main__":
    print(json.dumps(search(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
