"""Hints from the client's side: the queue, readiness, restarts of the daemon, and wrong arguments."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_api.errors import DaemonTooOld, InvalidRequest
from kvservice_api.v1 import hints_pb2 as pb
from kvservice_client import BlockChain, Client, Durability, QueuedRequest, Readiness, ReadyState, Session
from kvservice_client.hints import _differences, _Entry
from tests.daemon import MIB, DaemonProcess, until
from tests.forking import in_child
from tests.integration.known_blocks import LARGE, new_chain, save, verify

NewDaemon = Callable[..., DaemonProcess]
BLOCKS = 20  # Of a session: 4 MiB.


@pytest.fixture(params=["lru"])
def small(new_daemon: NewDaemon, request: pytest.FixtureRequest) -> DaemonProcess:
    """DRAM for about a third of eight sessions, most of which hints may use."""
    return new_daemon(
        mover__policy=request.param,
        dram__capacity_bytes=14 * MIB,
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


@pytest.mark.parametrize("small", ["lru", "lookahead", "foresight"], indirect=True)
def test_the_heads_of_a_queue_are_in_dram_before_they_are_looked_up(small: DaemonProcess) -> None:
    with small.client() as client:
        sessions, seen, hints = stored_sessions(client, 8), Seen(client), client.hints()
        queue = queue_of(sessions)
        hints.set_queue(queue)
        for number in range(8):  # The engine takes one request after another.
            name = f"request-{number}"
            session = sessions[number][0]
            until(lambda name=name: hints.readiness(name).state is ReadyState.IN_DRAM)  # type: ignore[misc]
            until(lambda session=session: in_dram(client, session))  # type: ignore[misc]
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
        assert counters["promoted_blocks"] >= 8 * BLOCKS
        assert counters["hint_promoted_blocks"] > 0, "a policy may have read some of them ahead"
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


def test_a_queue_is_sent_as_its_changes_and_has_the_same_order_in_the_daemon(daemon: DaemonProcess) -> None:
    """The daemon counts what it receives: a step of the engine's queue is one put and one removal."""
    with daemon.client() as client:
        hints, chain = client.hints(), new_chain(LARGE)
        queue = [QueuedRequest(f"request-{number}", chain, starts_in_s=number / 10) for number in range(500)]
        received = client.admin.status().counters["hints_received"]
        hints.set_queue(queue)
        until(lambda: hints.readiness("request-499").state is ReadyState.ABSENT)
        assert client.admin.status().counters["hints_received"] == received + 500
        for number in range(500, 600):
            queue = [*queue[1:], QueuedRequest(f"request-{number}", chain, starts_in_s=number / 10)]
            hints.set_queue(queue)
        until(lambda: hints.readiness("request-599").state is ReadyState.ABSENT)
        status = client.admin.status()
        assert status.queued_requests == 500
        assert status.counters["hints_received"] == received + 600


