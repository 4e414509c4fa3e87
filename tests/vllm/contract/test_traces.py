"""The headers of a request's trace, as vLLM has them, reach the daemon from both roles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import MIB, DaemonProcess, until
from tests.otlp_receiver import OtlpReceiver
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps

pytestmark = pytest.mark.fast

TRACE_ID, SPAN_ID = bytes(range(16)), bytes(range(8, 16))


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as made:
        yield made


@pytest.fixture
def daemon(tmp_path: Path, receiver: OtlpReceiver) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path, dram__capacity_bytes=256 * MIB, tracing__enabled=True)
    try:
        yield process.start(environment=receiver.environment)
    finally:
        process.remove()


OPTIONS = {"model_id": "numbers", "model_revision": "1", "block_tokens": 64, "lookup_wait_s": 5.0, "wait_s": 5.0}
HEADERS = {"traceparent": f"00-{TRACE_ID.hex()}-{SPAN_ID.hex()}-01"}


@pytest.mark.parametrize("load", ["layers", "between_steps"])
def test_the_lookup_and_the_load_of_a_traced_request_are_in_its_trace(
    daemon: DaemonProcess, receiver: OtlpReceiver, load: str
) -> None:
    """The engine has no SDK here: the daemon's spans are directly below the one that the headers name."""
    options = {**OPTIONS, "address": daemon.address, "load": load}
    prompt = list(range(300))
    with Steps(Setup("KVServiceConnector", "kvservice_adapter.connectors.vllm", options)) as steps:
        steps.ask(prompt)
        steps.forget_pages()
        until(
            lambda: steps.step() is not None and sum(each.get("saved_blocks", 0) for each in steps.transfer_stats) >= 4
        )
        request = steps.ask(prompt, trace_headers=HEADERS)
        assert steps.hits[request.request_id] >= 256
        calls = {f"kvservice_api.v1.BlockService/{each}" for each in ("LookupPrefix", "AdoptLease", "LocateBlocks")}
        found = receiver.wait_for(TRACE_ID, calls)

    assert {each.name for each in found if each.parent_id == SPAN_ID} >= calls
    assert {each.service for each in found} == {"kvservice"}
    assert {each.trace_id for each in receiver.spans} == {TRACE_ID}  # The first request has none.


@pytest.mark.parametrize(("transport", "calls"), [("shm", ["ReserveBlocks", "CommitBlocks"]), ("grpc", ["SaveBlocks"])])
def test_the_save_of_a_traced_request_is_in_its_trace_and_no_other_trace_begins(
    daemon: DaemonProcess, receiver: OtlpReceiver, transport: str, calls: list[str]
) -> None:
    options = {**OPTIONS, "address": daemon.address, "transport": transport}
    with Steps(Setup("KVServiceConnector", "kvservice_adapter.connectors.vllm", options)) as steps:
        steps.ask(list(range(300)), trace_headers=HEADERS)
        steps.ask(list(range(1000, 1300)))
        until(
            lambda: steps.step() is not None and sum(each.get("saved_blocks", 0) for each in steps.transfer_stats) >= 8
        )
        receiver.wait_for(TRACE_ID, {f"kvservice_api.v1.BlockService/{each}" for each in calls})

    assert {each.trace_id for each in receiver.spans} == {TRACE_ID}
