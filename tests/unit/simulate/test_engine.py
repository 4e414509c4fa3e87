"""Workloads of a few turns, with results computed by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy import FifoPolicy, LruPolicy
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.engine import CONTENDERS, Engine, simulate
from kvservice.simulate.result import Result
from kvservice.simulate.workload import Hints
from tests.workloads import Request, machine, paths, sessions

A, B, C = 0, 1, 2


def shares(result: Result) -> tuple[float, float, float, float]:
    return result.dram_on_time, result.dram_late, result.ssd, result.miss


class PromotesAt(LruPolicy):
    """Requests one session's KV at one time."""

    name: ClassVar[str] = "promotes-at"

    def __init__(self, row: int, at_s: float, deadline_s: float, worth: float = math.inf) -> None:
        self.look_at_s = at_s
        self._promotion = Promotion(row, deadline_s, worth)

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        self.look_at_s = math.inf
        return [self._promotion]


def test_what_dram_still_has_is_on_time() -> None:
    result = simulate(sessions(Request(A, 0.0), Request(A, 10.0)), machine(), "lru")
    assert shares(result) == (1, 0, 0, 0)
    assert (result.turns, result.turns_with_history) == (2, 1)
    assert (result.hit_rate, result.hit_rate_history) == (0.5, 1)
    assert result.ttft_p99_s == pytest.approx(0.03)  # Thirty new tokens.


def test_what_left_dram_is_read_from_ssd_while_its_request_waits() -> None:
    # A's 50 bytes are on SSD at 6 s. B's answer at 11 s takes A's place in DRAM; A needs 5 s to come back.
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 20.0))
    result = simulate(turns, machine(dram_bytes=60), "lru")
    assert shares(result) == (0, 0, 1, 0)
    assert result.ttft_mean_s == pytest.approx((0.03 + 0.03 + 5.03) / 3)
    assert result.read_gb * 2**30 == 50


def test_what_no_tier_has_is_computed_again() -> None:
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 20.0))
    result = simulate(turns, machine(dram_bytes=60, ssd_bytes=0), "lru")
    assert shares(result) == (0, 0, 0, 1)
    assert result.ttft_mean_s == pytest.approx((0.03 + 0.03 + 0.08) / 3)


def test_of_a_running_promotion_the_moved_bytes_are_on_time_and_the_others_late() -> None:
    # From 18 s on A comes back: 20 of its 50 bytes are there at 20 s, the rest takes 3 s more.
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 20.0))
    result = simulate(turns, machine(dram_bytes=60), PromotesAt(A, 18.0, 20.0))
    assert shares(result) == (0.4, 0.6, 0, 0)
    assert result.ttft_mean_s == pytest.approx((0.03 + 0.03 + 3.03) / 3)
    assert result.promoted_unused_gb == 0


def test_a_promotion_in_time_makes_it_on_time() -> None:
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 30.0))
    result = simulate(turns, machine(dram_bytes=60), PromotesAt(A, 25.0, 30.0))
    assert shares(result) == (1, 0, 0, 0)


def test_a_promotion_does_not_wait_for_the_copy_of_what_leaves_for_it() -> None:
    # At 15 s ten of B's bytes are not on SSD yet: they are written after A's have come.
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 20.0))
    result = simulate(turns, machine(dram_bytes=60), PromotesAt(A, 15.0, 20.0))
    assert shares(result) == (1, 0, 0, 0)
    assert result.ssd_written_gb * 2**30 >= 100


def test_nothing_that_is_worth_as_much_leaves_for_a_promotion() -> None:
    # LRU's worth is the number of the use: B's is the second.
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 30.0))
    refused = simulate(turns, machine(dram_bytes=50), PromotesAt(A, 25.0, 30.0, worth=2.0))
    assert shares(refused) == (0, 0, 1, 0)
    made = simulate(turns, machine(dram_bytes=50), PromotesAt(A, 25.0, 30.0, worth=2.5))
    assert shares(made) == (1, 0, 0, 0)


