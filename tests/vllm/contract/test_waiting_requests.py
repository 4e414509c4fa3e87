"""Requests that wait: for lookups that were begun before theirs, and in vLLM's queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import DaemonProcess, until
from tests.distant_daemon import ANSWER_S
from tests.vllm.contract.steps import Steps
from tests.vllm.contract.test_scheduler import BLOCK, blocks_of, chain_of, ours, prompt, store

pytestmark = pytest.mark.fast

_REQUESTS = 160  # Four lookups run at a time: the last answer comes after 40 turns, twice the time of a request.
_WAIT_S = 20 * ANSWER_S


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, program=("-m", "tests.distant_daemon")) as process:
        yield process


def test_requests_that_come_at_once_are_all_found_while_the_daemon_answers_their_lookups(
    daemon: DaemonProcess,
) -> None:
    with Steps(ours(daemon, pages=600, options={"lookup_wait_s": _WAIT_S})) as steps, daemon.client() as client:
        prompts = [prompt(f"burst {number}", BLOCK) for number in range(_REQUESTS)]
        for each in prompts:
            steps.add(each)
        steps.run()
        steps.forget_pages()
        blocks = blocks_of(client, steps)
        until(lambda: all(blocks.contains(chain_of(steps, each)) for each in prompts))
        ids = [steps.add([*each, 1]) for each in prompts]
        steps.run(*ids)
        assert [steps.hits[request_id] for request_id in ids] == [BLOCK] * _REQUESTS
        for request_id in ids:
            steps.expect(request_id)
        assert not steps.scheduler.connector._scheduler._breaker.times_opened


def test_a_request_that_waits_in_vllms_queue_for_longer_than_its_lease_lasts_is_found_when_it_runs(
    daemon: DaemonProcess,
) -> None:
    with Steps(ours(daemon, options={"ticket_s": 1.0})) as steps, daemon.client() as client:
        tokens = prompt("queue", 4 * BLOCK)
        store(client, steps, tokens)
        request_id = steps.add([*tokens, 1])
        until(lambda: client.admin.status().leases > 0)
        until(lambda: client.admin.status().leases == 0)  # Meanwhile vLLM computes other requests.
        steps.run(request_id)
        steps.expect(request_id)
        assert steps.hits[request_id] == len(tokens)
        assert not steps.bad_pages
