"""Every RPC of DeviceService, called over the wire of a daemon without CUDA. `tests/gpu` shows what they do with it."""

from __future__ import annotations

import pytest

from kvservice_api.errors import DeviceUnavailable, IncompleteSave, InvalidRequest, RegistrationEnded, UnknownClient
from kvservice_api.v1 import blocks_pb2
from kvservice_api.v1 import devices_pb2 as pb
from tests.integration.known_blocks import SMALL, new_chain
from tests.integration.wire import Wire, refused

SERVICE = "DeviceService"


@pytest.fixture
def no_cuda(wire: Wire) -> None:
    if "cuda_ipc" in wire.capabilities().transports:
        pytest.skip("this host has a GPU: tests/gpu")


def begin(wire: Wire) -> pb.SaveFromDeviceRequest:
    chain = new_chain(SMALL, 2)
    header = blocks_pb2.SaveHeader(
        client_id=wire.client_id,
        layout_fingerprint=SMALL.fingerprint,
        parent_key=chain.parent,
        keys=chain.packed_keys,
    )
    return pb.SaveFromDeviceRequest(begin=pb.SaveFromDeviceBegin(header=header, registration_id=7))


def test_RegisterMemory_names_the_reason_why_the_daemon_does_not_use_cuda(wire: Wire, no_cuda: None) -> None:
    why = wire.capabilities().cuda_ipc_refused_because

    assert why
    assert wire.status().cuda.refused_because == why
    with refused(DeviceUnavailable, why[:20]):
        wire.devices.RegisterMemory(pb.RegisterMemoryRequest(client_id=wire.client_id))
    with refused(UnknownClient, "attach"):
        wire.devices.RegisterMemory(pb.RegisterMemoryRequest(client_id=bytes(16)))


def test_UnregisterMemory_of_a_registration_that_never_was_succeeds(wire: Wire) -> None:
    wire.devices.UnregisterMemory(pb.UnregisterMemoryRequest(client_id=wire.client_id, registration_id=7))


def test_LoadToDevice_without_a_registration_is_refused(wire: Wire) -> None:
    expected = RegistrationEnded if "cuda_ipc" in wire.capabilities().transports else DeviceUnavailable

    with refused(expected, "CUDA|register"):
        list(wire.devices.LoadToDevice(pb.LoadToDeviceRequest(client_id=wire.client_id, registration_id=7)))


def test_SaveFromDevice_without_a_registration_stores_nothing(wire: Wire) -> None:
    expected = RegistrationEnded if "cuda_ipc" in wire.capabilities().transports else DeviceUnavailable
    before = wire.status().blocks

    with refused(expected, "CUDA|register"):
        list(wire.devices.SaveFromDevice(iter([begin(wire)])))
    with refused(InvalidRequest, "begin"):
        list(wire.devices.SaveFromDevice(iter([pb.SaveFromDeviceRequest(commit=True)])))
    with refused(IncompleteSave, "without a commit"):
        list(wire.devices.SaveFromDevice(iter([])))

    assert wire.status().blocks == before
