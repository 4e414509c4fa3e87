"""Where the bulk port listens, and which address of it is warned of."""

from __future__ import annotations

import pytest

from kvservice.rpc.addresses import listen_for_bulk


@pytest.mark.parametrize(
    ("bulk", "grpc", "is_warned"),
    [
        ("127.0.0.2:0", "127.0.0.1:7070", True),
        ("127.0.0.1:0", "0.0.0.0:7070", True),
        ("127.0.0.1:0", "127.0.0.1:7070", False),
        ("0.0.0.0:0", "127.0.0.1:7070", False),
        ("", "127.0.0.1:0", False),
    ],
)
def test_a_bulk_port_at_another_host_than_that_of_grpc_is_warned_of(
    caplog: pytest.LogCaptureFixture, bulk: str, grpc: str, is_warned: bool
) -> None:
    listener = listen_for_bulk(bulk, grpc, 7070)
    assert listener is not None
    listener.close()

    assert [("clients connect to the bulk port at the host" in each) for each in caplog.messages] == [True] * is_warned


def test_no_bulk_port_is_wanted() -> None:
    assert listen_for_bulk("off", "127.0.0.1:7070", 7070) is None
