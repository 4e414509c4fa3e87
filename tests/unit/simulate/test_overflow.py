"""Conversations that exceed the model's window."""

from __future__ import annotations

import math

from kvservice.simulate.engine import simulate
from tests.unit.simulate.test_engine import PromotesAt
from tests.workloads import Request, machine, sessions

A, B, C = 0, 1, 2


def test_what_the_window_cannot_hold_is_cut_when_the_request_comes_and_not_read_for_nothing() -> None:
    # A's 80 bytes are on SSD alone when its request comes at 30.1 s and waits behind C's. With the 30 new tokens they
    # are over the window of 100: 50 are cut. What is asked for while the request waits are the other 30.
    turns = sessions(
        Request(A, 0.0, new_tokens=60),
        Request(B, 20.0, new_tokens=80, output_tokens=10),
        Request(C, 30.0, new_tokens=5, output_tokens=5),
        Request(A, 30.1, new_tokens=30),
        context_tokens=100,
    )

    result = simulate(turns, machine(), PromotesAt(A, 30.2, 31.0))

    assert result.read_gb * 2**30 == 30
    assert (result.dram_on_time, result.miss) == (8 / 30, 0)  # 8 of them came from 30.2 to 31 s.
    assert math.isclose(result.dram_late, 22 / 30)
