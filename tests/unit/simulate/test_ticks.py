"""Coarse clocks: how a tick is found, and how its requests are spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvservice.simulate.ticks import Tick, spread, tick_of
from kvservice.simulate.traces import read
from kvservice.simulate.workload import AFTER_ANSWER, Workload

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "traces"


def load(arrives_s: list[float], session: list[int] | None = None) -> Workload:
    count = len(arrives_s)
    return Workload(
        name="load",
        session=np.array(range(count) if session is None else session, np.int32),
        arrives_s=np.array(arrives_s, np.float64),
        think_s=np.zeros(count),
        new_tokens=np.arange(count, dtype=np.int32),
        output_tokens=np.ones(count, np.int32),
    )


@pytest.mark.parametrize(
    ("arrives_s", "tick"),
    [
        ([3.0 * n for n in range(10)] + [27.0, 27.0], Tick(3, 3)),
        ([60.0 * n for n in range(10)] + [540.0], Tick(60, 2)),
        ([float(n) for n in range(10)] + [9.0], Tick(1, 2)),
        ([0.1 * 30 * n for n in range(10)] + [27.0], Tick(3, 2)),  # Not exact as binary fractions.
        ([3.0 * n - 0.002 * (n % 3) for n in range(10)] + [27.0], Tick(3, 2)),  # A clock that jitters.
        ([0.0, 0.0, 10.0], Tick(1, 2)),  # Two times attest no tick of 10 s.
        ([3600.0 * n for n in range(10)] + [0.0], Tick(1, 2)),
        ([3.0 * n for n in range(10)], None),  # Each request has a time of its own.
        ([0.0, 0.0, 1.5], None),
        ([0.0, 0.0, AFTER_ANSWER], None),
        ([0.0], None),
        ([], None),
    ],
)
def test_a_tick_is_what_all_times_are_multiples_of_where_requests_share_times(
    arrives_s: list[float], tick: Tick | None
) -> None:
    assert tick_of(load(arrives_s)) == tick


def test_the_requests_of_a_tick_are_spread_evenly_over_it() -> None:
    spread_out = spread(load([0.0, 0.0, 0.0, 3.0, 6.0, 6.0]), Tick(3, 3), seed=1)

    assert sorted(spread_out.arrives_s[:3].tolist()) == [0.0, 1.0, 2.0]
    assert spread_out.arrives_s[3] == 3.0
    assert sorted(spread_out.arrives_s[4:].tolist()) == [6.0, 7.5]


def test_the_turns_of_a_session_keep_their_order_and_requests_their_tick() -> None:
    rng = np.random.default_rng(5)
    session = np.sort(rng.integers(0, 40, 400)).tolist()
    ticks = rng.integers(0, 50, 400)
    arrives = np.concatenate([np.sort(ticks[np.array(session) == each]) for each in sorted(set(session))])
    whole = load(arrives.astype(float).tolist(), session)

    once, again, other = (spread(whole, Tick(1, 2), seed) for seed in (1, 1, 2))

    assert np.floor(once.arrives_s).tolist() == whole.arrives_s.tolist()
    assert len(np.unique(once.arrives_s)) == 400
    same = np.flatnonzero(np.diff(whole.session) == 0)
    assert (once.arrives_s[same + 1] > once.arrives_s[same]).all()
    assert once.arrives_s.tolist() == again.arrives_s.tolist() != other.arrives_s.tolist()
    assert once.new_tokens.tolist() == whole.new_tokens.tolist()


def test_the_conversation_trace_ticks_in_3_s() -> None:
    path = SHARED / "mooncake_conversation_trace.jsonl"
    if not path.exists():
        pytest.skip(f"the trace is not in {SHARED}")

    workload = read(path)
    tick = tick_of(workload)

    assert tick is not None
    assert tick.seconds == 3
    gaps = np.diff(np.sort(spread(workload, tick, 0).arrives_s))
    assert gaps.min() == pytest.approx(3 / tick.most)


def test_the_clock_of_azures_conversations_is_fine() -> None:
    path = SHARED / "azure2023_llm_conv.csv"
    if not path.exists():
        pytest.skip(f"the trace is not in {SHARED}")

    assert tick_of(read(path)) is None
