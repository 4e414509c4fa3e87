"""Applies to every test: one thread for tiny models, gRPC as our packages load it, examples without a deadline, and
no garbage collection of what lives as long as the process.
"""

from __future__ import annotations

import gc
import sys

import pytest
from hypothesis import HealthCheck, settings

import kvservice_api.grpc_forks  # noqa: F401  # Before a test module imports gRPC by itself.

# On a busy machine an example, or its generation, may take long, which is not a failure. `make test-slow` runs the
# property tests with the profile `thorough`.
settings.register_profile("thorough", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("kvservice", settings.get_profile("thorough"), max_examples=25)
settings.load_profile("kvservice")

gc.disable()  # Collecting tests makes no garbage, and a search for it takes a sixth of the time.


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """torch uses one thread: for such small work, more threads mostly wait for each other and keep cores busy."""
    if torch := sys.modules.get("torch"):  # A test that uses torch has imported it by now.
        torch.set_num_threads(1)
