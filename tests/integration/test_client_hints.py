"""Hints from the client's side: the queue, readiness, restarts of the daemon, and wrong arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from kvservice_client import BlockChain, Client, Durability, QueuedRequest, Readiness, ReadyState, Session
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, new_chain, save, verify

NewDaemon = Callable[..., DaemonProcess]
BLOCKS = 20  # Of 98,304 bytes each, and of a session.


@pytest.fixture
def small(new_daemon: NewDaemon) -> DaemonProcess:
    """DRAM for about a third of eight sessions, all of which hints may use."""
    return new_daemon(
        dram__capacity_bytes=9 * MIB,
        index__volatile_map_bytes=1 * MIB,
        ssd__capacity_bytes=64 * MIB,
        hints__dram_share=0.7,
    )


def stored_sessions(client: Client, count: int, prefix: str = "chat") -> list[tuple[Session, BlockChain]]:
    """Sessions whose blocks are only on SSD."""
    found = []
    for number in range(count):
        chain, session = new_chain(LARGE, BLOCKS), client.session(LARGE, f"{prefix}-{number}")
        assert save(client, LARGE, chain, Durability.SSD).stored == BLOCKS
        session.append(chain)
        client.evict(chain.keys, "dram")
        found.append((session, chain))
    return found


def in_dram(client: Client, session: Session) -> bool:
    return all(run.dram for run in session.get().residency)


def queue_of(sessions: Sequence[tuple[Session, BlockChain]]) -> list[QueuedRequest]:
    return [QueuedRequest(f"request-{number}", session) for number, (session, _) in enumerate(sessions)]


class Seen:
    """Every answer about every request, in order."""

    def __init__(self, client: Client) -> None:
        self.states: dict[str, list[ReadyState]] = {}
        client.hints().on_readiness(self._note)

    def _note(self, request_id: str, ready: Readiness) -> None:
        self.states.setdefault(request_id, []).append(ready.state)


def test_the_heads_of_a_queue_are_in_dram_before_they_are_looked_up(small: DaemonProcess) -> None:
    with small.client() as client:
        sessions, seen, hints = stored_sessions(client, 8), Seen(client), client.hints()
        queue = queue_of(sessions)
        hints.set_queue(queue)
        for number in range(8):  # The engine takes one request after another.
            name = f"request-{number}"
            until(lambda name=name: hints.readiness(name).state is ReadyState.IN_DRAM)  # type: ignore[misc]
            assert in_dram(client, sessions[number][0])
            verify(client, LARGE, sessions[number][1])
            queue.pop(0)
            hints.set_queue(queue)
        last = seen.states["request-7"]
        order = [ReadyState.ON_SSD, ReadyState.COMING, ReadyState.IN_DRAM]
        assert last[0] is ReadyState.ON_SSD
        assert last[-1] is ReadyState.IN_DRAM
        assert [state for state in order if state in last] == sorted(set(last), key=order.index)
        assert hints.readiness("request-0").state is ReadyState.UNKNOWN, "it left the queue"
        counters = client.admin.status().counters
        assert counters["hint_promoted_blocks"] >= 8 * BLOCKS
        assert counters["hints_unknown"] == counters["hints_invalid"] == counters["hints_over_limit"] == 0


def test_a_restarted_daemon_receives_the_queue_again(small: DaemonProcess) -> None:
    with small.client() as client:
        sessions, hints = stored_sessions(client, 8), client.hints()
        hints.set_queue(queue_of(sessions))
        until(lambda: hints.readiness("request-0").state is ReadyState.IN_DRAM)
        small.kill()
        until(lambda: hints.readiness("request-0").state is ReadyState.UNKNOWN)
        for number in range(3):
            hints.remove(f"request-{number}")
        hints.typing(sessions[0][0])
        small.start()
        until(lambda: hints.readiness("request-3").state is ReadyState.IN_DRAM)
        until(lambda: hints.readiness("request-7").state is ReadyState.ON_SSD)
        assert client.admin.status().queued_requests == 5
    with small.client("watcher") as client:
        until(lambda: client.admin.status().queued_requests == 0)
