"""Damages an index in many ways, and uses it if the check calls it sound. A process of its own, because LMDB may end
it.

``python -m tests.unit.index_damage FOLDER SEED COUNT`` prints one line of JSON. If it dies, ``FOLDER/doing`` has its
last operation.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import lmdb

from kvservice.index import pages
from kvservice.index.environment import BLOCKS, DATA_NAME, LAYOUTS, META, SESSIONS
from kvservice.index.records import encode_records, is_sound
from tests.unit.index_samples import some_keys, some_records

PAGE_BYTES = 4096
MAP_BYTES = 4 << 20
BLOCK_COUNT = 1500  # Two levels of branch pages.
_NAMES = (META, LAYOUTS, BLOCKS, SESSIONS)


def make(folder: Path) -> dict[bytes, bytes]:
    """An index with free pages, branch pages and overflow pages. Returns its records."""
    keys = some_keys(BLOCK_COUNT)
    values = dict(zip(keys, encode_records(keys, some_records(BLOCK_COUNT)), strict=True))
    folder.mkdir()
    with opened(folder) as env:
        handles = {name: env.open_db(name) for name in _NAMES}
        for start in range(0, BLOCK_COUNT, 100):
            with env.begin(write=True) as txn:
                txn.put(b"schema", b"2", db=handles[META])
                for key in keys[start : start + 100]:
                    txn.put(key, values[key], db=handles[BLOCKS])
                txn.put(b"session %d" % start, bytes(start * 20), db=handles[SESSIONS])
        with env.begin(write=True) as txn:
            for key in keys[::7]:
                txn.delete(key, db=handles[BLOCKS])
                del values[key]
    return values


def opened(folder: Path) -> lmdb.Environment:
    return lmdb.open(str(folder), map_size=MAP_BYTES, max_dbs=4, lock=False, sync=False, metasync=False)


def use(folder: Path, expected: dict[bytes, bytes]) -> None:
    """Read, write and delete everything. Asserts that values with a correct CRC equal the written ones."""
    with opened(folder) as env:
        handles = {name: env.open_db(name, create=False) for name in _NAMES}
        with env.begin() as txn:
            for name in _NAMES:
                for key, value in txn.cursor(handles[name]):
                    assert name != BLOCKS or not is_sound(key, value) or expected[key] == value
        for _ in range(2):
            with env.begin(write=True) as txn:
                for key, value in expected.items():
                    txn.put(key, value, db=handles[BLOCKS])
                txn.put(b"large", bytes(30_000), db=handles[SESSIONS])
        with env.begin(write=True) as txn:
            for name in _NAMES:
                for key in list(txn.cursor(handles[name]).iternext(values=False)):
                    txn.delete(key, db=handles[name])


def main(folder: Path, seed: int, count: int) -> None:
    chooser = random.Random(seed)
    expected = make(folder / "whole")
    whole = (folder / "whole" / DATA_NAME).read_bytes()
    assert pages.examine(folder / "whole" / DATA_NAME) == ""
    found = {"sound": 0, "damaged": 0}
    page_count = len(whole) // PAGE_BYTES
    for number in range(count):
        data = bytearray(whole)
        if number % 10 == 9:
            del data[chooser.randrange(1, len(data)) :]
            doing = f"cut to {len(data)} bytes"
        else:
            page = number % page_count
            # In a page's own numbers, more often than in keys and values.
            offset = page * PAGE_BYTES + chooser.randrange(chooser.choice((PAGE_BYTES, 16, 160)))
            bit = chooser.randrange(8)
            data[offset] ^= 1 << bit
            doing = f"bit {bit} of byte {offset}"
        (folder / "doing").write_text(doing)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        (folder / "damaged").mkdir()
        path = folder / "damaged" / DATA_NAME
        path.write_bytes(data)
        for _ in pages.salvage(path):
            pass
        if pages.examine(path):
            found["damaged"] += 1
        else:
            found["sound"] += 1
            use(folder / "damaged", expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
