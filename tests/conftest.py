"""For every test: one thread for what computes with tiny models, and gRPC loaded as our packages load it."""

from __future__ import annotations

import sys

import pytest

import kvservice_api.grpc_forks  # noqa: F401  # Before a test module imports gRPC by itself.


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """torch computes on one: threads that share work this small mostly wait for each other, and keep cores busy."""
    if torch := sys.modules.get("torch"):  # Whoever computes with it has imported it by now.
        torch.set_num_threads(1)
