"""Return times of items and of hinted requests, learned per item and over all items."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvservice.policy import hint_times
from kvservice.policy.base import Hint
from kvservice.policy.hint_times import HintTimes
from kvservice.policy.return_times import RECENCY, ReturnTimes
from kvservice.policy.survival import BEGINS, WIDTHS, Floats, bin_of

NOBODY = np.empty(0, np.int64)


def between(begin_s: float, end_s: float) -> slice:
    return slice(int(np.searchsorted(BEGINS, begin_s)), int(np.searchsorted(BEGINS + WIDTHS, end_s)))


def lived(gaps_s: Floats, *, answers: Floats | None = None, learn_every: int = 50) -> ReturnTimes:
    """Items (the first axis) one after the other, each with its consecutive gaps."""
    returns = ReturnTimes(len(gaps_s))
    now_s, seen = 0.0, 0
    for turn in range(gaps_s.shape[1]):
        for row in range(len(gaps_s)):
            returns.start_waiting(row, turn + 1, 0 if answers is None else int(answers[row, turn]), now_s)
            returns.record_return(row, now_s + float(gaps_s[row, turn]))
            seen += 1
            if seen % learn_every == 0:
                returns.learn(NOBODY, now_s)
    returns.learn(NOBODY, now_s)
    return returns


def factors(returns: ReturnTimes, *, uses: int = 10, answers: Floats | None = None) -> Floats:
    for row in range(len(returns.factor)):
        returns.start_waiting(row, uses, 0 if answers is None else int(answers[row]), 0.0)
    return returns.factor.copy()


@pytest.mark.parametrize("seed", range(3))
def test_users_have_a_pace_of_their_own_and_it_finds_out(seed: int) -> None:
    random = np.random.default_rng(seed)
    paces = np.exp(random.normal(0, 0.7, 60))
    returns = lived(30 * paces[:, None] * np.exp(random.normal(0, 0.3, (60, 12))))
    learned = np.log(factors(returns))
    assert np.corrcoef(learned, np.log(paces))[0, 1] > 0.9
    assert learned.std() == pytest.approx(0.7, rel=0.35)


@pytest.mark.parametrize("seed", range(3))
def test_where_all_have_the_same_pace_it_finds_no_other(seed: int) -> None:
    returns = lived(np.random.default_rng(seed).lognormal(3.5, 0.6, (60, 12)))
    assert np.abs(np.log(factors(returns))).max() < 0.25


def test_answers_of_unknown_length_change_nothing_that_the_others_tell() -> None:
    random = np.random.default_rng(1)
    answers = random.integers(20, 2000, (60, 12)).astype(float)
    gaps_s = 0.1 * answers * np.exp(random.normal(0, 0.2, (60, 12)))
    known = lived(gaps_s, answers=answers)
    half = lived(gaps_s, answers=answers * (random.random((60, 12)) < 0.5))
    lengths = np.geomspace(20, 2000, 60)
    assert np.abs(np.log(factors(half, answers=lengths) / factors(known, answers=lengths))).max() < 0.2
    assert np.ptp(np.log(factors(half))) < np.ptp(np.log(factors(half, answers=lengths))) / 4, "unknown: as the mean"


def test_who_has_more_to_read_comes_back_later() -> None:
    random = np.random.default_rng(1)
    answers = np.exp(random.normal(5, 1, (80, 8)))
    returns = lived(answers**0.5 * np.exp(random.normal(0, 0.2, (80, 8))), answers=answers)
    short, long = factors(returns, answers=np.array([50.0, 800.0] + [150.0] * 78))[:2]
    assert long / short == pytest.approx(4, rel=0.25)


def test_the_age_counts_from_the_last_use_and_in_the_items_own_pace() -> None:
    returns = ReturnTimes(2)
    returns.start_waiting(0, 1, 0, 100.0)
    returns.factor[0] = 2.0
    assert returns.ages(np.array([0]), 130.0) == pytest.approx([15.0])
    assert returns.hazard(0, 130.0) == pytest.approx(0.5 * returns.hazards[0, np.searchsorted(BEGINS, 15.0) - 1])
    assert returns.hazard(1, 130.0) == 0.0, "no return of it is awaited"


def test_a_row_that_was_forgotten_starts_again_with_the_prior() -> None:
    random = np.random.default_rng(2)
    returns = lived(30 * np.array([[0.1], [1], [10]]) * random.lognormal(0, 0.2, (3, 60)), learn_every=10)
    assert factors(returns)[0] < 0.5
    for row in range(3):
        returns.forgotten(row, 1000.0)
        returns.start_waiting(row, 1, 0, 2000.0)
    assert np.ptp(returns.factor) == 0.0, "all of them are newcomers"


def test_what_was_forgotten_while_it_was_waited_for_had_not_come_by_then() -> None:
    """It counts as waiting until that age, unlike a row whose return was never awaited."""
    known = []
    for forgotten in (False, True):
        returns = ReturnTimes(1000)
        for row in range(1000):
            returns.start_waiting(row, 1, 0, 0.0)
            if row % 2:
                returns.record_return(row, 10.0)
            elif forgotten:
                returns.forgotten(row, 20.0)
        returns.learn(np.flatnonzero(~np.isnan(returns.since_s)), 20.0)
        known.append(returns.hazards[0, bin_of(10.0)])
    assert known[1] == pytest.approx(known[0], rel=0.1)
    assert known[1] * WIDTHS[bin_of(10.0)] < 1.2, "half of them never came"


def test_without_learning_it_knows_recency_for_ever() -> None:
    returns = ReturnTimes(4, learning=False)
    for turn in range(200):
        for row in range(4):
            returns.start_waiting(row, turn + 1, 100, turn * 100.0)
            returns.record_return(row, turn * 100.0 + 50)
        returns.learn(NOBODY, turn * 100.0)
    assert (returns.hazards == RECENCY).all() and (returns.factor == 1).all()
    assert (np.diff(returns.hazards[0, 1:]) <= 0).all(), "the longer ago, the less likely"


# Hints


def hinted(leads_s: Floats, *, wrong: int = 0, likely: float = 1.0, after_s: float = 60.0) -> HintTimes:
    """Requests at these times after a typing hint, and hints without a request for `after_s`."""
    hints = HintTimes(len(leads_s) + wrong)
    rows = np.arange(len(leads_s) + wrong)
    for row in rows[len(leads_s) :].tolist():
        hints.hinted(row, Hint.TYPING, likely, 100.0 - after_s)
    for half in (rows[: len(leads_s) : 2], rows[1 : len(leads_s) : 2]):
        for row in half.tolist():
            hints.hinted(row, Hint.TYPING, likely, 100.0 - float(leads_s[row]))
        for row in half.tolist():
            hints.record_return(row, 0.02, 0.1, 100.0)
        hints.learn(rows[len(leads_s) :], 100.0)
    return hints


def test_the_lead_of_a_hint_is_learned() -> None:
    hints = hinted(np.random.default_rng(0).uniform(2, 5, 2000))
    of_class = hints.hazards[2]
    assert of_class[between(2.4, 4.8)].min() > 0.2 > 0.02 > of_class[between(0.2, 1.6)].max()
    assert hints.soonest_s[2] == pytest.approx(2.0, abs=0.4)
    assert hints.unannounced_share < 0.6, "of the second half, hardly a request came unannounced"


def test_wrong_hints_are_believed_as_often_as_they_are_true() -> None:
    leads_s = np.random.default_rng(0).uniform(2, 5, 2000)
    true, doubted = (hinted(leads_s, wrong=wrong).hazards[2, between(2, 2.8)].mean() for wrong in (0, 3000))
    assert doubted / true == pytest.approx(0.4, rel=0.2)


def test_hints_of_which_none_is_true_announce_nothing() -> None:
    hints = hinted(np.empty(0), wrong=3000)
    assert (hints.hazards[2] * WIDTHS)[between(0.5, 30)].max() < 5e-3
    for row in range(100):
        hints.record_return(row, 0.02, 0.1, 130.0)
    assert hints.unannounced_share == pytest.approx(1.0)


def test_a_hint_that_comes_too_late_to_read_announces_nothing() -> None:
    hints = HintTimes(1)
    for turn in range(500):
        hints.hinted(0, Hint.TYPING, 1.0, turn * 10.0)
        hints.record_return(0, 0.02, 1.0, turn * 10.0 + 0.5)
        hints.learn(NOBODY, turn * 10.0)
    assert hints.unannounced_share == 1.0


def test_the_same_hint_is_doubted_where_a_return_was_unlikely() -> None:
    """Right after an answer, most hints are wrong: users read first."""
    hints = HintTimes(4000)
    for row in range(4000):
        hints.hinted(row, Hint.TYPING, 0.1 if row % 2 else 2.0, 0.0)
    for row in range(0, 4000, 2):
        hints.record_return(row, 0.02, 0.1, 3.0)
    hints.learn(np.arange(1, 4000, 2), 30.0)
    unlikely, likely = hints.hazards[0, between(2, 4)].max(), hints.hazards[2, between(2, 4)].max()
    assert likely > 20 * unlikely


def test_who_said_to_have_ended_is_not_expected_until_he_is_seen_to_come_back() -> None:
    hints = HintTimes(1000)
    hints.hinted(0, Hint.ENDED, 1.0, 0.0)
    assert hints.in_class[0] >= hint_times.ENDED and not hints.expected
    assert hints.hazards[hint_times.ENDED :].max() < 1e-8
    for row in range(1000):
        hints.hinted(row, Hint.ENDED, 1.0, 0.0)
        hints.record_return(row, 0.02, 0.1, 20.0)
    hints.learn(NOBODY, 20.0)
    assert hints.hazards[hint_times.ENDED :, between(12, 30)].max() > 0.05


def test_a_second_hint_counts_from_its_own_time() -> None:
    hints = HintTimes(1)
    hints.hinted(0, Hint.TYPING, 1.0, 0.0)
    hints.hinted(0, Hint.TOOL_CALL, 1.0, 7.0)
    assert hints.since_s[0] == 7.0 and hints.in_class[0] == hint_times.TOOL_CALL
    hints.cancel(0, 9.0)
    assert hints.in_class[0] == hint_times.NONE and not hints.expected


def test_times_that_are_not_numbers_are_nobodys() -> None:
    hints = HintTimes(2)
    hints.hinted(0, Hint.TYPING, 1.0, 0.0)
    assert math.isnan(ReturnTimes(1).since_s[0]) and math.isnan(hints.since_s[1])


def test_a_hint_is_used_up_by_the_request_that_it_announced() -> None:
    hints = HintTimes(1)
    hints.hinted(0, Hint.TYPING, 1.0, 0.0)
    hints.record_return(0, 0.02, 0.1, 3.0)
    assert hints.in_class[0] == hint_times.NONE and not hints.expected


def test_items_count_by_the_value_of_a_use() -> None:
    """Blocks that a request reads together are one item: how they are grouped changes little of what is learned."""
    grouped, single = ReturnTimes(1000), ReturnTimes(3000)
    for row, gap_s in enumerate(np.random.default_rng(5).uniform(1, 100, 1000).tolist()):
        now_s, blocks = 1e4 * row, 3 if gap_s < 50 else 1
        grouped.start_waiting(row, 1, 0, now_s, value=float(blocks))
        grouped.record_return(row, now_s + gap_s)
        for block in range(blocks):
            single.start_waiting(3 * row + block, 1, 0, now_s)
            single.record_return(3 * row + block, now_s + gap_s)
    for returns in (grouped, single):
        returns.learn(NOBODY, 1e6)

    short, long = bin_of(30.0), bin_of(80.0)
    of_grouped, of_single = (returns.hazards[0, short] / returns.hazards[0, long] for returns in (grouped, single))
    assert of_grouped == pytest.approx(of_single, rel=0.1)
