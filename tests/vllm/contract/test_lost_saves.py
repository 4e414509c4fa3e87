"""Blocks that a daemon which was away could not store, while the requests that computed them continue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import DaemonProcess, until
from tests.vllm.contract.steps import Steps
from tests.vllm.contract.test_scheduler import BLOCK, blocks_of, chain_of, expect_nothing_is_held, ours, prompt, store

pytestmark = pytest.mark.fast


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path) as process:
        yield process


@pytest.mark.parametrize("transport", ["auto", "grpc"])
def test_what_is_computed_while_the_daemon_is_away_is_saved_once_it_is_back(
    daemon: DaemonProcess, transport: str
) -> None:
    tokens = prompt("away", 2 * BLOCK)
    with (
        Steps(ours(daemon, options={"lookup_wait_s": 0.2, "wait_s": 0.2, "transport": transport})) as steps,
        daemon.client() as client,
    ):
        request = steps.requests[steps.add(tokens, 8 * BLOCK)]
        worker = steps.worker.connector._worker

        def has_computed(blocks: int) -> None:
            steps.until(lambda: request.num_computed_tokens > blocks * BLOCK)

        has_computed(3)
        daemon.kill()
        has_computed(5)
        until(lambda: not worker._breaker.allow())
        has_computed(7)
        daemon.start()
        until(worker._breaker.allow)
        steps.run(request.request_id)
        steps.expect(request.request_id)
        steps.settle()
        blocks, known = blocks_of(client, steps), [*tokens, *request.output_token_ids][:-1]
        chain = chain_of(steps, known, with_partial=True)
        until(lambda: blocks.contains(chain) == len(chain) == 10)
        expect_nothing_is_held(client, steps)


def test_blocks_that_were_removed_before_a_preempted_request_continues_are_saved_again(daemon: DaemonProcess) -> None:
    with Steps(ours(daemon, pages=24)) as steps, daemon.client() as client:
        for number in range(3):
            steps.add(prompt(f"removed {number}", 3 * BLOCK), 200)
        requests = steps.requests.values()
        steps.until(lambda: any(each.num_preemptions for each in requests))
        preempted = next(each for each in requests if each.num_preemptions)
        client.admin.discard_all()
        steps.run()
        steps.expect(preempted.request_id)
        steps.settle()
        blocks, chain = blocks_of(client, steps), chain_of(steps, list(preempted.all_token_ids))
        until(lambda: blocks.contains(chain) == len(chain))
        expect_nothing_is_held(client, steps)


def test_the_first_request_after_the_daemon_was_away_is_found(daemon: DaemonProcess) -> None:
    with Steps(ours(daemon)) as steps, daemon.client() as client:
        tokens = prompt("first", 4 * BLOCK)
        store(client, steps, tokens)
        scheduler, worker = steps.scheduler.connector._scheduler, steps.worker.connector._worker
        other = steps.add(prompt("other", BLOCK), 6 * BLOCK)
        daemon.kill()
        steps.until(lambda: not worker._breaker.allow())
        steps.run(other)
        steps.settle()  # The last step says that the daemon is away.
        daemon.start()
        until(lambda: worker._breaker.allow() and scheduler._breaker.allow())
        request = steps.ask([*tokens, 1])
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == len(tokens)
