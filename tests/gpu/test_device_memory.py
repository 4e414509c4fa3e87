"""The client's registration of pages for cuda_ipc: when it is made, made again, and ended."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvservice_api.errors import DeviceUnavailable, NotShared, Overloaded, RegistrationEnded
from kvservice_api.v1 import devices_pb2 as pb
from kvservice_client import Client
from kvservice_client.device_memory import LoadPlace
from tests.clock import ClientClock
from tests.daemon import DaemonProcess, until
from tests.gpu.ipc_engine import Engine, layout_of, new_chain, same_tokens

pytestmark = pytest.mark.gpu

FROM, TO = [7, 2, 9, 4, 1], [3, 11, 0, 5, 8]


def registrations_of(client: Client) -> int:
    return client.admin.status().cuda.registrations


def test_after_an_error_of_the_gpu_the_daemon_closes_the_pages_all_the_same(engine: Engine, client: Client) -> None:
    before = registrations_of(client)
    engine.memory.fell_back(DeviceUnavailable("a launch failed once"))
    assert not engine.memory.is_ready

    engine.memory.close()

    assert registrations_of(client) == before - 1


def test_after_an_error_of_the_gpu_the_pages_are_opened_again_when_a_minute_has_passed(
    engine: Engine, client: Client
) -> None:
    clock = engine.memory._clock = ClientClock()
    before, chain, saved = registrations_of(client), new_chain(engine.layout, 64), engine.fill()
    engine.save(chain, FROM)
    engine.memory.fell_back(DeviceUnavailable("a launch failed once"))
    clock.advance(seconds=59.9)
    assert not engine.memory.register()

    clock.advance(seconds=0.2)

    assert not engine.memory.is_ready  # They are registered in the background.
    until(lambda: engine.memory.is_ready)
    assert registrations_of(client) == before
    engine.load(chain, TO)
    assert same_tokens(saved, FROM, engine.read(), TO, 0, 64)


def test_too_many_loads_at_one_time_go_by_another_transport_once(engine: Engine) -> None:
    fences = [engine.memory.fence() for _ in range(256)]

    with pytest.raises(Overloaded, match="256 loads") as refused:
        engine.memory.fence()
    engine.memory.fell_back(refused.value)

    assert engine.memory.is_ready
    for fence in fences:
        fence.end(is_certain=True)
    engine.memory.fence().end(is_certain=True)


def test_a_registration_that_has_ended_is_made_again_at_once(engine: Engine, client: Client) -> None:
    before = registrations_of(client)
    engine.memory.fell_back(RegistrationEnded("the client has no such registration"))
    assert not engine.memory.is_ready

    until(lambda: engine.memory.is_ready)

    assert registrations_of(client) == before


def test_a_lease_of_another_attachment_does_not_end_the_registration_of_this_one(
    engine: Engine, client: Client, daemon: DaemonProcess
) -> None:
    chain = new_chain(engine.layout, 64)
    engine.fill()
    engine.save(chain, FROM)
    with daemon.client("other") as other, other.open_layout(engine.layout).lookup(chain) as lease:
        with pytest.raises(NotShared) as refused:
            list(engine.copies(lease, LoadPlace(0, [TO], [0], 64)))
        engine.memory.fell_back(refused.value)

    assert engine.memory.is_ready


def test_pages_that_are_closed_while_they_are_registered_are_not_open_afterwards(
    cupy: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, before = Engine(cupy, client, layout_of("bfloat16")), registrations_of(client)
    description, has_begun, may_go_on = made.exported.description, threading.Event(), threading.Event()

    def wait() -> pb.RegisterMemoryRequest:
        has_begun.set()
        may_go_on.wait()
        return description()

    monkeypatch.setattr(made.exported, "description", wait)
    with ThreadPoolExecutor(2) as threads:
        registered = threads.submit(made.memory.register)
        has_begun.wait()
        closed = threads.submit(made.memory.close)
        until(made.memory._closed.is_set)
        may_go_on.set()
        closed.result()

    assert not registered.result()
    assert registrations_of(client) == before
