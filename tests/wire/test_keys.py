"""A block's key is the same in every release, on every host, in every engine."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest

from kvservice_api.keys import block_chain, block_key, cut_key, extra_identity, root_key
from tests.wire.vectors import golden, layout_of

KEYS = golden("keys")


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


@pytest.mark.parametrize("vector", KEYS["roots"])
def test_roots_are_the_golden_ones(vector: dict[str, str]) -> None:
    fingerprint, salt = bytes.fromhex(vector["fingerprint"]), bytes.fromhex(vector["salt"])
    by_hand = hashlib.sha256(b"kvservice/root/1" + fingerprint + u32(len(salt)) + salt)

    assert root_key(fingerprint, salt).hex() == by_hand.hexdigest() == vector["root"]


@pytest.mark.parametrize("vector", KEYS["blocks"])
def test_block_keys_are_the_golden_ones(vector: dict[str, Any]) -> None:
    parent, tokens = bytes.fromhex(vector["parent"]), vector["token_ids"]
    extra = extra_identity(vector["lora_id"], [bytes.fromhex(digest) for digest in vector["media_hashes"]])
    by_hand = hashlib.sha256(b"kvservice/block/1" + parent + u32(len(tokens)))
    by_hand.update(b"".join(map(u32, tokens)) + u32(len(extra)) + extra)

    assert extra.hex() == vector["extra"]
    assert block_key(parent, tokens, extra).hex() == by_hand.hexdigest() == vector["key"]


@pytest.mark.parametrize("vector", KEYS["cuts"])
def test_cut_keys_are_the_golden_ones(vector: dict[str, Any]) -> None:
    tip, keep = bytes.fromhex(vector["tip"]), [tuple(part) for part in vector["keep"]]
    by_hand = hashlib.sha256(b"kvservice/cut/1" + tip + u32(len(keep)))
    by_hand.update(b"".join(struct.pack(">QQ", *part) for part in keep))

    assert cut_key(tip, keep).hex() == by_hand.hexdigest() == vector["key"]


@pytest.mark.parametrize("dtype", ["int64", "uint32", "int32", ">i8", "uint64"])
def test_the_type_of_the_token_ids_does_not_matter(dtype: str) -> None:
    vector = KEYS["blocks"][1]

    key = block_key(bytes.fromhex(vector["parent"]), np.array(vector["token_ids"], dtype))

    assert key.hex() == vector["key"]


def test_a_chain_is_the_keys_one_after_another() -> None:
    first = golden("layouts")[0]
    layout = layout_of(first["layout"])
    root = bytes.fromhex(KEYS["roots"][0]["root"])
    full = block_key(root, list(range(256)))

    assert block_chain(layout, range(300)).keys == (full,)
    assert block_chain(layout, range(300), with_partial=True).keys == (full, block_key(full, list(range(256, 300))))
    assert full.hex() == KEYS["blocks"][3]["key"]
