from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice.policy.items import HINTS
from kvservice.simulate.generate import people, sharegpt
from kvservice.simulate.generated_hints import with_typing_hints
from kvservice.simulate.think_times import SHAPES, return_times
from kvservice.simulate.workload import Workload

LARGE = 40_000


@cache
def large_sharegpt() -> Workload:
    return sharegpt(sessions=LARGE, seed=3)


@cache
def large_people() -> Workload:
    return people(users=LARGE // 2, start_tokens=1000, seed=3)


def turn_counts(workload: Workload) -> NDArray[np.int64]:
    return np.bincount(workload.session)


def first_turns(workload: Workload) -> NDArray[np.bool_]:
    first: NDArray[np.bool_] = np.diff(workload.session, prepend=-1) != 0
    return first


def same(left: Workload, right: Workload) -> bool:
    columns = ("session", "arrives_s", "think_s", "new_tokens", "output_tokens")
    hints = ("turn", "kind", "lead_s")
    return all(
        np.array_equal(getattr(left, name), getattr(right, name), equal_nan=name == "arrives_s") for name in columns
    ) and all(np.array_equal(getattr(left.hints, name), getattr(right.hints, name)) for name in hints)


def test_conversations_are_as_long_as_those_of_sharegpt() -> None:
    counts = turn_counts(large_sharegpt())

    assert (counts > 1).mean() == pytest.approx(0.73, abs=0.02)
    assert counts.mean() == pytest.approx(5.75, rel=0.05)
    assert counts.max() <= 40


def test_conversations_have_as_many_tokens_as_those_of_sharegpt() -> None:
    workload = large_sharegpt()

    tokens = np.bincount(workload.session, workload.new_tokens + workload.output_tokens)

    assert (tokens > 2048).mean() == pytest.approx(0.47, abs=0.02)
    assert (tokens > 4096).mean() == pytest.approx(0.30, abs=0.02)
    assert workload.new_tokens.min() >= 1
    assert workload.output_tokens.min() >= 1


def test_users_of_the_interactive_service_are_as_measured() -> None:
    workload = large_people()
    counts, first = turn_counts(workload), first_turns(workload)

    assert 21 <= counts.mean() <= 23
    assert 45 <= np.quantile(counts, 0.9) <= 48
    assert workload.new_tokens[~first].mean() == pytest.approx(35, rel=0.01)
    assert workload.output_tokens.mean() == pytest.approx(44, rel=0.01)
    assert workload.new_tokens[first].mean() == pytest.approx(1035, rel=0.02)
    gaps, _ = return_times(workload)
    assert np.quantile(gaps, [0.01, 0.05, 0.1, 0.5, 0.9, 0.99]) == pytest.approx([6, 12, 18, 43, 87, 140], rel=0.02)


def rank_correlation(first: Any, second: Any) -> float:
    ranks = [np.argsort(np.argsort(each)) for each in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def test_users_gaps_follow_the_length_of_the_answer_as_at_the_service() -> None:
    workload = people(users=5000, seed=3)
    again = np.flatnonzero(~first_turns(workload))
    gaps, answers = workload.think_s[again], workload.output_tokens[again - 1]
    explained = np.corrcoef(np.log(19 + 0.63 * answers), np.log(gaps))[0, 1] ** 2
    assert explained == pytest.approx(0.53, abs=0.03)  # At the service 0.59.
    assert rank_correlation(gaps, answers) == pytest.approx(0.75, abs=0.02)
    twice = np.flatnonzero(np.diff(again) == 1)
    assert rank_correlation(gaps[twice + 1], gaps[twice]) == pytest.approx(0.30, abs=0.02)


def test_sessions_of_users_grow_from_nothing() -> None:
    workload = people(users=5000, seed=3)
    assert workload.new_tokens[first_turns(workload)].mean() == pytest.approx(80, rel=0.02)


def test_without_a_share_of_answers_gaps_depend_on_nothing_and_are_the_same_ones() -> None:
    apart = people(users=2000, answer_share=0, seed=3)
    again = np.flatnonzero(~first_turns(apart))
    assert abs(rank_correlation(apart.think_s[again], apart.output_tokens[again - 1])) < 0.02
    follow = people(users=2000, seed=3)
    assert return_times(follow)[0].mean() == pytest.approx(return_times(apart)[0].mean(), rel=0.02)


@pytest.mark.parametrize("share", [-0.1, 0.9])
def test_a_share_that_leaves_no_room_for_users_paces_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"answer_share must be from 0 to 0.88"):
        people(users=2, answer_share=share)


def test_a_start_may_be_the_same_for_all_or_nothing() -> None:
    same_for_all = people(users=50, start_tokens=500, start_sigma=0, seed=1)
    none = people(users=50, start_tokens=0, seed=1)

    first = first_turns(none)
    assert (same_for_all.new_tokens[first] == none.new_tokens[first] + 500).all()


@pytest.mark.parametrize("make", [sharegpt, people])
def test_the_seed_decides_everything(make: Any) -> None:
    options: dict[str, Any] = {"typing_lead_s": (2, 5), "false_hints": 0.3}

    assert same(make(seed=7, **options), make(seed=7, **options))
    assert not same(make(seed=7, **options), make(seed=8, **options))


def test_sessions_begin_at_the_rate_and_continue_after_the_answer() -> None:
    workload = sharegpt(sessions=LARGE, session_rate=4.0, seed=1)
    first = first_turns(workload)
    begins = workload.arrives_s[first]

    assert np.isnan(workload.arrives_s[~first]).all()
    assert (workload.think_s[first] == 0).all()
    between = np.diff(begins)
    assert (between >= 0).all()
    assert between.mean() == pytest.approx(0.25, rel=0.02)
    assert between.std() == pytest.approx(0.25, rel=0.03)  # As of a Poisson process.


@pytest.mark.parametrize("shape", SHAPES)
def test_think_times_have_the_mean_that_was_asked_for(shape: Any) -> None:
    workload = sharegpt(sessions=LARGE, think_s=12.0, shape=shape, seed=2)

    gaps, never = return_times(workload)

    assert gaps.mean() == pytest.approx(12.0, rel=0.02)
    assert never == pytest.approx(LARGE / workload.turns)


def test_every_think_time_is_above_zero() -> None:
    workload = sharegpt(sessions=100, think_s=0.0, typing_lead_s=(2, 5), false_hints=0.5)

    assert (workload.think_s == 0).all()
    assert (workload.hints.lead_s == 0).all()
    assert (workload.hints.turn > 0).all()  # There is no think time in which a wrong hint could occur.


def test_the_models_window_is_reported() -> None:
    assert sharegpt(sessions=1).context_tokens == 4096
    assert people(users=1, context_tokens=2048).context_tokens == 2048


def test_users_may_have_a_pace_of_their_own() -> None:
    def spread_of_means(workload: Workload) -> float:
        again = ~first_turns(workload)
        counts = np.bincount(workload.session[again], minlength=workload.sessions)
        sums = np.bincount(workload.session[again], workload.think_s[again], minlength=workload.sessions)
        return float(np.log(sums[counts > 10] / counts[counts > 10]).std())

    assert spread_of_means(people(users=3000, pace_sigma=0.7, answer_share=0, seed=1)) == pytest.approx(0.7, abs=0.05)
    assert spread_of_means(people(users=3000, answer_share=0, seed=1)) < 0.2


def test_longer_answers_may_take_longer_to_think_about() -> None:
    def correlation(workload: Workload) -> float:
        again = np.flatnonzero(~first_turns(workload))
        return float(np.corrcoef(workload.output_tokens[again - 1], workload.think_s[again])[0, 1])

    slower = people(users=3000, answer_power=0.5, answer_share=0, seed=1)

    assert correlation(slower) > 0.4
    assert abs(correlation(people(users=3000, answer_share=0, seed=1))) < 0.05
    assert return_times(slower)[0].mean() == pytest.approx(49.2, rel=0.02)


class TestHints:
    def test_a_hint_goes_ahead_of_every_request_but_the_first(self) -> None:
        workload = people(users=300, typing_lead_s=(2.0, 5.0), seed=1)
        hints = workload.hints

        assert hints.turn.tolist() == np.flatnonzero(~first_turns(workload)).tolist()
        assert {HINTS[kind] for kind in hints.kind} == {"typing"}
        assert (hints.lead_s <= 5.0).all()
        assert (hints.lead_s <= workload.think_s[hints.turn]).all()
        early = workload.think_s[hints.turn] > 5.0
        assert hints.lead_s[early].min() >= 2.0
        assert hints.lead_s[early].mean() == pytest.approx(3.5, rel=0.02)

    @pytest.mark.parametrize("share", [0.25, 0.6, 0.9])
    def test_as_many_are_wrong_as_were_asked_for(self, share: float) -> None:
        hints = people(users=300, typing_lead_s=(2, 5), false_hints=share, seed=1).hints

        assert (hints.turn < 0).mean() == pytest.approx(share, abs=1e-3)

    def test_wrong_ones_come_at_any_moment_of_a_think_time_and_more_often_in_longer_ones(self) -> None:
        workload = people(users=2000, typing_lead_s=(2, 5), false_hints=0.6, seed=1)
        hints = workload.hints
        wrong = hints.turn < 0
        next_turn = -hints.turn[wrong]
        think, since = workload.think_s[next_turn], hints.lead_s[wrong]

        assert (workload.session[next_turn] == workload.session[next_turn - 1]).all()
        assert since.min() >= 0
        assert (since <= think * (1 + 1e-9) + 1e-6).all()
        assert (since / think).mean() == pytest.approx(0.5, abs=0.01)
        gaps, _ = return_times(workload)
        assert think.mean() == pytest.approx((gaps**2).mean() / gaps.mean(), rel=0.02)

    def test_they_follow_one_another_by_answer_and_then_by_time(self) -> None:
        workload = people(users=300, typing_lead_s=(0, 20), false_hints=0.7, seed=1)
        hints = workload.hints
        wrong = hints.turn < 0

        answer = np.where(wrong, -hints.turn - 1, hints.turn - 1)
        at = np.where(wrong, hints.lead_s, workload.think_s[answer + 1] - hints.lead_s)

        assert (np.diff(answer) >= 0).all()
        assert (np.diff(at)[np.diff(answer) == 0] >= -1e-6).all()

    def test_a_trace_of_sessions_may_get_them_too(self) -> None:
        bare = Workload(
            name="trace",
            session=np.array([0, 0, 0, 1, 2, 2], np.int32),
            arrives_s=np.array([0.0, 1.0, 11.0, 2.0, 3.0, 23.0]),
            think_s=np.zeros(6),
            new_tokens=np.ones(6, np.int32),
            output_tokens=np.ones(6, np.int32),
        )

        hints = with_typing_hints(bare, (2, 5), 0.0, seed=1).hints

        assert hints.turn.tolist() == [1, 2, 5]
        assert hints.lead_s[0] == 1.0  # Not before the request above.
        assert ((hints.lead_s[1:] >= 2) & (hints.lead_s[1:] <= 5)).all()

    def test_a_workload_keeps_the_hints_that_it_has(self) -> None:
        workload = people(users=3, typing_lead_s=(2, 5))

        with pytest.raises(ValueError, match="has hints of its own"):
            with_typing_hints(workload, (2, 5), 0.0, seed=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sessions": 0}, "sessions must be 1 or more"),
        ({"session_rate": 0.0}, "rate of arrivals must be above 0"),
        ({"session_rate": float("nan")}, "rate of arrivals must be above 0"),
        ({"think_s": -1.0}, "think_s must be 0 or more"),
        ({"think_s": float("inf")}, "think_s must be 0 or more"),
        ({"shape": "square"}, "unknown shape of think times 'square': one of people, exponential,"),
        ({"context_tokens": -1}, "context_tokens must not be negative"),
        ({"typing_lead_s": (5, 2)}, "0 <= A <= B, not 5 to 2"),
        ({"typing_lead_s": (-1, 2)}, "0 <= A <= B"),
        ({"false_hints": 0.5}, "there must be typing hints"),
        ({"typing_lead_s": (2, 5), "false_hints": 1.0}, "must be 0 or more and below 1"),
        ({"typing_lead_s": (2, 5), "false_hints": -0.1}, "must be 0 or more and below 1"),
    ],
)
def test_load_that_cannot_be_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sharegpt(**options)


_PEAK_GIB = """
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
_GENERATED = """
from kvservice.simulate.generate import sharegpt
assert sharegpt(sessions=870_000, typing_lead_s=(2, 5), false_hints=0.6).turns > 4_950_000
"""
_READ = """
import sys
from pathlib import Path
from kvservice.simulate.traces import read
path = Path(sys.argv[1])
with path.open("w") as file:
    for number in range(5_000_000):
        file.write(f'{{"t": {number}, "session": "user-{number}", "turn": 0, "new_tokens": 3, "output_tokens": 4}}\\n')
assert read(path).sessions == 5_000_000
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [_GENERATED, _READ], ids=["generated", "read"])
def test_five_million_turns_take_less_than_a_gibibyte(script: str, tmp_path: Any) -> None:
    command = [sys.executable, "-c", script + _PEAK_GIB, str(tmp_path / "trace")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)

    assert float(done.stdout) < 1.0
