"""Parts of foresight: the times of its scans, the price of a read, and the waits in the queue."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvservice.policy.items import Conditions
from kvservice.policy.look_times import LookTimes
from kvservice.policy.queue_waits import QueueWaits
from kvservice.policy.read_price import ReadPrice

# Times of scans


def looked(looks: LookTimes, *, events: int, over_s: float, rows: int = 100, now_s: float = 0.0) -> LookTimes:
    for number in range(events):
        looks.happened(now_s + over_s * (number + 1) / events)
    looks.looked(rows, 40.0, 2.0, now_s + over_s)
    looks.plan(True, True, now_s + over_s)
    return looks


def test_it_looks_at_many_items_after_more_events_than_at_few() -> None:
    for rows, events in ((100, 16), (48_000, 1000)):
        looks = looked(LookTimes(0.0), events=16, over_s=16.0, rows=rows)
        for _ in range(events - 1):
            looks.happened(16.5)
        assert looks.next_s > 16.5
        looks.happened(16.5)
        assert looks.next_s == 16.5


def test_it_looks_by_time_only_while_there_may_be_something_to_fetch() -> None:
    looks = looked(LookTimes(0.0), events=16, over_s=1.6)
    assert looks.next_s == pytest.approx(1.6 + 40 / 32), "often enough to see who comes back soon"
    looks.plan(False, False, 1.6)
    assert looks.soonest_s == math.inf


@pytest.mark.parametrize("over_s", [0.0, 1e-12, 1e-3, 1.0, 1e9])
def test_however_events_come_it_looks_neither_without_end_nor_too_seldom(over_s: float) -> None:
    looks = looked(LookTimes(5.0), events=64, over_s=over_s, now_s=5.0)
    for every_s in (looks.every_s, looks.hinted_every_s):
        assert 40 / 1024 <= every_s <= 40 / 32


def test_hints_are_looked_at_several_times_before_their_requests_come() -> None:
    looks = looked(LookTimes(0.0), events=1000, over_s=1.0, rows=100_000)
    assert looks.hinted_every_s == pytest.approx(2.0 / 8)
    looks.plan(True, False, 1.0)
    looks.hinted(1.0)
    assert looks.hinted_s == pytest.approx(1.25)


# The price of a read


def priced(busy: float, *, mean_bytes: float = 1000.0, written_bytes: int = 0) -> float:
    conditions = Conditions(10**6, 10**9, 1e6, read_busy=busy, written_bytes=written_bytes)
    price = ReadPrice(0.0)
    price.learn(conditions, mean_bytes, 1000.0)
    return price.per_byte * mean_bytes


def test_a_read_costs_next_to_nothing_until_the_ssd_is_busy_and_then_a_hit() -> None:
    assert priced(0.0) == priced(0.8) == pytest.approx(0.01)
    assert 0.01 < priced(0.9) < priced(0.95) < priced(1.0) == pytest.approx(1.0)


def test_writing_keeps_the_ssd_as_busy_as_reading() -> None:
    half_of_the_time = int(500 * 1e6)
    assert priced(0.45, written_bytes=half_of_the_time) == pytest.approx(priced(0.95), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_the_price_is_that_of_an_item_of_mean_size_in_any_unit(scale: float) -> None:
    assert priced(0.9, mean_bytes=1000 * scale) == pytest.approx(priced(0.9))


# Waits in the queue


def waited(*waits_s: float) -> QueueWaits:
    waits = QueueWaits(1)
    for number, wait_s in enumerate(waits_s):
        waits.queued(0, 100.0 * number)
        waits.served(0, 100.0 * number + wait_s)
    waits.learn()
    return waits


def test_before_anything_waited_nothing_is_expected_to() -> None:
    assert QueueWaits(1).shorter(np.array([0.01, 10.0])) == pytest.approx(1.0)


def test_the_share_of_waits_that_are_over_before_a_read_is() -> None:
    shares = waited(*np.random.default_rng(0).uniform(0, 10, 2000).tolist()).shorter(np.array([1.0, 5.0, 9.0]))
    assert shares == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


def test_with_long_waits_almost_everything_is_read_in_time() -> None:
    assert waited(*[1000.0] * 50).shorter(np.array([0.1, 1.0])) == pytest.approx(1e-3)


def test_the_last_waits_count_most() -> None:
    share = waited(*[0.0] * 3000, *[100.0] * 3000).shorter(np.array([1.0]))[0]
    assert share < 0.1


def test_who_was_forgotten_did_not_wait() -> None:
    waits = QueueWaits(1)
    waits.queued(0, 0.0)
    waits.forgotten(0)
    waits.served(0, 100.0)
    waits.learn()
    assert waits.shorter(np.array([1.0])) == pytest.approx(1.0)
