"""What the log tells at the level `debug`."""

from __future__ import annotations

from collections.abc import Callable

from kvservice_client import Durability
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save


def test_the_log_for_debugging_tells_what_the_daemon_does_and_nothing_of_grpc(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(log__level="debug")
    with daemon.client("an engine") as client:
        chain = new_chain(SMALL, 3)
        save(client, SMALL, chain, Durability.SSD)
        client.evict(chain, "dram")

    left = daemon.wait_for_log("a client is not attached any more: its leases end")
    assert (left["client"], left["level"]) == ("an engine", "debug")
    assert daemon.wait_for_log("a client is attached")["number"] == left["number"]
    assert daemon.wait_for_log("a new layout")["fingerprint"] == SMALL.fingerprint.hex()
    evicted = daemon.wait_for_log("evicted")
    assert (evicted["tier"], evicted["blocks"], evicted["last_copies"]) == ("dram", 3, 0)
    assert evicted["space_for"] == "a request"
    assert not [entry for entry in daemon.log if str(entry["logger"]).startswith("grpc")]
