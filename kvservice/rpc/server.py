"""The gRPC server: our services, health and reflection, on grpc.aio.

Messages that carry tensor bytes pass as raw bytes and are read and written by the frame codec, so
that protobuf copies none of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvservice.rpc.addresses import AddressUnusable, why_unusable
from kvservice.rpc.admin import AdminService
from kvservice.rpc.blocks import BlockService
from kvservice.rpc.calls import CallCounts, guarded
from kvservice.rpc.devices import DeviceService
from kvservice.rpc.hints import HintService
from kvservice.rpc.sessions import SessionService
from kvservice.store.tasks import LoopBudget
from kvservice_api.address import UnixAddress
from kvservice_api.v1 import admin_pb2, blocks_pb2, devices_pb2, hints_pb2, sessions_pb2

_RAW_REQUESTS = {"SaveBlocks", "Exchange"}  # Exchange: a parse error inside grpc gives the client no reason.
_RAW_RESPONSES = {"LoadBlocks"}
_CONTROL_BYTES_MAX = 4 << 20  # Keys of a request, mostly.
_CALLS_A_TURN = 8  # Each takes up to half a millisecond of the event loop until gRPC has its answer.


class UnixSocket(NamedTuple):
    """A UNIX socket without TLS: its mode decides who may connect."""

    path: Path
    mode: int

    def listen(self, server: grpc.aio.Server) -> None:
        """Create the socket. The umask gives it its mode at once, so that no other user can connect before."""
        before = os.umask(0o177)
        try:
            server.add_insecure_port(UnixAddress(str(self.path)).target)
        finally:
            os.umask(before)
        self.path.chmod(self.mode)


class Server:
    """Serves until `stop`. `addresses` are grpc's: ``host:port``, with TLS where there are `credentials`.

    Raises AddressUnusable.
    """

    def __init__(
        self,
        blocks: BlockService,
        sessions: SessionService,
        hints: HintService,
        devices: DeviceService,
        admin: AdminService,
        addresses: Sequence[str],
        *,
        frame_bytes: int,
        unix_socket: UnixSocket | None = None,
        credentials: grpc.ServerCredentials | None = None,
        is_traced: bool = False,
    ) -> None:
        self.calls = CallCounts()
        self.loop_budget = LoopBudget(_CALLS_A_TURN)
        self._server = grpc.aio.server(options=_options(frame_bytes))
        services = {
            blocks_pb2.DESCRIPTOR.services_by_name["BlockService"]: blocks,
            sessions_pb2.DESCRIPTOR.services_by_name["SessionService"]: sessions,
            hints_pb2.DESCRIPTOR.services_by_name["HintService"]: hints,
            devices_pb2.DESCRIPTOR.services_by_name["DeviceService"]: devices,
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"]: admin,
        }
        for descriptor, servicer in services.items():
            handlers = _handlers(descriptor, servicer, self.calls, self.loop_budget, is_traced=is_traced)
            self._server.add_generic_rpc_handlers([handlers])
        names = [descriptor.full_name for descriptor in services]
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # Its types leave `aio` out.
        self._health_names = ["", *names]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        self.ports = [self._listen(address, credentials) for address in addresses]
        if unix_socket is not None:
            unix_socket.listen(self._server)

    def _listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise AddressUnusable("server.address", address, why_unusable(address)) from error

    async def start(self) -> None:
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def refuse_new_work(self) -> None:
        """Report NOT_SERVING to load balancers and probes. Running calls continue."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Accept no new calls, and give running ones `grace_s` seconds to end."""
        await self._server.stop(grace_s)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._health_names:
            await self._health.set(name, status)


def _handlers(
    descriptor: ServiceDescriptor, servicer: object, calls: CallCounts, loop_budget: LoopBudget, *, is_traced: bool
) -> grpc.GenericRpcHandler[Any, Any]:
    methods = {}
    for method in descriptor.methods:
        request = message_factory.GetMessageClass(method.input_type)
        response = message_factory.GetMessageClass(method.output_type)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        is_stream = method.client_streaming
        methods[method.name] = make(
            guarded(
                getattr(servicer, method.name),
                calls,
                loop_budget,
                parse=None if is_stream else request.FromString,
                span_name=f"{descriptor.full_name}/{method.name}" if is_traced else "",
            ),
            request_deserializer=request.FromString if is_stream and method.name not in _RAW_REQUESTS else None,
            response_serializer=None if method.name in _RAW_RESPONSES else response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(descriptor.full_name, methods)


def _options(frame_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max(frame_bytes + 65536, _CONTROL_BYTES_MAX)),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.max_frame_size", 16_777_215),
        ("grpc.http2.lookahead_bytes", 16 << 20),
        ("grpc.http2.write_buffer_size", 8 << 20),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.experimental.tcp_min_read_chunk_size", 65536),  # 512 keys are read in one piece, not in three.
        ("grpc.experimental.tcp_read_chunk_size", 65536),
        ("grpc.so_reuseport", 0),  # Refuse to start if another daemon has the address; do not share it.
        ("grpc.keepalive_time_ms", 20_000),  # Detect a client whose host has failed within 30 seconds.
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.server_handshake_timeout_ms", 10_000),  # Close connections that do not finish the handshake in time.
    ]