def test_what_is_reported_together_is_one_message(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    with daemon.client() as client:
        hints, chain, messages = client.hints(), new_chain(LARGE), list[pb.ExchangeRequest]()
        converse = hints._channel.converse

        def recorded(method: str, requests: Iterator[pb.ExchangeRequest], answer: Any) -> Any:
            return converse(method, (messages.append(each) or each for each in requests), answer)  # type: ignore[func-returns-value]

        monkeypatch.setattr(hints._channel, "converse", recorded)
        hints.put(QueuedRequest("first", chain))
        until(lambda: hints.readiness("first").state is ReadyState.ABSENT)
        messages.clear()
        with hints.together():
            hints.remove("first")
            for number in range(5):
                hints.put(QueuedRequest(f"request-{number}", chain))
            hints.turn_finished(chain, prompt_tokens=10, answer_tokens=5)
        until(lambda: hints.readiness("request-4").state is ReadyState.ABSENT)
        assert [(len(each.changes), len(each.hints)) for each in messages] == [(6, 1)]


QUEUES = st.lists(st.permutations(range(12)).flatmap(lambda order: st.integers(0, 12).map(lambda n: order[:n])))


@given(queues=QUEUES)
def test_the_changes_that_are_sent_turn_each_queue_into_the_next_one(queues: list[list[int]]) -> None:
    mirror: list[str] = []
    before: dict[str, _Entry] = {}
    for order in queues:
        entries = {str(number): _Entry(str(number), pb.HintSubject(), None, 0) for number in order}
        for change in _differences(before, entries, 0.0):
            name = change if isinstance(change, str) else change.entry.request_id
            if name in mirror:
                mirror.remove(name)
            if not isinstance(change, str):
                assert not change.before or change.before in mirror
                mirror.insert(mirror.index(change.before) if change.before else len(mirror), name)
        assert mirror == list(entries)
        before = entries


def test_a_request_that_is_put_in_front_of_another_is_promoted_before_it(small: DaemonProcess) -> None:
    with small.client() as client:
        sessions, hints = stored_sessions(client, 8), client.hints()
        hints.set_queue(queue_of(sessions[:7]))
        until(lambda: hints.readiness("request-0").state is ReadyState.IN_DRAM)
        assert hints.readiness("request-6").state is ReadyState.ON_SSD
        hints.put(QueuedRequest("urgent", sessions[7][0]), before="request-0")
        until(lambda: hints.readiness("urgent").state is ReadyState.IN_DRAM)
        assert hints.readiness("request-6").state is ReadyState.ON_SSD


def test_hints_never_wait_and_never_raise_while_the_daemon_is_away(small: DaemonProcess) -> None:
    with small.client() as client:
        [(session, chain)] = stored_sessions(client, 1)
        small.kill()
        hints = client.hints()
        for number in range(3000):
            hints.put(QueuedRequest(f"request-{number}", session))
        for number in range(2999):
            hints.remove(f"request-{number}")
        for _ in range(300):
            hints.typing(session)
            hints.tool_call(session, "search", 2.0)
            hints.turn_finished(session, prompt_tokens=10, answer_tokens=20, stop_reason="stop")
        hints.do_not_keep(chain)
        hints.session_ended(session)
        assert hints.readiness("request-2999").state is ReadyState.UNKNOWN
        assert hints.dropped == 902 - 256
        small.start()
        until(lambda: hints.readiness("request-2999").state is ReadyState.IN_DRAM)
        assert client.admin.status().queued_requests == 1


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (lambda hints, session: hints.set_queue("abc"), "requests"),
        (lambda hints, session: hints.set_queue([("id", session)]), "request"),
        (lambda hints, session: hints.set_queue([QueuedRequest("a", session)] * 2), "request_id"),
        (lambda hints, session: hints.put(QueuedRequest("", session)), "request_id"),
        (lambda hints, session: hints.put(QueuedRequest("x" * 201, session)), "request_id"),
        (lambda hints, session: hints.put(QueuedRequest("a", "session-1")), "keys"),  # type: ignore[arg-type]
        (lambda hints, session: hints.put(QueuedRequest("a", [])), "reads"),
        (lambda hints, session: hints.put(QueuedRequest("a", [b"short"])), "keys"),
        (lambda hints, session: hints.put(QueuedRequest("a", session, starts_in_s=-1.0)), "starts_in_s"),
        (lambda hints, session: hints.put(QueuedRequest("a", session, priority=2**31)), "priority"),
        (lambda hints, session: hints.typing(7), "keys"),
        (lambda hints, session: hints.tool_call(session, "x" * 201), "name"),
        (lambda hints, session: hints.tool_call(session, "search", float("nan")), "expected_s"),
        (lambda hints, session: hints.turn_finished(session, prompt_tokens=-1, answer_tokens=0), "prompt_tokens"),
    ],
)
def test_a_wrong_argument_raises_at_once(daemon: DaemonProcess, wrong: Any, field: str) -> None:
    with daemon.client() as client, pytest.raises(InvalidRequest) as caught:
        wrong(client.hints(), client.session(LARGE, "chat"))
    assert caught.value.details["field"] == field


