"""Conversations with a session id under vLLM's real scheduler: the daemon knows each turn and its request."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from kvservice_api.errors import SessionNotFound
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import Session, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps
from tests.vllm.request_reports import report_of

pytestmark = pytest.mark.fast


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), dram__capacity_bytes=256 * MIB) as process:
        yield process


def engine(daemon: DaemonProcess, load: str, *, is_asynchronous: bool) -> Steps:
    """With chunks of 64 tokens and pages of 32."""
    options = {
        "address": daemon.address,
        "model_id": "numbers",
        "model_revision": "1",
        "block_tokens": 64,
        "load": load,
        "lookup_wait_s": 5.0,
        "wait_s": 5.0,
    }
    package = "kvservice_adapter.connectors.vllm"
    return Steps(Setup("KVServiceConnector", package, options, step_tokens=64, is_asynchronous=is_asynchronous))


def token_count(session: Session) -> int:
    try:
        return session.get().token_count
    except SessionNotFound:
        return 0


@pytest.mark.parametrize("is_asynchronous", [False, True], ids=["in one step", "a step ahead"])
@pytest.mark.parametrize("load", ["whole", "layers", "between_steps"])
def test_each_turn_is_in_its_session_and_its_request_is_reported_with_what_vllm_counts(
    daemon: DaemonProcess, load: str, is_asynchronous: bool
) -> None:
    chooser = random.Random(load)
    with engine(daemon, load, is_asynchronous=is_asynchronous) as steps, daemon.client() as client:
        layout = steps.scheduler.connector._scheduler.layout
        session = client.session(layout, "chat")
        tokens: list[int] = []
        stored = 0
        for turn in range(3):
            tokens += [chooser.randrange(1000) for _ in range(100)]
            request = steps.ask(tokens, 10, session_id="chat")
            steps.expect(request.request_id)
            steps.forget_pages()
            report = report_of(client, request.request_id)
            assert report.outcome == (pb.REQUEST_OUTCOME_DONE if turn else pb.REQUEST_OUTCOME_MISS)
            assert report.loaded_tokens == report.history_tokens == stored == steps.hits[request.request_id]
            assert report.new_tokens == len(tokens) - stored
            assert report.loaded_bytes == stored * layout.bytes_per_token
            tokens = list(request.all_token_ids)
            stored = len(tokens) - 1  # vLLM has not computed the last one.
            until(lambda count=stored: token_count(session) == count)  # type: ignore[misc]
            state = session.get()
            assert (
                tuple(each.key for each in state.slices) == block_chain(layout, tokens[:stored], with_partial=True).keys
            )
            assert state.stored_tokens == stored
        steps.expect_nothing_is_held()
