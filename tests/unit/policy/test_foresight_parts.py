"""Parts of foresight: the times of its scans, the price of a read, and the waits in the queue."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvservice.policy.items import Conditions
from kvservice.policy.look_times import LookTimes
from kvservice.policy.queue_waits import QueueWaits
from kvservice.policy.read_budget import ReadBudget
from kvservice.policy.survival import places_of

# Times of scans


def looked(looks: LookTimes, *, events: int, over_s: float, rows: int = 100, now_s: float = 0.0) -> LookTimes:
    for number in range(events):
        looks.happened(now_s + over_s * (number + 1) / events)
    looks.looked(rows, 40.0, 2.0, now_s + over_s)
    looks.plan(True, True, now_s + over_s)
    return looks


def test_it_looks_at_many_items_after_more_events_than_at_few() -> None:
    for rows, events in ((100, 32), (48_000, 2000)):
        looks = looked(LookTimes(0.0), events=32, over_s=32.0, rows=rows)
        for _ in range(events - 1):
            looks.happened(32.5)
        assert looks.next_s > 32.5
        looks.happened(32.5)
        assert looks.next_s == 32.5


def test_it_looks_by_time_only_while_there_may_be_something_to_fetch() -> None:
    looks = looked(LookTimes(0.0), events=32, over_s=3.2)
    assert looks.next_s == pytest.approx(3.2 + 40 / 16), "often enough to see who comes back soon"
    looks.plan(False, False, 3.2)
    assert looks.soonest_s == math.inf


@pytest.mark.parametrize("over_s", [0.0, 1e-12, 1e-3, 1.0, 1e9])
def test_however_events_come_it_looks_neither_without_end_nor_too_seldom(over_s: float) -> None:
    looks = looked(LookTimes(5.0), events=64, over_s=over_s, now_s=5.0)
    for every_s in (looks.every_s, looks.hinted_every_s):
        assert 40 / 1024 <= every_s <= 40 / 16


def test_hints_are_looked_at_several_times_before_their_requests_come() -> None:
    looks = looked(LookTimes(0.0), events=1000, over_s=1.0, rows=100_000)
    assert looks.hinted_every_s == pytest.approx(2.0 / 4)
    looks.plan(True, False, 1.0)
    looks.hinted(1.0)
    assert looks.hinted_s == pytest.approx(1.5)


# What may be read ahead

MIB = 2**20
BANDWIDTH = 100 * MIB


def watched(
    *, seconds: int = 300, found: int = 0, in_dram: int = 0, read: int | None = None, ahead: int = 0, written: int = 0
) -> tuple[ReadBudget, Conditions]:
    """Each second, requests find so many MiB on SSD and in DRAM, of which `read` are read for them; None: all."""
    conditions = Conditions(1000 * MIB, 10**12, BANDWIDTH)
    budget = ReadBudget(0.0)
    for second in range(seconds):
        budget.used(in_dram * MIB, (in_dram + found) * MIB)
        conditions.demand_read_bytes += (found if read is None else read) * MIB
        conditions.read_bytes += ((found if read is None else read) + ahead) * MIB
        conditions.written_bytes += written * MIB
        budget.learn(conditions, 0.0, 1.0, second + 1.0)
    return budget, conditions


def test_a_read_costs_next_to_nothing_until_requests_keep_the_ssd_busy_and_then_a_hit() -> None:
    idle, some, much, all_of_it = (watched(found=found)[0].per_density for found in (10, 40, 80, 100))
    assert idle == some == pytest.approx(0.01)
    assert 0.01 < much < all_of_it == pytest.approx(1.0, rel=0.1)


def test_writing_keeps_the_ssd_as_busy_as_reading() -> None:
    assert watched(found=40, written=40)[0].per_density == pytest.approx(watched(found=80)[0].per_density)


def test_reads_ahead_have_what_requests_leave_and_a_fifth_while_the_ssd_is_busy() -> None:
    shares = {}
    for found in (10, 60, 90):
        budget, conditions = watched(found=found)
        shares[found] = budget.readable_bytes(conditions, 1.0) / BANDWIDTH
    assert shares == pytest.approx({10: 0.9, 60: 0.2, 90: 0.1}, rel=0.1)


def test_what_is_coming_is_read_before_more_is_asked_for() -> None:
    budget, conditions = watched(found=10)
    conditions.read_backlog_s = 1.0
    assert budget.readable_bytes(conditions, 1.0) < 0


def test_all_reads_stay_near_those_of_a_store_that_reads_nothing_ahead() -> None:
    """Half of what requests find is read ahead of them, and requests compute half of the rest again."""
    least = watched(found=20, in_dram=20, read=10, ahead=5)[0]
    much = watched(found=20, in_dram=20, read=10, ahead=20)[0]
    assert least.allowance_bytes > 0 and least.per_density == pytest.approx(0.01)
    assert much.allowance_bytes < 0 and much.per_density == pytest.approx(1.0)


def test_a_store_that_does_not_count_its_reads_has_no_allowance_to_keep() -> None:
    budget, conditions = ReadBudget(0.0), Conditions(1000 * MIB, 10**12, BANDWIDTH)
    budget.learn(conditions, 0.0, 1.0, 1.0)
    assert budget.allowance_bytes == math.inf
    assert budget.readable_bytes(conditions, 2.0) == 2.0 * BANDWIDTH


# Waits in the queue


def waited(*waits_s: float) -> QueueWaits:
    waits = QueueWaits()
    for number, wait_s in enumerate(waits_s):
        waits.queued(0, 100.0 * number)
        waits.served(0, 100.0 * number + wait_s)
    waits.learn()
    return waits


def test_before_anything_waited_nothing_is_expected_to() -> None:
    assert QueueWaits().shorter(places_of(np.array([0.01, 10.0]))) == pytest.approx(1.0)


def test_the_share_of_waits_that_are_over_before_a_read_is() -> None:
    shares = waited(*np.random.default_rng(0).uniform(0, 10, 2000).tolist()).shorter(
        places_of(np.array([1.0, 5.0, 9.0]))
    )
    assert shares == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


def test_with_long_waits_almost_everything_is_read_in_time() -> None:
    assert waited(*[1000.0] * 50).shorter(places_of(np.array([0.1, 1.0]))) == pytest.approx(1e-3)


def test_the_last_waits_count_most() -> None:
    share = waited(*[0.0] * 3000, *[100.0] * 3000).shorter(places_of(np.array([1.0])))[0]
    assert share < 0.1


def test_who_was_forgotten_did_not_wait() -> None:
    waits = QueueWaits()
    waits.queued(0, 0.0)
    waits.forgotten(0)
    waits.served(0, 100.0)
    waits.learn()
    assert waits.shorter(places_of(np.array([1.0]))) == pytest.approx(1.0)
