"""KVService's connector under vLLM's real scheduler: every way in which a request's history is loaded, or is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.request import Request, RequestStatus

from kvservice_client import BlockCache, Client, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.media import arena
from tests.vllm.contract.numbers import NumberedModel, states_of
from tests.vllm.contract.setup import Setup
from tests.vllm.contract.steps import Steps
from tests.vllm.contract.worker import Runner

pytestmark = pytest.mark.fast

BLOCK = 64
PAGE = 32
BEFORE_FORWARD = ["whole", "layers"]
LOADS = [*BEFORE_FORWARD, "between_steps"]

_MODEL = NumberedModel()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), dram__capacity_bytes=256 * MIB) as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as made:
        yield made


@pytest.fixture(params=LOADS)
def load(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokens(request: pytest.FixtureRequest) -> list[int]:
    """A prompt of the test's own."""
    return prompt(request.node.nodeid, 6 * BLOCK)


def prompt(seed: str, count: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(1000) for _ in range(count)]


def ours(daemon: DaemonProcess, load: str = "whole", **more: Any) -> Setup:
    """An engine with our connector, on a daemon that is near and may be slow."""
    options = {
        "address": daemon.address,
        "model_id": "numbers",
        "model_revision": "1",
        "block_tokens": BLOCK,
        "load": load,
        "lookup_wait_s": 5.0,
        "wait_s": 5.0,
        **more.pop("options", {}),
    }
    return Setup("KVServiceConnector", "kvservice_adapter.connectors.vllm", options, **more)


def blocks_of(client: Client, steps: Steps) -> BlockCache:
    return client.open_layout(steps.scheduler.connector._scheduler.layout)


def store(client: Client, steps: Steps, tokens: list[int]) -> None:
    """Have the engine compute and save whole blocks, and forget its own pages."""
    request = steps.ask(tokens)
    steps.expect(request.request_id)
    steps.forget_pages()
    blocks = blocks_of(client, steps)
    chain = block_chain(blocks.layout, tokens)
    until(lambda: blocks.contains(chain) == len(chain))


def expect_nothing_is_held(client: Client, steps: Steps) -> None:
    """No page in vLLM, and no lease or ticket in the daemon."""
    steps.expect_nothing_is_held()
    until(lambda: client.admin.status().leases == 0)
    until(lambda: not any(block.leases for block in client.admin.list_blocks()))


@pytest.mark.parametrize("runner", Runner)
def test_a_hit_has_the_numbers_of_a_computation(
    daemon: DaemonProcess, client: Client, load: str, runner: Runner, tokens: list[int]
) -> None:
    with Steps(ours(daemon, load), runner) as steps:
        store(client, steps, tokens)
        request = steps.ask([*tokens, *range(50)], 40)
        steps.expect(request.request_id)
        assert steps.hits[request.request_id] == len(tokens)
        assert not steps.bad_pages
        expect_nothing_is_held(client, steps)