def test_bytes_that_were_promoted_for_nothing_are_counted() -> None:
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(C, 30.0))
    result = simulate(turns, machine(dram_bytes=60), PromotesAt(A, 15.0, 20.0))
    assert result.promoted_unused_gb * 2**30 == 50  # C took its place.


def test_a_policy_that_cuts_keeps_the_beginning() -> None:
    # 40 bytes too much: A keeps 10 of 50 in DRAM (its grain is 50 // 64, at least a byte).
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 20.0))
    result = simulate(turns, machine(dram_bytes=60), Cuts())
    assert shares(result) == (0.2, 0, 0.8, 0)


def test_what_leaves_dram_before_it_was_copied_is_written_at_once() -> None:
    # At 3 s B takes A's place, when 20 of A's bytes are on SSD: the other 30 are still to be written.
    turns = sessions(Request(A, 0.0), Request(B, 2.0), Request(A, 20.0))
    result = simulate(turns, machine(dram_bytes=60), "lru")
    assert shares(result) == (0, 0, 1, 0)


def test_what_leaves_dram_while_too_much_is_owed_is_lost() -> None:
    turns = sessions(Request(A, 0.0), Request(B, 2.0), Request(A, 20.0))
    result = simulate(turns, machine(dram_bytes=60, ssd_bytes_per_s=0.1), "lru")
    assert shares(result) == (0, 0, 0, 1)
    assert result.writes_dropped_gb * 2**30 == 200  # A, B, and A again with its second turn.
    assert simulate(turns, machine(dram_bytes=60), "lru").writes_dropped_gb == 0
    assert simulate(turns, machine(dram_bytes=60, ssd_bytes=0), "lru").writes_dropped_gb == 0


def test_writes_that_reads_leave_no_time_for_are_counted_as_dropped() -> None:
    # A is read from 260 s to 310 s. What eight others store meanwhile cannot be written, and a large one replaces it.
    others = [*(Request(C + number, 262.0 + 2 * number) for number in range(8)), Request(20, 300.0, new_tokens=480)]
    turns = sessions(Request(A, 0.0, new_tokens=480), Request(B, 100.0), Request(A, 260.0, new_tokens=1), *others)
    starved = simulate(turns, machine(dram_bytes=521), "lru")
    assert 250 <= starved.writes_dropped_gb * 2**30 <= 350  # 400 bytes, less the ten seconds' worth that are deferred.
    assert simulate(turns, machine(dram_bytes=521, ssd_bytes_per_s=1000.0), "lru").writes_dropped_gb == 0


def test_what_ssd_has_no_room_for_replaces_what_is_worth_least() -> None:
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(C, 20.0), Request(B, 40.0), Request(A, 50.0))
    result = simulate(turns, machine(dram_bytes=0, ssd_bytes=120), "lru")
    assert shares(result) == (0, 0, 0.5, 0.5)  # A left for C.


def test_a_turn_waits_for_those_before_it() -> None:
    result = simulate(sessions(Request(A, 0.0), Request(B, 0.25)), machine(), "lru")
    assert result.ttft_p99_s == pytest.approx(0.78, abs=0.01)
    assert result.service_ttft_mean_s == pytest.approx(0.03)


def test_a_session_has_one_request_at_a_time() -> None:
    # The second comes while the first runs, until 1 s: it waits from then on only.
    result = simulate(sessions(Request(A, 0.0), Request(A, 0.5)), machine(), "lru")
    assert result.ttft_mean_s == pytest.approx(0.03)


def test_think_time_begins_with_the_end_of_the_answer() -> None:
    result = simulate(sessions(Request(A, 5.0), Request(A, think_s=10.0)), machine(), "lru")
    assert result.simulated_s == pytest.approx(12.0)  # 5 to 6, 16 to 17.


