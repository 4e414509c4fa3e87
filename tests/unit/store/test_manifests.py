"""The arithmetic of session manifests, against a history that is a plain list of tokens."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.index.session_records import Manifest
from kvservice.store.sessions.manifests import SessionAppend, appended, begun, forked, partial_keys, truncated
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import BlockChain, block_key, cut_key, root_key
from kvservice_api.layout import Layout

LAYOUT = Layout(model_id="test", dtype="int8", layers=1, kv_heads=1, k_head_dim=1, v_head_dim=1, block_tokens=4)
UNROTATED = dataclasses.replace(LAYOUT, rotated=False)
ROOT = root_key(LAYOUT.fingerprint)

Token = tuple[bytes, int, int]  # Block, token of it, stored position.


def chain_from(parent: bytes, token_count: int, *, block_tokens: int = 4, seed: int = 0) -> BlockChain:
    """Blocks of so many tokens that continue `parent`."""
    counts = [block_tokens] * (token_count // block_tokens) + [token_count % block_tokens or block_tokens][
        : bool(token_count % block_tokens)
    ]
    keys = []
    key = parent
    for number, count in enumerate(counts):
        key = block_key(key, [seed * 1000 + number] * count)
        keys.append(key)
    return BlockChain(parent, tuple(keys), tuple(counts))


def turn_of(chain: BlockChain, **positions: object) -> SessionAppend:
    return SessionAppend(chain.parent, chain.keys, chain.token_counts[-1], **positions)  # type: ignore[arg-type]


def session_of(token_count: int, layout: Layout = LAYOUT) -> Manifest:
    return begun("chat", 1, layout, turn_of(chain_from(ROOT, token_count)), 1000)


def history(manifest: Manifest) -> list[Token]:
    """Token by token, in the order of a reader."""
    tokens: list[Token] = []
    for each in manifest.slices:
        for number in range(int(each["token_count"])):
            stored = int(each["stored_position"])
            at = int(each["positions_at"])
            position = int(manifest.positions[at + number]) if at >= 0 else stored + number if stored >= 0 else -1
            tokens.append((each["key"].tobytes(), int(each["first_token"]) + number, position))
    return tokens


def kept(tokens: list[Token], keep: list[tuple[int, int]]) -> list[Token]:
    return [token for first, count in keep for token in tokens[first : first + count]]


@st.composite
def ranges(draw: st.DrawFn, total: int) -> list[tuple[int, int]]:
    """Ascending and disjoint; some of them are adjacent."""
    ends = sorted(draw(st.sets(st.integers(0, total), min_size=2, max_size=10)))
    chosen = [(start, end - start) for start, end in pairwise(ends) if draw(st.booleans())]
    return chosen or [(ends[0], ends[-1] - ends[0])]


def test_a_new_session_is_read_where_it_was_stored() -> None:
    session = session_of(10)

    assert (session.revision, session.token_count, session.tail_tokens, session.cuts) == (1, 10, 2, 0)
    assert session.tip == session.slices["key"][1].tobytes()
    assert [position for _, _, position in history(session)] == list(range(10))
    assert partial_keys(session, LAYOUT) == {session.slices["key"][2].tobytes()}


def test_a_fuller_block_takes_the_place_of_the_tail() -> None:
    session = session_of(10)
    longer = chain_from(ROOT, 13)

    grown = appended(session, LAYOUT, turn_of(longer[2:]))

    assert (grown.revision, grown.token_count, grown.tail_tokens, len(grown.slices)) == (2, 13, 1, 4)
    assert grown.slices["key"].tolist() == list(longer.keys)
    assert history(session)[:8] == history(grown)[:8]
    assert session.token_count == 10, "a manifest never changes"


def test_full_blocks_leave_no_tail() -> None:
    session = session_of(8)

    assert (session.tail_tokens, session.tip) == (0, session.slices["key"][-1].tobytes())
    assert partial_keys(session, LAYOUT) == set()


@given(st.data())
def test_what_is_kept_is_what_a_list_would_keep(data: st.DataObject) -> None:
    session = session_of(data.draw(st.integers(2, 40)))
    for _ in range(data.draw(st.integers(1, 4))):
        if session.token_count < 2:
            break
        keep = data.draw(ranges(session.token_count))
        before = history(session)
        after = truncated(session, keep)
        assert history(after) == kept(before, keep)
        assert history(session) == before
        if after is session:
            assert len(kept(before, keep)) == len(before)
        else:
            assert (after.revision, after.cuts, after.has_tail) == (session.revision + 1, session.cuts + 1, False)
        session = after
        if data.draw(st.booleans()):
            more = chain_from(session.tip, data.draw(st.integers(1, 9)), seed=1)
            before = history(session)
            tail = session.tail_tokens
            if not tail or more.token_counts[0] > tail:
                session = appended(session, LAYOUT, turn_of(more))
                assert history(session)[: len(before) - tail] == before[: len(before) - tail]
                new = history(session)[len(before) - tail :]
                assert [position for *_, position in new] == list(
                    range(len(before) - tail, len(before) - tail + len(new))
                )


@given(st.integers(2, 30).flatmap(lambda total: st.tuples(st.just(total), ranges(total))))
def test_positions_that_are_listed_stay_with_their_tokens(case: tuple[int, list[tuple[int, int]]]) -> None:
    total, keep = case
    positions = np.arange(total, dtype=np.uint64) * 7 + 3
    session = begun("chat", 1, LAYOUT, turn_of(chain_from(ROOT, total), stored_positions=positions), 1000)

    after = truncated(session, keep)

    expected = [positions[at] for first, count in keep for at in range(first, first + count)]
    assert [position for *_, position in history(after)] == expected
    if after is not session:
        assert len(after.positions) == len(expected), "positions of tokens that are gone are not kept"
        more = appended(
            after, LAYOUT, turn_of(chain_from(after.tip, 6), stored_positions=np.arange(6, dtype=np.uint64))
        )
        assert [position for *_, position in history(more)] == [*expected, *range(6)]


def test_after_a_cut_the_chain_continues_from_the_key_of_the_cut() -> None:
    session = session_of(10)
    after = truncated(session, [(0, 1), (4, 6)])

    tail = session.slices["key"][-1].tobytes()
    assert after.tip == cut_key(tail, [(0, 1), (4, 6)]), "all tokens before the cut are in its key, the tail's too"
    assert after.tip not in {session.tip, *session.slices["key"].tolist()}
    assert after.tail_tokens == 0, "what was the tail is closed: nothing is merged across the cut"
    more = appended(after, LAYOUT, turn_of(chain_from(after.tip, 3)))
    assert len(more.slices) == len(after.slices) + 1


def test_histories_that_differ_only_in_their_tails_are_cut_into_different_chains() -> None:
    one, other = (
        begun("chat", 1, LAYOUT, SessionAppend(ROOT, [block_key(ROOT, [1, 2, 3, 4]), tail], 2), 0)
        for tail in (block_key(block_key(ROOT, [1, 2, 3, 4]), tokens) for tokens in ([5, 6], [5, 7]))
    )

    assert one.tip == other.tip
    assert truncated(one, [(4, 2)]).tip != truncated(other, [(4, 2)]).tip


def test_ranges_that_touch_are_one() -> None:
    session = session_of(12)

    assert truncated(session, [(2, 3), (5, 4)]).tip == truncated(session, [(2, 7)]).tip
    assert truncated(session, [(0, 5), (5, 7)]) is session


def test_a_block_may_have_several_slices() -> None:
    after = truncated(session_of(8), [(0, 1), (2, 1), (5, 3)])

    assert after.slices["first_token"].tolist() == [0, 2, 1]
    assert after.slices["token_count"].tolist() == [1, 1, 3]
    assert after.slices["stored_position"].tolist() == [0, 2, 5]
    assert len(set(after.slices["key"].tolist())) == 2


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ([], "keep is empty"),
        ([(0, 0)], "a range of keep is empty"),
        ([(0, 11)], "tokens 0..11; the session has 10"),
        ([(0, 2), (10, 1)], r"keep[1] is tokens 10..11"),
        ([(2**64 - 1, 2**64 - 1)], "the session has 10"),
        ([(1, 2**64 - 1)], "the session has 10"),
        ([(5, 2), (0, 2)], "keep[1] descends"),
        ([(0, 5), (4, 2)], "keep[1] overlaps"),
        ([(3, 2), (3, 2)], "keep[1] overlaps"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(keep: list[tuple[int, int]], why: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(why)):
        truncated(session_of(10), keep)


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (turn_of(chain_from(ROOT, 4)), "parent_key"),
        (SessionAppend(chain_from(ROOT, 10).keys[1], [bytes(32)], 1), "extend the session's open tail"),
        (SessionAppend(chain_from(ROOT, 10).keys[1], [bytes(32)], 2), "extend the session's open tail"),
        (SessionAppend(chain_from(ROOT, 10).keys[1], [bytes(32)], 5), "at most 4"),
        (SessionAppend(chain_from(ROOT, 10).keys[1], [bytes(32)], 4, stored_position=2**62), "too large"),
        (
            SessionAppend(chain_from(ROOT, 10).keys[1], [bytes(32)], 4, stored_positions=np.arange(3, dtype=np.uint64)),
            "each of 4 tokens",
        ),
    ],
)
def test_a_turn_that_does_not_continue_the_session_is_refused(turn: SessionAppend, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        appended(session_of(10), LAYOUT, turn)


def test_the_same_tail_again_is_no_error() -> None:
    session = session_of(10)

    again = appended(session, LAYOUT, turn_of(chain_from(ROOT, 10)[2:]))

    assert history(again) == history(session)


def test_keys_that_are_not_rotated_have_no_position() -> None:
    session = session_of(10, UNROTATED)

    assert {position for *_, position in history(truncated(session, [(3, 5)]))} == {-1}
    with pytest.raises(InvalidRequest, match="not rotated"):
        begun("chat", 1, UNROTATED, turn_of(chain_from(ROOT, 4), stored_position=0), 0)


def test_a_fork_has_the_same_history_under_another_id() -> None:
    session = truncated(session_of(10), [(1, 4)])

    other = forked(session, "other", 2000)

    assert (other.session_id, other.revision, other.tip, other.cuts) == ("other", 1, session.tip, 1)
    assert history(other) == history(session)
