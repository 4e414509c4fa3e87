"""Valid and invalid inputs of block keys."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import BlockChain, ChainBuilder, block_chain, block_key, extra_identity, root_key, split_keys
from kvservice_api.layout import Layout

LAYOUT = Layout("model", "float16", layers=2, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=4)
ROOT = root_key(LAYOUT.fingerprint)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


class ReadOnly(Sequence[int]):
    """A sequence that is no list, as an engine's view of its token ids."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def __getitem__(self, at: Any) -> Any:
        return self._token_ids[at]

    def __len__(self) -> int:
        return len(self._token_ids)


def keys_one_after_another(parent: bytes, token_ids: list[int], extras: Sequence[bytes] = ()) -> Iterator[bytes]:
    for block, first in enumerate(range(0, len(token_ids), LAYOUT.block_tokens)):
        extra = extras[block] if block < len(extras) else b""
        parent = block_key(parent, token_ids[first : first + LAYOUT.block_tokens], extra)
        yield parent


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
    builder = ChainBuilder(LAYOUT)
    builder.extend([1, 2, 3])
    with pytest.raises(InvalidRequest) as refusal:
        builder.extend(token_ids)
    assert refusal.value.details["field"] == "token_ids"
    assert (builder.token_count, len(builder.chain)) == (3, 0)


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


def kind_of(value: object) -> str:
    """A name that is the same in every process."""
    return type(value).__name__


class TestChainBuilder:
    @given(TOKENS, st.lists(st.integers(0, 40)), st.lists(st.binary(max_size=3), max_size=8))
    def test_gives_the_same_keys_however_the_tokens_are_split(
        self, token_ids: list[int], cuts: list[int], extras: list[bytes]
    ) -> None:
        builder = ChainBuilder(LAYOUT, extra_of_block=lambda block: extras[block] if block < len(extras) else b"")
        ends = sorted(min(cut, len(token_ids)) for cut in cuts)

        for first, end in zip([0, *ends], [*ends, len(token_ids)], strict=True):
            builder.extend(token_ids[first:end])
            expected = tuple(keys_one_after_another(ROOT, token_ids[:end], extras))
            whole = end // LAYOUT.block_tokens
            assert builder.token_count == end
            assert builder.chain.keys == expected[:whole]
            assert builder.prefix(end).keys == expected
            assert builder.prefix(end).token_count == end
        assert block_chain(LAYOUT, token_ids, extras=extras) == builder.chain
        assert block_chain(LAYOUT, token_ids, extras=extras, with_partial=True) == builder.prefix(len(token_ids))

    @given(TOKENS)
    def test_gives_the_chain_of_each_prefix(self, token_ids: list[int]) -> None:
        builder = ChainBuilder(LAYOUT, parent=b"p" * 32)
        builder.extend(token_ids)

        for count in range(len(token_ids) + 1):
            prefix = builder.prefix(count)
            assert (prefix.parent, prefix.token_count) == (b"p" * 32, count)
            assert prefix.keys == tuple(keys_one_after_another(b"p" * 32, token_ids[:count]))

    @given(st.lists(st.integers(0, 127), max_size=20))
    def test_takes_any_sequence_or_array_of_integers(self, token_ids: list[int]) -> None:
        expected = block_chain(LAYOUT, token_ids, with_partial=True)
        others: list[Any] = [tuple(token_ids), ReadOnly(token_ids), array("h", token_ids), bytearray(token_ids)]
        others += [np.array(token_ids, dtype) for dtype in ("u1", "i1", "u2", "<i4", ">u4", "u4", "i8", ">u8")]
        others += [list(np.array(token_ids, np.int64)), np.repeat(np.array(token_ids, np.int32), 2)[::2]]

        for other in others:
            builder = ChainBuilder(LAYOUT)
            builder.extend(other)
            assert builder.prefix(len(token_ids)) == expected

    @pytest.mark.parametrize(
        "token_ids", ["12", b"12", {1, 2}, iter([1, 2]), [True, True], [1, None], [[1]]], ids=kind_of
    )
    def test_refuses_what_is_no_sequence_of_integers(self, token_ids: Any) -> None:
        with pytest.raises(InvalidRequest, match="token ids"):
            ChainBuilder(LAYOUT).extend(token_ids)

    def test_asks_for_the_extra_of_a_block_once_when_it_is_full(self) -> None:
        asked: list[int] = []

        def extra_of_block(block: int) -> bytes:
            asked.append(block)
            return b""

        builder = ChainBuilder(LAYOUT, extra_of_block=extra_of_block)
        for token in range(11):
            builder.extend([token])
            assert len(builder.chain) == len(asked) == (token + 1) // 4
        builder.prefix(8)
        assert asked == [0, 1]
        builder.prefix(10)
        assert asked == [0, 1, 2]

    def test_adds_nothing_when_an_extra_is_not_known(self) -> None:
        extras = {0: b"image"}
        builder = ChainBuilder(LAYOUT, extra_of_block=lambda block: extras[block])
        builder.extend(range(3))
        with pytest.raises(KeyError):
            builder.extend(range(3, 9))
        assert (builder.token_count, len(builder.chain)) == (3, 0)

        extras[1] = b"sound"
        builder.extend(range(3, 9))

        assert builder.chain == block_chain(LAYOUT, range(9), extras=[b"image", b"sound"])

    def test_keeps_a_chain_that_was_taken_earlier(self) -> None:
        builder = ChainBuilder(LAYOUT, salt=b"tenant")
        builder.extend(range(8))
        earlier = builder.chain
        builder.extend(range(8, 12))

        assert earlier == block_chain(LAYOUT, range(8), salt=b"tenant")
        assert builder.chain is builder.chain
        assert builder.chain == block_chain(LAYOUT, range(12), salt=b"tenant")

    def test_can_be_read_by_another_thread_at_any_moment_of_an_extend(self) -> None:
        builder, expected = ChainBuilder(LAYOUT), block_chain(LAYOUT, range(40)).keys
        seen: set[int] = set()

        def read(frame: FrameType, event: str, argument: object) -> Any:
            """What another thread may do between any two lines of `extend`."""
            if frame.f_code is not ChainBuilder.extend.__code__:
                return None
            count = builder.token_count
            for prefix in (builder.chain, builder.prefix(count // 4 * 4)):
                assert prefix.keys == expected[: count // 4]
                assert prefix.token_counts == (4,) * (count // 4)
            seen.add(count)
            return read

        former = sys.gettrace()
        for first in range(0, 40, 10):
            sys.settrace(read)
            try:
                builder.extend(range(first, first + 10))
            finally:
                sys.settrace(former)
        assert seen == {0, 10, 20, 30, 40}

    @pytest.mark.parametrize("count", [-1, 6])
    def test_has_no_prefix_beyond_its_tokens(self, count: int) -> None:
        builder = ChainBuilder(LAYOUT)
        builder.extend(range(5))
        with pytest.raises(InvalidRequest) as refusal:
            builder.prefix(count)
        assert refusal.value.details["field"] == "token_count"

    def test_needs_a_layout(self) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            ChainBuilder("model")  # type: ignore[arg-type]
        assert refusal.value.details["field"] == "layout"


class TestPackedKeys:
    def test_are_split(self) -> None:
        assert split_keys(b"a" * 32 + b"b" * 32, field="keys", count_max=2) == [b"a" * 32, b"b" * 32]

    @pytest.mark.parametrize("size", [0, 1, 31, 33, 95, 96])
    def test_are_refused_when_empty_cut_off_or_too_many(self, size: int) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            split_keys(bytes(size), field="keys", count_max=2)
        assert refusal.value.details == {"field": "keys"}
