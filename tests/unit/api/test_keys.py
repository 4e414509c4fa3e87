"""Valid and invalid inputs of block keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import BlockChain, block_chain, block_key, extra_identity, root_key, split_keys
from kvservice_api.layout import Layout

LAYOUT = Layout("model", "float16", layers=2, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=4)
ROOT = root_key(LAYOUT.fingerprint)


@pytest.mark.parametrize(
    "token_ids",
    [[2**32], [-1], [0, 2**63], [2**64], [1.0], ["1"], [True], [[1, 2]], 7, [None], np.array([2**32], np.uint64)],
    ids=repr,
)
def test_ids_that_are_not_32_bit_unsigned_integers_are_refused(token_ids: Any) -> None:
    with pytest.raises(InvalidRequest, match="token id") as refusal:
        block_key(ROOT, token_ids)
    assert refusal.value.details["field"] == "token_ids"
    with pytest.raises(InvalidRequest):
        block_chain(LAYOUT, token_ids)


def test_a_block_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        block_key(ROOT, [])


def test_ids_0_and_the_highest_are_allowed() -> None:
    assert block_key(ROOT, [0]) != block_key(ROOT, [2**32 - 1])


def test_a_key_depends_on_everything_before_it_and_on_what_stands_in_it() -> None:
    keys = [
        block_key(ROOT, [1, 2]),
        block_key(ROOT, [2, 1]),
        block_key(ROOT, [1]),
        block_key(ROOT, [1, 2], b"lora"),
        block_key(block_key(ROOT, [1]), [2]),
        block_key(root_key(LAYOUT.fingerprint, b"salt"), [1, 2]),
    ]

    assert len(set(keys)) == len(keys)


def test_extras_never_run_into_one_another() -> None:
    extras = [
        extra_identity(),
        extra_identity("ab"),
        extra_identity("a", [b"b"]),
        extra_identity("", [b"ab"]),
        extra_identity("", [b"a", b"b"]),
        extra_identity("", [b""]),
    ]

    assert len(set(extras)) == len(extras)


class TestChain:
    def test_holds_full_blocks_and_the_rest_only_when_asked(self) -> None:
        assert block_chain(LAYOUT, range(11)).token_counts == (4, 4)
        assert block_chain(LAYOUT, range(11), with_partial=True).token_counts == (4, 4, 3)
        assert block_chain(LAYOUT, range(8), with_partial=True).token_counts == (4, 4)

    def test_shares_its_beginning_with_a_longer_one(self) -> None:
        assert block_chain(LAYOUT, range(8)).keys == block_chain(LAYOUT, range(16)).keys[:2]

    def test_without_a_full_block_is_empty(self) -> None:
        chain = block_chain(LAYOUT, range(3))

        assert (len(chain), chain.token_count, chain.packed_keys, chain.parent) == (0, 0, b"", ROOT)
        assert len(block_chain(LAYOUT, [])) == 0

    def test_a_part_knows_what_it_continues(self) -> None:
        chain = block_chain(LAYOUT, range(12))

        assert chain[:2].parent == chain.parent
        assert chain[1:] == BlockChain(chain.keys[0], chain.keys[1:], (4, 4))
        assert chain[2:2].parent == chain.keys[1]
        with pytest.raises(ValueError, match="gaps"):
            chain[::2]

    def test_extras_belong_to_their_block_and_those_after_it(self) -> None:
        plain, second = block_chain(LAYOUT, range(12)), block_chain(LAYOUT, range(12), extras=[b"", b"image"])

        assert plain.keys[0] == second.keys[0]
        assert not set(plain.keys[1:]) & set(second.keys[1:])


class TestPackedKeys:
    def test_are_split(self) -> None:
        assert split_keys(b"a" * 32 + b"b" * 32, field="keys", count_max=2) == [b"a" * 32, b"b" * 32]

    @pytest.mark.parametrize("size", [0, 1, 31, 33, 95, 96])
    def test_are_refused_when_empty_cut_off_or_too_many(self, size: int) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            split_keys(bytes(size), field="keys", count_max=2)
        assert refusal.value.details == {"field": "keys"}
