"""Layer-wise pre-loading on a virtual clock: the paper's closed forms, and its figures."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.adapter.paper_schedule import (
    prefill_with_preloading,
    prefill_without_preloading,
    read_buffer_bytes,
    simulate,
)
from kvservice_adapter.schedule import ReadBuffer, perfect_buffer_layers

LAYERS = st.integers(1, 90)
TIMES = st.fractions(Fraction(1, 1000), 1000, max_denominator=1000)
RATES = st.fractions(Fraction(1, 10**6), 1, max_denominator=10**6)  # Seconds per token.
TOKENS = st.integers(1, 10_000)


@given(layers=LAYERS, load_s=TIMES, compute_s=TIMES, buffer_layers=st.integers(0, 100))
def test_the_simulated_prefill_takes_exactly_what_the_closed_form_says(
    layers: int, load_s: Fraction, compute_s: Fraction, buffer_layers: int
) -> None:
    timeline = simulate(layers, load_s, compute_s, buffer_layers)

    assert timeline.total_s == prefill_with_preloading(layers, load_s, compute_s, buffer_layers)
    assert timeline.stall_s == timeline.total_s - layers * compute_s
    assert len(timeline.waited_s) == layers


@given(layers=LAYERS, load_s=TIMES, compute_s=TIMES, buffer_layers=st.integers(0, 100))
def test_computing_never_stands_still_if_and_only_if_the_buffer_is_the_perfect_one_or_larger(
    layers: int, load_s: Fraction, compute_s: Fraction, buffer_layers: int
) -> None:
    stalls = simulate(layers, load_s, compute_s, buffer_layers).stall_s > 0

    assert stalls == (buffer_layers < perfect_buffer_layers(layers, load_s, compute_s))


@given(layers=LAYERS, t_load=RATES, history=TOKENS, t_pref=RATES, new=TOKENS, bytes_per_token=st.integers(1, 10**6))
def test_the_perfect_buffer_is_the_papers_in_whole_layers(
    layers: int, t_load: Fraction, history: int, t_pref: Fraction, new: int, bytes_per_token: int
) -> None:
    load_s, compute_s = t_load * history / layers, t_pref * new / layers
    layer_bytes = Fraction(bytes_per_token * history, layers)
    assume(t_load * history > t_pref * new)

    s_buf = read_buffer_bytes(bytes_per_token / t_load, t_load, history, t_pref, new)
    perfect = perfect_buffer_layers(layers, load_s, compute_s)

    # Bytes that are loaded while the last layer is computed are too late, so the buffer must be larger than S_buf.
    too_late = bytes_per_token / t_load * compute_s
    assert perfect == ceil((s_buf + too_late) / layer_bytes)
    assert ceil(s_buf / layer_bytes) <= perfect <= ceil(s_buf / layer_bytes) + 1
    # With exactly S_buf, rounded up to a layer, computing waits for less than one layer's time.
    assert simulate(layers, load_s, compute_s, ceil(s_buf / layer_bytes)).stall_s <= compute_s


@given(layers=LAYERS, t_load=RATES, history=TOKENS, t_pref=RATES, new=TOKENS)
def test_one_layer_suffices_where_computing_is_the_slower_side(
    layers: int, t_load: Fraction, history: int, t_pref: Fraction, new: int
) -> None:
    assume(t_load * history <= t_pref * new)

    timeline = simulate(layers, t_load * history / layers, t_pref * new / layers, 1)

    assert timeline.stall_s == 0
    assert perfect_buffer_layers(layers, t_load * history, t_pref * new) == 1
    assert read_buffer_bytes(Fraction(1), t_load, history, t_pref, new) == 0


@given(layers=LAYERS, load_s=TIMES, compute_s=TIMES, buffer_layers=st.integers(0, 99))
def test_a_larger_buffer_is_never_slower_and_none_is_never_slower_than_no_preloading(
    layers: int, load_s: Fraction, compute_s: Fraction, buffer_layers: int
) -> None:
    larger = simulate(layers, load_s, compute_s, buffer_layers + 1).total_s
    smaller = simulate(layers, load_s, compute_s, buffer_layers).total_s

    assert larger <= smaller <= prefill_without_preloading(layers, load_s, compute_s)


@pytest.mark.parametrize(("buffer_layers", "cut"), [(0, 0.3656), (15, 0.60), (17, 0.625), (40, 0.625)])
def test_the_papers_figure_19_is_met(buffer_layers: int, cut: float) -> None:
    """40 layers, computing takes 0.6 of loading; the paper measured 35 % without a buffer and 61 % with 15 layers."""
    without = prefill_without_preloading(40, 1.0, 0.6)

    assert 1 - prefill_with_preloading(40, 1.0, 0.6, buffer_layers) / without == pytest.approx(cut, abs=1e-4)
    assert perfect_buffer_layers(40, 1.0, 0.6) == 17


def test_the_papers_65b_needs_a_buffer_once_the_history_is_1_87_times_the_new_tokens() -> None:
    t_load, t_pref = 0.094e-3, 0.176e-3

    assert read_buffer_bytes(26e9, t_load, 1870, t_pref, 1000) == 0
    assert read_buffer_bytes(26e9, t_load, 1880, t_pref, 1000) > 0


def test_nothing_to_load_needs_no_buffer() -> None:
    assert perfect_buffer_layers(40, 0.0, 1.0) == 0
    assert simulate(40, 0.0, 1.0, 0).stall_s == 0


@given(steps=st.lists(st.sampled_from(["load", "take", "run"]), max_size=60), k=st.integers(0, 8))
def test_the_buffer_never_holds_more_layers_than_it_may(steps: list[str], k: int) -> None:
    buffer = ReadBuffer(12, k)
    for step in steps:
        if step == "load" and buffer.may_load:
            buffer.loaded += 1
        elif step == "take" and buffer.is_running and buffer.taken < buffer.loaded:
            buffer.taken += 1
        elif step == "run":
            buffer.is_running = True
        assert buffer.loaded - buffer.taken <= (max(1, k) if buffer.is_running else k)
        assert buffer.loaded <= 12
