"""The rest of a history that exceeds its window: the latest tokens and the sinks, in ranges for a session."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_adapter.truncation import Ranges, keep_on_overflow, keep_without, kept_tokens
from kvservice_api.errors import InvalidRequest


@st.composite
def overflows(draw: st.DrawFn) -> dict[str, Any]:
    """A history, and settings with which a part of it can stay."""
    window = draw(st.integers(2, 3000))
    new_tokens = draw(st.integers(0, window - 1))
    return {
        "token_count": draw(st.integers(0, 5000)),
        "window": window,
        "new_tokens": new_tokens,
        "ratio": draw(st.floats(0.01, 1.0)),
        "sink_tokens": draw(st.integers(0, min(window - 1, 64))),
        "block_tokens": draw(st.none() | st.integers(1, 300)),
    }


def kept_count(keep: Ranges) -> int:
    return sum(count for _, count in keep)


def assert_a_session_takes(keep: Ranges, token_count: int) -> None:
    assert all(count > 0 for _, count in keep)
    assert all(first + count <= after for (first, count), (after, _) in pairwise(keep))
    assert not keep or (keep[0][0] >= 0 and sum(keep[-1]) <= token_count)


@given(overflows())
def test_ranges_ascend_are_disjoint_and_inside_and_what_stays_fits(overflow: dict[str, Any]) -> None:
    keep = keep_on_overflow(**overflow)

    assert_a_session_takes(keep, overflow["token_count"])
    assert kept_count(keep) + overflow["new_tokens"] <= overflow["window"]


@given(overflows())
def test_the_sinks_stay_and_the_rest_is_the_latest_of_the_history(overflow: dict[str, Any]) -> None:
    keep = keep_on_overflow(**overflow)
    sinks = min(overflow["sink_tokens"], overflow["token_count"])

    if sinks + overflow["new_tokens"] > overflow["window"]:
        assert keep == []
        return
    tokens = kept_tokens(keep)
    assert tokens[:sinks].tolist() == list(range(sinks))
    latest = tokens[sinks:]
    assert latest.tolist() == list(range(overflow["token_count"] - len(latest), overflow["token_count"]))


@given(overflows())
def test_what_follows_the_cut_begins_where_a_block_does(overflow: dict[str, Any]) -> None:
    token_count, block_tokens = overflow["token_count"], overflow["block_tokens"]
    keep = keep_on_overflow(**overflow)

    if block_tokens is not None and keep and keep != [(0, token_count)] and sum(keep[-1]) == token_count:
        assert keep[-1][0] % block_tokens == 0


@given(overflows())
def test_no_more_leaves_than_one_step_of_the_ratio_needs(overflow: dict[str, Any]) -> None:
    """One step less would not have been enough."""
    overflow["block_tokens"] = None
    token_count = overflow["token_count"]
    keep = keep_on_overflow(**overflow)
    sinks = min(overflow["sink_tokens"], token_count)
    latest = kept_count(keep) - sinks

    if keep and latest < token_count - sinks and overflow["ratio"] < 1:
        before = (latest + 1) / (1 - overflow["ratio"])  # One step before, at least as many tokens followed the sinks.
        assert sinks + before + overflow["new_tokens"] > overflow["window"]


def test_the_oldest_half_leaves() -> None:
    """The paper's rule, and the same with four sinks."""
    assert keep_on_overflow(2040, window=2048, new_tokens=100, sink_tokens=0) == [(1020, 1020)]
    assert keep_on_overflow(2040, window=2048, new_tokens=100) == [(0, 4), (1022, 1018)]


def test_the_ratio_says_how_much_leaves() -> None:
    assert keep_on_overflow(1000, window=1000, new_tokens=1, ratio=0.25, sink_tokens=0) == [(250, 750)]
    assert keep_on_overflow(1000, window=1000, new_tokens=1, ratio=1.0) == [(0, 4)]


def test_a_long_message_makes_half_leave_again_and_again() -> None:
    assert keep_on_overflow(1600, window=1600, new_tokens=1300, sink_tokens=0) == [(1400, 200)]


def test_a_history_that_fits_stays_whole() -> None:
    assert keep_on_overflow(900, window=1000, new_tokens=100, block_tokens=256) == [(0, 900)]
    assert keep_on_overflow(0, window=1000, new_tokens=999) == []


def test_a_conversation_that_overflows_several_times_never_leaves_its_window_and_keeps_its_first_tokens() -> None:
    window, history = 512, np.empty(0, np.int64)
    overflows = 0
    for turn in range(40):
        new = np.arange(turn * 70, (turn + 1) * 70)
        keep = keep_on_overflow(len(history), window=window, new_tokens=len(new))
        overflows += kept_count(keep) < len(history)
        history = np.concatenate([history[kept_tokens(keep)], new])
        assert len(history) <= window
        assert history[:4].tolist() == [0, 1, 2, 3]
        assert (np.diff(history) > 0).all()
        assert history[-1] == new[-1]
    assert overflows >= 8


def test_after_a_cut_blocks_end_where_the_history_says() -> None:
    """Four sinks, two whole blocks, and a part of a third: the edges are not multiples any more."""
    ends = [4, 260, 516, 616]

    assert keep_on_overflow(616, window=600, new_tokens=50, block_ends=ends) == [(0, 4), (516, 100)]
    assert keep_on_overflow(616, window=600, new_tokens=50, ratio=0.1, block_ends=ends) == [(0, 4), (260, 356)]
    assert keep_on_overflow(616, window=600, new_tokens=590, block_ends=ends) == [(0, 4)]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"new_tokens": 100}, "window"),
        ({"new_tokens": 101}, "window"),
        ({"window": 0}, "window"),
        ({"sink_tokens": 100}, "sink_tokens"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": -0.5}, "ratio"),
        ({"ratio": 1.01}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"token_count": -1}, "token_count"),
        ({"new_tokens": -1}, "new_tokens"),
    ],
)
def test_settings_under_which_nothing_could_stay_are_refused(wrong: dict[str, Any], field: str) -> None:
    settings: dict[str, Any] = {"token_count": 10, "window": 100, "new_tokens": 10, **wrong}

    with pytest.raises(InvalidRequest) as refused:
        keep_on_overflow(**settings)

    assert refused.value.details["field"] == field
    assert str(settings[field]) in refused.value.message


@given(
    st.integers(0, 300).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, max(n - 1, 0)), max_size=n)))
)
def test_a_discard_list_leaves_the_other_tokens(given: tuple[int, list[int]]) -> None:
    token_count, discard = given

    keep = keep_without(token_count, discard)

    assert_a_session_takes(keep, token_count)
    assert kept_tokens(keep).tolist() == sorted(set(range(token_count)) - set(discard))
    assert all(first + count < after for (first, count), (after, _) in pairwise(keep))  # As few ranges as possible.


@pytest.mark.parametrize("discard", [[10], [-1], [3, 99]])
def test_a_discard_list_of_other_tokens_is_refused(discard: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="the history has 10"):
        keep_without(10, discard)
