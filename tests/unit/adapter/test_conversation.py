"""A conversation's log gives its history, and the expected key of its session's tip."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime

import numpy as np
import pytest

from kvservice_adapter.session import Conversation, Keys
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import block_chain, cut_key
from kvservice_client import Layout, SessionState, Slice

LAYOUT = Layout("test/conversation", "float16", layers=1, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=4)
KEYS = Keys(LAYOUT, b"salt", b"extra")


def said(*token_ids: int) -> Conversation:
    conversation = Conversation("chat")
    conversation.extend(token_ids)
    return conversation


def state_of(conversation: Conversation, *, since: int | None = None, tip: bytes | None = None) -> SessionState:
    """The session in the daemon's form, with the first `since` tokens after the last cut."""
    since = len(conversation.tokens_since_cut) if since is None else since
    parent = conversation.parent(KEYS)
    chain = KEYS.chain(conversation.tokens_since_cut[:since], parent, with_partial=True)
    kept = [Slice(b"x" * 32, 0, conversation.kept_tokens, 4, 0)] if conversation.kept_tokens else []
    slices = tuple(Slice(key, 0, count, count, None) for key, count in zip(chain.keys, chain.token_counts, strict=True))
    tail = since % LAYOUT.block_tokens
    closed = chain[: len(chain) - bool(tail)]
    return SessionState(
        "chat",
        LAYOUT.fingerprint,
        3,
        tip or (closed.keys[-1] if len(closed) else parent),
        tail,
        conversation.kept_tokens + since,
        len(kept) + len(slices),
        len(conversation.cuts),
        datetime.now(UTC),
        (*kept, *slices),
    )


def test_it_grows_and_loses_its_middle() -> None:
    conversation = said(*range(10))
    conversation.truncate([(0, 2), (6, 4)])
    conversation.extend([20, 21])
    assert conversation.token_ids.tolist() == [0, 1, 6, 7, 8, 9, 20, 21]
    assert (conversation.token_count, conversation.kept_tokens, len(conversation.cuts)) == (8, 6, 1)

    conversation.truncate([(1, 1), (5, 3)])
    assert conversation.token_ids.tolist() == [1, 9, 20, 21]
    conversation.reset()
    assert (conversation.token_count, conversation.cuts) == (0, ())


def test_its_keys_continue_from_the_cut_of_the_whole_history() -> None:
    conversation = said(*range(10))
    assert conversation.parent(KEYS) == KEYS.root
    conversation.truncate([(0, 2), (2, 1), (6, 4)])
    whole = block_chain(LAYOUT, range(10), salt=b"salt", extras=[b"extra"] * 3, with_partial=True)
    first = cut_key(whole.keys[-1], [(0, 3), (6, 4)])
    assert conversation.parent(KEYS) == first

    conversation.truncate([(0, 4)])
    assert conversation.parent(KEYS) == cut_key(first, [(0, 4)]), "nothing was said between the cuts"


def test_a_cut_that_keeps_everything_is_not_recorded() -> None:
    conversation = said(1, 2, 3)
    conversation.truncate([(0, 2), (2, 1)])
    assert conversation.cuts == ()


@pytest.mark.parametrize("keep", [[(0, 2), (1, 3)], [(3, 2), (0, 2)], [(0, 0)], [(8, 3)], [(-1, 2)]], ids=str)
def test_ranges_that_overlap_descend_are_empty_or_go_past_the_end_are_refused(keep: list[tuple[int, int]]) -> None:
    conversation = said(*range(10))
    with pytest.raises(InvalidRequest):
        conversation.truncate(keep)
    assert conversation.token_count == 10


def test_a_prompt_that_begins_with_it_is_distinguished_from_one_that_does_not() -> None:
    conversation = said(1, 2, 3)
    assert conversation.is_prefix_of(np.array([1, 2, 3, 4]))
    assert conversation.is_prefix_of(np.array([1, 2, 3]))
    assert not conversation.is_prefix_of(np.array([1, 2]))
    assert not conversation.is_prefix_of(np.array([1, 2, 4, 4]))


def test_its_session_is_known_by_what_was_said_dropped_and_kept() -> None:
    conversation = said(*range(10))
    conversation.truncate([(0, 2), (6, 4)])
    conversation.extend(range(20, 31))

    for since in (0, 3, 4, 7, 8, 11):
        assert conversation.is_of(state_of(conversation, since=since), KEYS), "it may be behind by some turns"
    assert not conversation.is_of(state_of(conversation, tip=b"y" * 32), KEYS)
    assert not conversation.is_of(state_of(conversation), Keys(LAYOUT, b"another salt", b"extra"))

    ahead = conversation.copy()
    ahead.extend([40])
    assert not conversation.is_of(state_of(ahead), KEYS), "tokens that this log does not have"
    other = said(*range(9), 99)
    other.truncate([(0, 2), (6, 4)])
    other.extend(range(20, 31))
    assert not conversation.is_of(state_of(other), KEYS)
    uncut = said(*conversation.token_ids.tolist())
    assert not conversation.is_of(state_of(uncut), KEYS)
    assert not uncut.is_of(state_of(conversation), KEYS)


def test_copies_and_pickles_go_their_own_way() -> None:
    conversation = said(*range(10))
    conversation.truncate([(0, 2), (6, 4)])
    same = [conversation.copy(), pickle.loads(pickle.dumps(conversation))]
    conversation.extend([1])
    conversation.truncate([(0, 3)])

    for each in same:
        assert each.token_ids.tolist() == [0, 1, 6, 7, 8, 9]
        assert each.is_of(state_of(each), KEYS)