def test_what_is_over_the_window_is_cut_from_the_front_by_half_of_it() -> None:
    turns = sessions(Request(A, 0.0, new_tokens=60), Request(A, 10.0, new_tokens=30), context_tokens=100)
    kept = simulate(turns, machine(), "lru")
    assert shares(kept) == (1, 0, 0, 0)
    assert kept.ttft_p99_s == pytest.approx(0.06, abs=1e-3)
    lost = simulate(turns, machine(overflow_keeps=False), "lru")
    assert shares(lost) == (0, 0, 0, 1)
    # 80 tokens of history, cut to 30: these are computed with the 30 new ones.
    assert lost.ttft_p99_s == pytest.approx(0.06, abs=1e-3)
    assert lost.ttft_mean_s == pytest.approx(0.06)


def test_a_session_that_is_idle_for_too_long_ends() -> None:
    turns = sessions(Request(A, 0.0), Request(A, 100.0), Request(B, 200.0))
    assert shares(simulate(turns, machine(session_ttl_s=90.0), "lru")) == (0, 0, 0, 1)
    assert shares(simulate(turns, machine(session_ttl_s=100.0), "lru")) == (1, 0, 0, 0)


def test_turns_of_the_warm_up_do_not_count() -> None:
    turns = sessions(Request(A, 0.0), Request(A, 10.0), Request(A, 20.0))
    result = simulate(turns, machine(), "lru", warmup_turns=2)
    assert (result.turns, result.hit_rate, result.simulated_s) == (1, 1, 1)


class Cuts(LruPolicy):
    """Cuts ends of sessions."""

    name: ClassVar[str] = "cuts"
    whole_items: ClassVar[bool] = False


class RecordingPolicy(LruPolicy):
    """Records the calls that it receives."""

    name: ClassVar[str] = "recording"

    def __init__(self) -> None:
        self.calls: list[tuple[float, str, int]] = []

    def queued(self, items: ItemTable, row: int, now_s: float) -> None:
        self.calls.append((now_s, "queued", row))

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        self.calls.append((now_s, "used " + ("", "typing", "tool_call", "ended")[items.hint[row]], row))

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        self.calls.append((now_s, "stored", row))

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float, kind: int = 0) -> None:
        assert (items.hinted_at_s[row], items.ended[row]) == (now_s, hint is Hint.ENDED)
        self.calls.append((now_s, hint, row))


def test_hints_come_before_the_request_or_after_the_answer() -> None:
    hints = Hints(np.array([-1, 1, -2]), np.array([2, 1, 3], np.int8), np.array([4.0, 3.0, 5.0]))
    turns = sessions(Request(A, 0.0), Request(A, 20.0), hints=hints)
    policy = RecordingPolicy()
    simulate(turns, machine(), policy)
    assert policy.calls == [
        (0.0, "queued", A),
        (0.0, "used ", A),
        (1.0, "stored", A),
        (5.0, "tool_call", A),
        (17.0, "typing", A),
        (20.0, "queued", A),
        (20.0, "used typing", A),
        (21.0, "stored", A),
    ]  # The simulation ends with the last answer.


def test_a_hint_for_a_request_that_is_here_already_says_nothing() -> None:
    hints = Hints(np.array([1]), np.array([1], np.int8), np.array([3.0]))
    policy = RecordingPolicy()
    simulate(sessions(Request(A, 0.0), Request(A, 0.5), hints=hints), machine(), policy)
    assert [what for _, what, _ in policy.calls] == ["queued", "used ", "stored", "queued", "used ", "stored"]


def test_live_bytes_are_those_of_sessions_with_a_later_turn() -> None:
    # 50 bytes from 1 s to 11 s; B has one turn only.
    result = simulate(sessions(Request(A, 0.0), Request(A, 10.0), Request(B, 19.0)), machine(), "lru")
    assert result.live_gb_mean * 2**30 == pytest.approx(50 * 10 / 20)


def test_a_path_hits_up_to_its_first_missing_block() -> None:
    # Items of 2, 3 and 3 blocks; DRAM holds 5. The third request finds the shared 2 of its 5, LRU having cut the
    # first path's end; the fourth finds the 2 and none of the other 3.
    turns = paths([2, 3, 3], (0.0, [0, 1]), (10.0, [0, 2]), (20.0, [0, 2]), (30.0, [0, 1]))
    result = simulate(turns, machine(dram_bytes=5, ssd_bytes=0), "lru")
    assert result.hit_rate == (0 + 2 + 5 + 2) / 20
    assert shares(result) == (9 / 12, 0, 0, 3 / 12)


