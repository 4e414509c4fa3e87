"""vLLM's real scheduler reports its queue, and turns that have ended, to a real daemon."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from kvservice_api.errors import SessionNotFound
from kvservice_client import Client, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps

pytestmark = pytest.mark.fast

BLOCK = 64


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), dram__capacity_bytes=256 * MIB) as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as made:
        until(lambda: made.admin.status().hint_streams == 0)
        yield made


def engine(daemon: DaemonProcess, *, pages: int = 200, **options: Any) -> Steps:
    """A step has 64 tokens: while it computes one prompt, others wait."""
    settings = {
        "address": daemon.address,
        "model_id": "numbers",
        "model_revision": "1",
        "block_tokens": BLOCK,
        "lookup_wait_s": 5.0,
        "wait_s": 5.0,
        **options,
    }
    package = "kvservice_adapter.connectors.vllm"
    return Steps(Setup("KVServiceConnector", package, settings, step_tokens=64, pages=pages))


def prompt(seed: object, count: int = 3 * BLOCK) -> list[int]:
    chooser = random.Random(str(seed))
    return [chooser.randrange(1000) for _ in range(count)]


class Counted:
    """What a daemon has received since this was made."""

    def __init__(self, client: Client) -> None:
        self._client, self._before = client, client.admin.status().counters

    def __getitem__(self, name: str) -> int:
        return int(self._client.admin.status().counters[name] - self._before[name])


def queued(client: Client) -> int:
    return client.admin.status().queued_requests


def test_the_daemon_has_the_queue_until_its_requests_run_and_knows_each_turn(
    daemon: DaemonProcess, client: Client
) -> None:
    counted = Counted(client)
    with engine(daemon) as steps:
        ids = [steps.add(prompt(f"queue {number}"), 3) for number in range(5)]
        steps.step()  # The first one runs, and is not reported.
        until(lambda: queued(client) == 4)
        steps.abort(ids.pop())
        steps.step()
        until(lambda: queued(client) == 3)
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        steps.settle()
        until(lambda: counted["hints_received"] == 4 + 4)
        until(lambda: queued(client) == 0)
        assert counted["hints_unknown"] == counted["hints_invalid"] == counted["hints_over_limit"] == 0
        steps.expect_nothing_is_held()


def test_requests_that_were_preempted_are_in_the_queue_again(daemon: DaemonProcess, client: Client) -> None:
    counted = Counted(client)
    with engine(daemon, pages=24) as steps:
        ids = [steps.add(prompt(f"preempted {number}"), 200) for number in range(3)]
        steps.until(lambda: any(each.num_preemptions for each in steps.requests.values()))
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        steps.settle()
        waited = 2 + sum(request.num_preemptions for request in steps.requests.values())
        until(lambda: counted["hints_received"] == waited + 3)
        until(lambda: queued(client) == 0)


def test_a_daemon_that_restarts_gets_the_queue_again_and_costs_no_request(tmp_path: Any) -> None:
    with DaemonProcess(tmp_path, dram__capacity_bytes=256 * MIB) as daemon, engine(daemon) as steps:
        ids = [steps.add(prompt(f"restart {number}")) for number in range(6)]
        steps.step()
        with daemon.client() as client:
            until(lambda: queued(client) == 5)
        daemon.kill()
        steps.run(ids[1])
        ids.append(steps.add(prompt("restart, while it is away")))
        steps.step()
        daemon.start()
        with daemon.client() as client:
            until(lambda: queued(client) == 4)
            steps.run()
            for request_id in ids:
                steps.expect(request_id)
            steps.settle()
            until(lambda: queued(client) == 0)
        steps.expect_nothing_is_held()


@pytest.mark.parametrize("method", ["put", "remove", "turn_finished"])
def test_an_error_in_hints_costs_no_request(
    daemon: DaemonProcess, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with engine(daemon) as steps:
        role = steps.scheduler.connector._scheduler
        monkeypatch.setattr(role._client.hints(), method, None)
        ids = [steps.add(prompt(f"{method} {number}")) for number in range(3)]
        steps.run()
        for request_id in ids:
            steps.expect(request_id)
        steps.expect_nothing_is_held()
        assert caplog.text.count("hints are not sent any more, because") == 1


def test_an_engine_without_hints_sends_none(daemon: DaemonProcess, client: Client) -> None:
    counted = Counted(client)
    with engine(daemon, hints=False) as steps:
        for number in range(3):
            steps.add(prompt(f"off {number}"), hints={"typing": True})
        steps.run()
        steps.settle()
        assert client.admin.status().hint_streams == counted["hints_received"] == 0


def test_what_an_application_says_of_its_conversation_comes_to_the_daemon(
    daemon: DaemonProcess, client: Client
) -> None:
    with engine(daemon) as steps:
        layout = steps.scheduler.connector._scheduler.layout
        session, blocks = client.session(layout, "chat"), client.open_layout(layout)
        first = steps.ask(
            prompt("said"), 5, session_id="chat", hints={"tool_call": {"name": "search", "expected_s": 60}}
        )
        steps.settle()

        def turns() -> int:
            try:
                return session.get().revision
            except SessionNotFound:
                return 0

        until(lambda: turns() > 0)
        counted = Counted(client)
        more = [*first.all_token_ids, *prompt("more")]
        steps.ask(more, 5, session_id="chat", hints={"typing": True, "session_ended": True})
        steps.settle()
        until(lambda: turns() == 0)
        # The turn, typing and the end; and the queue, if the step had to wait for the lookup's answer.
        assert counted["hints_received"] in (3, 4)
        assert counted["hints_unknown"] == 0
        unkept = prompt("not kept")
        steps.ask(unkept, 5, hints={"do_not_keep": True})
        received = counted["hints_received"]
        steps.settle()
        until(lambda: counted["hints_received"] == received + 2)
        assert blocks.contains(block_chain(layout, unkept)) == 0
