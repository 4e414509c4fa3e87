"""Imports gRPC with its own handling of forks off. The first of our modules to be imported that needs gRPC.

gRPC handles forks by default, in C: at a fork at which no thread happens to be inside gRPC it stops gRPC and starts
it again, in parent and child. Of the calls that run in the parent, some then stall or end early (seen with grpcio
1.85.1, at about one fork in a hundred of a process that keeps calling). The client needs none of it: see
``kvservice_client/own_grpc.py``.

gRPC reads the setting when it is imported. It stays on where the environment has ``GRPC_ENABLE_FORK_SUPPORT``, and
where other code has imported gRPC before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"


@contextmanager
def fork_handlers_off() -> Iterator[None]:
    """While the block runs, gRPC that is loaded does not handle forks, unless the environment already says whether."""
    if _VARIABLE in os.environ:
        yield
        return
    os.environ[_VARIABLE] = "0"
    try:
        yield
    finally:
        del os.environ[_VARIABLE]  # Programs that are started from here get the environment as it was.


with fork_handlers_off():
    import grpc  # noqa: F401
