"""Each RPC in the protocol files has a test of its own, and the daemon serves exactly these RPCs."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvservice_api import v1
from tests.daemon import DaemonProcess

STANDARD = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def files_of_the_proto() -> Iterator[Any]:
    for module in pkgutil.iter_modules(v1.__path__, v1.__name__ + "."):
        if module.name.endswith("_pb2"):
            yield importlib.import_module(module.name).DESCRIPTOR


SERVICES = [service for file in files_of_the_proto() for service in file.services_by_name.values()]
METHODS = [method for service in SERVICES for method in service.methods]


@pytest.fixture
def channel(daemon: DaemonProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(daemon.address) as channel:
        yield channel


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_rpc_has_a_test_that_calls_it_and_checks_its_effect(method: MethodDescriptor) -> None:
    service = re.sub(r"(?<!^)(?=[A-Z])", "_", method.containing_service.name).lower()
    tests = importlib.import_module(f"tests.integration.test_rpc_{service}")
    assert any(name.startswith(f"test_{method.name}_") for name in vars(tests)), "no test is named after it"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_no_rpc_is_unimplemented(channel: grpc.Channel, method: MethodDescriptor) -> None:
    """Even an empty message is answered, or refused with a reason."""
    name = f"/{method.containing_service.full_name}/{method.name}"
    call = channel.stream_stream(name, None, None)(iter([b""]), timeout=10)
    with suppress(grpc.RpcError):
        list(call)
    assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


def test_what_the_proto_does_not_have_is_unimplemented(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/kvservice_api.v1.BlockService/NoSuchRpc", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("service", ["", *sorted(STANDARD), *(service.full_name for service in SERVICES)])
def test_health_is_serving(channel: grpc.Channel, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    if service in STANDARD:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        return
    serving = health_pb2.HealthCheckResponse.SERVING
    assert stub.Check(request, timeout=10).status == serving
    assert next(stub.Watch(request, timeout=10)).status == serving


def test_reflection_describes_every_service_of_the_proto(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
        request = reflection_pb2.ServerReflectionRequest(**question)
        return next(stub.ServerReflectionInfo(iter([request]), timeout=10))

    listed = {service.name for service in ask(list_services="").list_services_response.service}
    assert listed == STANDARD | {service.full_name for service in SERVICES}

    for service in SERVICES:
        answer = ask(file_containing_symbol=service.full_name).file_descriptor_response
        files = map(descriptor_pb2.FileDescriptorProto.FromString, answer.file_descriptor_proto)
        expected = descriptor_pb2.FileDescriptorProto()
        service.file.CopyToProto(expected)
        assert expected in files
