"""How long a step of a worker may wait for a daemon that hangs: `wait_s` in all, for saves and loads. No model runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm.roles import Roles
from kvservice_adapter.connectors.vllm.metadata import StepOrders
from kvservice_adapter.connectors.vllm.settings import LoadMode
from tests.daemon import DaemonProcess, until
from tests.integration.test_faults_disk import Faults, faulty_daemon
from tests.vllm.engine import model_folder

pytestmark = pytest.mark.fast

_PROMPT = list(range(256 + 40))
_WAIT_S = 0.5
_names = (f"request-{number}" for number in itertools.count())


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path / "faults")


@pytest.fixture
def daemon(faults: Faults) -> Iterator[DaemonProcess]:
    process = faulty_daemon(faults.folder.parent)
    try:
        yield process.start(environment={"TEST_FAULTS": str(faults.folder)})
        faults.clear()
    finally:
        process.remove()


@pytest.fixture
def roles(daemon: DaemonProcess) -> Iterator[Roles]:
    roles = Roles(model_folder(), daemon.address, pages=8, lookup_wait_s=30.0, wait_s=_WAIT_S, layer_wait_s=600.0)
    until(lambda: roles.scheduler.is_ready)
    yield roles
    roles.close()


def end_of_a_request(roles: Roles, prompt: list[int]) -> None:
    """The next orders save its blocks before vLLM gives its pages to others."""
    request = roles.request(next(_names), prompt)
    roles.scheduler.on_new(request)
    roles.scheduler.finished(request, (roles.compute(request),))


def order_load(roles: Roles, mode: LoadMode) -> None:
    """The next orders load `_PROMPT`."""
    request = roles.request(next(_names), [*_PROMPT, 1])
    request.kv_transfer_params = {"kvservice": {"load": mode}}
    roles.scheduler.on_new(request)
    until(lambda: roles.scheduler.matched_tokens(request, 0)[0] is not None)
    roles.scheduler.allocated(request, (roles.give_pages(request),), len(_PROMPT))


def store(roles: Roles) -> None:
    end_of_a_request(roles, _PROMPT)
    roles.step(roles.orders())

    def is_stored() -> bool:
        request = roles.request(next(_names), [*_PROMPT, 1])
        roles.scheduler.on_new(request)
        until(lambda: roles.scheduler.matched_tokens(request, 0)[0] is not None)
        found, _ = roles.scheduler.matched_tokens(request, 0)
        roles.scheduler.finished(request, ([],))
        return found == len(_PROMPT)

    until(is_stored)


def asked(roles: Roles) -> list[tuple[str, float]]:
    """The calls of the daemon that steps wait for, and the seconds that each is allowed."""
    blocks, calls = roles.worker._blocks, []

    def recorded(name: str, call: Any) -> Any:
        def run(*args: Any, timeout_s: float) -> Any:
            calls.append((name, timeout_s))
            return call(*args, timeout_s=timeout_s)

        return run

    for name in ("reserve", "adopt"):
        setattr(blocks, name, recorded(name, getattr(blocks, name)))
    return calls


def orders_of_save_and_loads(roles: Roles, mode: LoadMode) -> StepOrders:
    end_of_a_request(roles, [7, *_PROMPT])
    order_load(roles, mode)
    order_load(roles, mode)
    orders = roles.orders()
    assert [save.is_freed for save in orders.saves] == [True]
    assert len(orders.loads) == 2
    return orders


@pytest.mark.parametrize("mode", [LoadMode.WHOLE, LoadMode.LAYERS])
def test_a_save_waits_for_half_of_the_time_of_a_step_and_one_load_for_the_rest(
    roles: Roles, daemon: DaemonProcess, mode: LoadMode
) -> None:
    store(roles)
    orders, calls = orders_of_save_and_loads(roles, mode), asked(roles)
    with daemon.stopped():
        roles.step(orders)
    (save, save_s), (load, load_s) = (call for call in calls if call[1] > 0)
    assert (save, load) == ("reserve", "adopt")
    assert save_s == _WAIT_S / 2
    assert load_s <= _WAIT_S - save_s
    report = roles.worker.take_report()
    assert report is not None
    assert [failed.is_unanswered for failed in report.failed] == [True, True]


def test_a_save_that_is_answered_leaves_the_loads_all_of_their_time(roles: Roles) -> None:
    store(roles)
    orders, calls = orders_of_save_and_loads(roles, LoadMode.WHOLE), asked(roles)
    roles.step(orders)
    assert [name for name, _ in calls] == ["reserve", "adopt", "adopt"]
    assert all(seconds > _WAIT_S / 2 for name, seconds in calls if name == "adopt")
    report = roles.worker.take_report()
    assert report is not None
    assert not report.failed


@pytest.mark.parametrize("mode", [LoadMode.WHOLE, LoadMode.LAYERS])
def test_a_load_of_which_nothing_arrives_ends_although_its_layers_have_more_time(
    roles: Roles, faults: Faults, mode: LoadMode
) -> None:
    store(roles)
    client = roles.worker._client
    keys = [block.key for block in client.admin.list_blocks()]
    until(lambda: all(block.on_ssd for block in client.admin.list_blocks()))
    until(lambda: client.evict(keys, "dram").held == 0 and not any(b.in_dram for b in client.admin.list_blocks()))
    faults.set("preadv", "HOLD")
    order_load(roles, mode)
    roles.step(roles.orders())
    faults.clear()
    report = roles.worker.take_report()
    assert report is not None
    (failed,) = report.failed
    assert "sent nothing" in failed.reason