class KeepsEnds(Cuts):
    """Later items of a path have higher scores."""

    name: ClassVar[str] = "keeps-ends"

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return rows.astype(np.float64)


def test_blocks_after_a_missing_one_are_not_hits() -> None:
    # One block of the first item is left, and all three of the second.
    turns = paths([2, 3], (0.0, [0, 1]), (10.0, [0, 1]))
    result = simulate(turns, machine(dram_bytes=4, ssd_bytes=0), KeepsEnds())
    assert shares(result) == (1 / 5, 0, 0, 4 / 5)


def test_a_path_is_cut_from_its_end_by_blocks() -> None:
    turns = paths([2, 3], (0.0, [0, 1]), (10.0, [0, 1]))
    result = simulate(turns, machine(dram_bytes=3, ssd_bytes=0), "lru")
    assert shares(result) == (3 / 5, 0, 0, 2 / 5)


def test_blocks_come_back_from_ssd() -> None:
    turns = paths([2, 3], (0.0, [0, 1]), (10.0, [0, 1]))
    result = simulate(turns, machine(dram_bytes=3, ssd_bytes=100), "lru")
    assert shares(result) == (3 / 5, 0, 2 / 5, 0)
    assert result.read_gb * 2**30 == 2


def test_a_gpu_prefills_one_turn_after_the_other_and_decodes_them_together() -> None:
    # Prefill of 1 s each, answers of 2 s each: the second waits 1 s, and both are done at 4 s.
    gpu = machine(service_turns_per_s=None, prefill_tokens_per_s=30.0, decode_tokens_per_s=10.0, batch=2)
    result = simulate(sessions(Request(A, 0.0), Request(B, 0.0)), gpu, "lru")
    assert result.ttft_p99_s == pytest.approx(2.0, abs=0.02)
    assert result.simulated_s == pytest.approx(4.0)
    assert result.gpu_hours * 3600 == pytest.approx(2 * (1 + 2 / 2))


def test_a_turn_waits_for_a_place_in_the_batch() -> None:
    gpu = machine(service_turns_per_s=None, prefill_tokens_per_s=30.0, decode_tokens_per_s=10.0, batch=1)
    result = simulate(sessions(Request(A, 0.0), Request(B, 0.0)), gpu, "lru")
    assert result.ttft_p99_s == pytest.approx(4.0, abs=0.04)


def test_history_comes_to_the_gpu_beside_prefill_and_the_slower_counts() -> None:
    turns = sessions(Request(A, 0.0), Request(A, 10.0))
    slow = machine(link_bytes_per_s=10.0)
    assert simulate(turns, slow, "lru").service_ttft_p99_s == pytest.approx(5.0, rel=0.02)


def test_while_one_request_loads_its_kv_others_run_unless_loads_block() -> None:
    # A's KV has to be read for 5 s when both come; B has none, and its prefill takes a second.
    turns = sessions(Request(A, 0.0), Request(C, 10.0), Request(A, 30.0), Request(B, 30.1))
    gpu = machine(dram_bytes=60, service_turns_per_s=None, prefill_tokens_per_s=30.0, decode_tokens_per_s=100.0)
    in_order = simulate(turns, dataclasses.replace(gpu, blocking_loads=True), "lru")
    ready_first = simulate(turns, gpu, "lru")
    assert in_order.ttft_mean_s == pytest.approx((1 + 1 + 6 + 6.9) / 4)
    assert ready_first.ttft_mean_s == pytest.approx((1 + 1 + 6 + 1) / 4)
    assert shares(in_order) == shares(ready_first)
    # Four prefills of a second and answers of 0.2 s, 24 at a time; a GPU that waits for the load is paid 5 s more.
    busy_s = 4 * (1 + 0.2 / 24)
    assert ready_first.gpu_hours * 3600 == pytest.approx(busy_s)
    assert in_order.gpu_hours * 3600 == pytest.approx(busy_s + 5)


