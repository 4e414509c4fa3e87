"""What `foresight` has learned survives a daemon's end of every kind."""

from __future__ import annotations

from collections.abc import Callable

from kvservice.store.mover.learned_counts import unpacked
from kvservice_client import Durability
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import SMALL, new_chain, save


def use(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        save(client, SMALL, new_chain(SMALL, 3), Durability.SSD)


def test_learned_counts_survive_a_stop_and_a_kill_and_damage_is_ignored(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon(mover__policy="foresight")
    path = daemon.store / "learned"
    use(daemon)
    assert daemon.stop() == 0
    written = path.read_bytes()
    assert list(unpacked(written)) == ["foresight"]
    assert len(written) < 64 * 1024

    daemon.start()
    assert not complaints(daemon)
    use(daemon)
    daemon.kill()
    assert path.read_bytes() == written, "the next write is not due, and none was cut off"

    path.write_bytes(written[:1000])
    daemon.start()
    (line,) = complaints(daemon)
    assert line.endswith("it is damaged")
    use(daemon)
    assert daemon.stop() == 0
    assert list(unpacked(path.read_bytes())) == ["foresight"]


def complaints(daemon: DaemonProcess) -> list[str]:
    """Lines of the log since the last start that speak of the file."""
    return [entry["event"] for entry in daemon.log if "had learned" in str(entry.get("event"))]
