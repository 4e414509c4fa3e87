"""Imports gRPC with its own handling of forks off. Every module that needs gRPC imports this module first.

By default gRPC handles forks in C: at a fork during which no thread is inside gRPC, it stops and restarts gRPC in
parent and child. Some running calls of the parent then stall or end early (seen with grpcio 1.85.1, at about one fork
in a hundred of a process that keeps calling). The client does not need this: see ``kvservice_client/own_grpc.py``.

gRPC reads the setting when it is imported. Its handling stays on if the environment has
``GRPC_ENABLE_FORK_SUPPORT``, or if other code imported gRPC before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"


@contextmanager
def fork_handlers_off() -> Iterator[None]:
    """gRPC that is imported in this context does not handle forks, unless the environment has the variable."""
    if _VARIABLE in os.environ:
        yield
        return
    os.environ[_VARIABLE] = "0"
    try:
        yield
    finally:
        del os.environ[_VARIABLE]  # Child programs must get the unchanged environment.


with fork_handlers_off():
    import grpc  # noqa: F401
