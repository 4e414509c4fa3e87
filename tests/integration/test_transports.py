"""Every transport keeps the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvservice_api.errors import Overloaded
from tests.contracts.transport import TransportContract
from tests.daemon import DaemonProcess, until
from tests.files_run import save_and_loads
from tests.integration.known_blocks import LARGE, new_chain, save


class TestGrpc(TransportContract):
    transport = "grpc"


class TestBulk(TransportContract):
    transport = "bulk"


class TestShm(TransportContract):
    transport = "shm"


def test_closing_a_load_early_ends_the_call_at_the_daemon(new_daemon: Callable[..., DaemonProcess]) -> None:
    daemon, chain = new_daemon(server__loads_max=1), new_chain(LARGE, 192)  # More than gRPC sends ahead of its reader.
    with daemon.client(transport="grpc", timeout_s=15) as client:
        save(client, LARGE, chain)
        with client.open_layout(LARGE).lookup(chain) as lease:
            load = lease.load()
            next(load)
            with pytest.raises(Overloaded):
                next(lease.load())
            load.close()

            def is_free() -> bool:
                try:
                    next(lease.load())
                except Overloaded:
                    return False
                return True

            until(is_free)


@pytest.fixture(scope="module")
def files_of() -> dict[str, set[str]]:
    return save_and_loads()


@pytest.mark.parametrize(
    ("operation", "files_max", "client_files_max"),
    # Two files of a load are its measurement; two of a save run only if the policy has not answered before its write.
    # One of each sees whether the request is traced. Tails, arrived slices and the space of uploads have files of their
    # own since their files had more than 600 lines. A save ends unused bulk saves of its client; reads from SSD have an
    # order; the threads of a drive have a file. The bytes of a load and its turn beside other loads have a file each.
    # So have an upload's begin, its state, its frames and its commit; the parts of a save; a promotion, its reads,
    # their order, and their system calls. A load asks the layout for the size of a layer.
    [("save", 55, 11), ("load from DRAM", 32, 9), ("load from SSD", 49, 9)],
)
def test_a_save_and_a_load_over_grpc_run_few_files(
    files_of: dict[str, set[str]], operation: str, files_max: int, client_files_max: int
) -> None:
    """`python -m tests.files_run` prints them."""
    files = files_of[operation]
    assert len(files) <= files_max, sorted(files)
    assert sum(each.startswith("kvservice_client") for each in files) <= client_files_max, sorted(files)
