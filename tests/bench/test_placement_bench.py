"""The comparison of daemon and simulator: its load, and one short run."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.placement import __main__ as command
from benchmarks.placement.drive import turns_of
from benchmarks.placement.experiments import EXPERIMENTS, QUEUED, SHORT, Options
from benchmarks.placement.load import BLOCK_BYTES, BLOCK_TOKENS, LAYOUT, workload_of
from benchmarks.placement.runs import run
from kvservice_api.image import block_geometry
from kvservice_api.layout import Shard


def test_a_turn_has_whole_blocks_and_the_history_of_those_before_it() -> None:
    workload = workload_of(SHORT, 1)
    turns = turns_of(workload)

    assert not ((workload.new_tokens + workload.output_tokens) % BLOCK_TOKENS).any()
    assert (workload.new_tokens > 0).all()
    assert (workload.output_tokens > 0).all()
    for before, turn in pairwise(turns):
        assert turn.history == (before.history + before.new if turn.session == before.session else 0)


def test_a_slower_scenario_has_the_same_turns() -> None:
    fast, slow = workload_of(SHORT, 0), workload_of(Options(time_scale=3.0).of(SHORT), 0)
    assert np.array_equal(fast.output_tokens, slow.output_tokens)
    assert slow.think_s == pytest.approx(3 * fast.think_s)


def test_a_block_takes_what_the_simulator_counts() -> None:
    geometry = block_geometry(LAYOUT, Shard.whole(LAYOUT), LAYOUT.block_tokens)
    assert geometry.image_bytes == BLOCK_BYTES
    assert SHORT.machine(1, 1).kv_bytes_per_token * BLOCK_TOKENS == BLOCK_BYTES


def test_seeds_are_refused_where_no_named_experiment_has_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = next(name for name in EXPERIMENTS if name not in {"agreement", "unqueued"})
    monkeypatch.setattr(sys, "argv", ["placement", other, "--seeds", "5"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "--seeds is of agreement and unqueued" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_counts_the_same_turns_in_both_worlds() -> None:
    scenario = replace(QUEUED, sessions=6, turns_for_s=3.0, think_s=0.6, service_turns_per_s=20.0, warmup_turns=6)
    found = run(scenario, "lru", 0)
    assert len(found.turns) == found.simulated.turns
    assert sum(turn.history > 0 for turn in found.turns) == found.simulated.turns_with_history
    assert found.hits == found.simulated.hit_rate_history == 1.0
