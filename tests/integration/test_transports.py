"""Every transport keeps the contract."""

from __future__ import annotations

from tests.contracts.transport import TransportContract


class TestGrpc(TransportContract):
    transport = "grpc"


class TestShm(TransportContract):
    transport = "shm"
