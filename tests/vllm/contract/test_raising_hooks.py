"""A connector of which a hook raises, under vLLM's real scheduler: no token is wrong, and no page is kept.

A lease of the daemon may be kept until its time ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice_client import Client
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps
from tests.vllm.contract.test_scheduler import BLOCK, LOADS, expect_right_numbers, prompt, store
from tests.vllm.contract.worker import Runner
from tests.vllm.raising_connector import CASES, FAULT, SCHEDULER_HOOKS


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), dram__capacity_bytes=256 * MIB) as process:
        yield process


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that chooses what raises."""
    path = tmp_path / "fault"
    path.write_text("")
    monkeypatch.setenv(FAULT, str(path))
    return path


def raising(daemon: DaemonProcess) -> Setup:
    options = {
        "address": daemon.address,
        "model_id": "numbers",
        "model_revision": "1",
        "block_tokens": BLOCK,
        "load": "whole",
        "lookup_wait_s": 5.0,
        "wait_s": 5.0,
    }
    return Setup("RaisingConnector", "tests.vllm.raising_connector", options, step_tokens=2000)


# The scheduler's hooks do not depend on the runner. Of the worker's, each runner has every other one in the fast tests.
RUNS = [
    pytest.param(runner, *case, marks=pytest.mark.fast if in_scheduler or runner is fast_runner else ())
    for case, fast_runner in zip(CASES, itertools.cycle(Runner), strict=False)
    for in_scheduler in [case[0] in SCHEDULER_HOOKS]
    for runner in Runner
    if runner is Runner.V1 or not in_scheduler
]


@pytest.mark.parametrize(("runner", "method", "moment"), RUNS)
def test_a_hook_that_raises_at_each_call_changes_no_token(
    daemon: DaemonProcess, fault: Path, runner: Runner, method: str, moment: str
) -> None:
    """Together run one request for each way to load, and one that is not stored."""
    histories = [prompt(f"{runner} {method} {moment} {number}", 3 * BLOCK) for number in range(len(LOADS) + 1)]
    with daemon.client() as client, Steps(raising(daemon), runner) as steps:
        for history in histories[:-1]:
            store(client, steps, history)
        fault.write_text(f"{method} {moment}")
        ids = [
            steps.add([*history, 5], 10, given={"load": load})
            for history, load in zip(histories, [*LOADS, LOADS[0]], strict=True)
        ]
        steps.run()
        steps.settle()
        fault.write_text("")
        assert fault.with_suffix(".raised").exists()
        for request_id in ids:
            steps.expect(request_id)
        steps.expect_nothing_is_held()
        steps.forget_pages()
        expect_hits_again(client, steps, histories)


def expect_hits_again(client: Client, steps: Steps, histories: list[list[int]]) -> None:
    """Once a probe of a circuit breaker has found the daemon. What was saved meanwhile is right."""

    def is_hit() -> bool:
        request = steps.ask([*histories[0], 6], 5)
        steps.expect(request.request_id)
        steps.forget_pages()
        return steps.hits[request.request_id] == len(histories[0])

    until(is_hit)
    for history in histories:
        expect_right_numbers(client, steps, history)