def test_as_many_requests_load_at_a_time_as_the_batch_has_places() -> None:
    # Both A and B need 5 s from SSD. With one place B's load, and then C, wait for A's.
    turns = sessions(
        *(Request(session, at_s) for session, at_s in ((A, 0.0), (B, 20.0), (A, 40.0), (B, 40.1), (C, 40.2)))
    )
    gpu = machine(dram_bytes=0, service_turns_per_s=None, decode_tokens_per_s=1e6)
    many, one = (simulate(turns, dataclasses.replace(gpu, batch=batch), "lru") for batch in (2, 1))
    assert many.ttft_mean_s == pytest.approx((0.03 + 0.03 + 5.03 + 9.93 + 0.03 + 4.8) / 5, abs=0.02)
    assert one.ttft_mean_s > many.ttft_mean_s


def test_a_request_runs_next_once_its_kv_is_loaded() -> None:
    # A needs 5 s from SSD, while one request after the other comes, each with half a second of prefill.
    others = [Request(2 + number, 40.0 + 0.1 + number * 0.5, new_tokens=15) for number in range(40)]
    turns = sessions(Request(A, 0.0), Request(B, 20.0), Request(A, 40.0), *others)
    gpu = machine(dram_bytes=60, service_turns_per_s=None, prefill_tokens_per_s=30.0, decode_tokens_per_s=1e6)
    engine = Engine(turns, gpu, LruPolicy())
    engine.run()
    number = list(engine.account.turn).index(1)
    assert 5.0 <= engine.account.load_s[number] <= 5.5


class ToldSizes(Placement):
    """Keeps nothing."""

    name: ClassVar[str] = "told-sizes"

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        return np.zeros(len(rows))

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        return False


def test_what_a_policy_does_not_want_on_ssd_is_lost_when_it_leaves_dram() -> None:
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 20.0))
    result = simulate(turns, machine(dram_bytes=60), ToldSizes())
    assert result.ssd_written_gb == 0
    assert result.miss > 0


class KeepsOut(LruPolicy):
    """Bytes that are read from SSD get no space in DRAM."""

    name: ClassVar[str] = "keeps-out"

    def wants_in_dram(self, items: ItemTable, row: int, now_s: float) -> bool:
        return False


class AnswersSeen(LruPolicy):
    """Records the lengths of answers that a policy may know."""

    name: ClassVar[str] = "answers-seen"

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        self.tokens.append(int(items.answer_tokens[row]))


@pytest.mark.parametrize(("reports", "seen"), [(True, [20, 20]), (False, [0, 50])])
def test_unreported_answers_are_what_a_later_request_adds_to_its_history(reports: bool, seen: list[int]) -> None:
    policy = AnswersSeen()
    simulate(sessions(Request(A, 0.0), Request(A, 10.0)), machine(reports_answers=reports), policy)
    assert policy.tokens == seen


def test_what_a_policy_does_not_want_in_dram_goes_past_it() -> None:
    turns = sessions(Request(A, 0.0), Request(B, 10.0), Request(A, 20.0), Request(B, 40.0), Request(A, 50.0))
    result = simulate(turns, machine(dram_bytes=60), KeepsOut())
    assert shares(result) == (1 / 3, 0, 2 / 3, 0)  # B stayed in its tier.


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match=r"no policy is called 'mru': choose among none, .*lru"):
        simulate(sessions(Request(A, 0.0)), machine(), "mru")


def test_a_session_that_never_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="the first turn of a session has no arrival time"):
        simulate(sessions(Request(A)), machine(), "lru")


def test_a_policy_that_does_not_say_when_to_ask_again_is_stopped() -> None:
    class Asks(FifoPolicy):
        look_at_s = 0.0

        def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
            return ()

    with pytest.raises(RuntimeError, match="did not set look_at_s"):
        simulate(sessions(Request(A, 0.0)), machine(), Asks())


def test_an_empty_workload_has_an_empty_result() -> None:
    for name in CONTENDERS:
        assert simulate(sessions(), machine(), name).turns == 0