def test_a_forked_child_has_a_queue_of_its_own(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        hints, chain = client.hints(), new_chain(LARGE)
        hints.set_queue([QueuedRequest("of the parent", chain)])
        until(lambda: hints.readiness("of the parent").state is ReadyState.ABSENT)

        def child() -> int:
            assert hints.readiness("of the parent").state is ReadyState.UNKNOWN
            hints.put(QueuedRequest("of the child", chain))
            until(lambda: hints.readiness("of the child").state is ReadyState.ABSENT)
            return int(client.admin.status().queued_requests)

        assert in_child(child) == 2
        hints.put(QueuedRequest("later", chain))
        until(lambda: hints.readiness("later").state is ReadyState.ABSENT)


def test_a_callback_that_raises_does_not_end_the_stream(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        hints, chain, called = client.hints(), new_chain(LARGE), list[str]()

        def fail(request_id: str, ready: Readiness) -> None:
            called.append(request_id)
            raise RuntimeError("the engine's mistake")

        hints.on_readiness(fail)
        for name in ("one", "two"):
            hints.put(QueuedRequest(name, chain))
            until(lambda name=name: hints.readiness(name).state is ReadyState.ABSENT)  # type: ignore[misc]
        until(lambda: called == ["one", "two"])


def test_prefetch_and_evict_take_sessions(small: DaemonProcess) -> None:
    with small.client() as client:
        (first, _), (second, chain) = stored_sessions(client, 2, "named")
        unknown = client.session(LARGE, "no-such-session")

        assert client.prefetch(sessions=[first, unknown], wait=True) == (1, 0, BLOCKS, 0)
        assert client.prefetch(chain.keys, sessions=[first], wait=True) == (0, BLOCKS, BLOCKS, 0)
        assert in_dram(client, second)
        assert client.evict(sessions=[second, unknown], tier="dram") == (BLOCKS, 0, 1)
        assert (in_dram(client, first), in_dram(client, second)) == (True, False)
        with pytest.raises(InvalidRequest, match="name the tier"):
            client.evict(chain.keys)


def test_a_daemon_that_is_too_old_is_sent_no_hints(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(program=("-m", "tests.older_daemon"))
    with daemon.client() as client:
        session, hints = client.session(LARGE, "chat"), client.hints()
        hints.set_queue([QueuedRequest("one", session)])
        hints.session_ended(session)
        until(lambda: client.admin.status().clients == 1)
        assert hints.readiness("one").state is ReadyState.UNKNOWN
        assert client.admin.status().hint_streams == 0
        with pytest.raises(DaemonTooOld):
            client.prefetch(sessions=[session])
        with pytest.raises(DaemonTooOld):
            client.evict(sessions=[session], tier="dram")


def test_the_example_of_the_page_on_hints_runs(daemon: DaemonProcess, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "hints.md").read_text()
    (example,) = re.findall(r"```python\n((?s:.*?))```", page)
    program = tmp_path / "example.py"
    program.write_text(example.replace("127.0.0.1:7070", daemon.address))
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    expected = [f"turn of {name} loads 512 tokens from DRAM" for name in ("alice", "bob")]
    assert sorted(ran.stdout.splitlines()) == expected


def test_the_thread_of_the_hints_ends_with_its_client(daemon: DaemonProcess) -> None:
    def threads() -> int:
        return sum(thread.name == "kvservice-hints" for thread in threading.enumerate())

    until(lambda: not threads())
    with daemon.client() as client:
        client.hints().put(QueuedRequest("one", new_chain(LARGE)))
        until(lambda: client.hints().readiness("one").state is ReadyState.ABSENT)
        assert threads() == 1
    until(lambda: not threads())


def test_kvctl_status_shows_the_queues(
    daemon: DaemonProcess, kvctl_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with daemon.client() as client:
        client.hints().put(QueuedRequest("one", new_chain(LARGE)))
        until(lambda: client.hints().readiness("one").state is ReadyState.ABSENT)
        until(lambda: "1 queued requests of 1 clients that send hints" in kvctl_here("status").stdout)
        assert "hints received" in kvctl_here("status").stdout
