"""What the connector reports of vLLM's queue in each step. A record stands for the client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvservice_adapter.connectors.vllm.queue_hints import QueueHints
from kvservice_adapter.connectors.vllm.request_parameters import RequestHints, ToolCall
from kvservice_client import BlockChain, QueuedRequest

pytestmark = pytest.mark.fast

CHAIN = BlockChain(bytes(32), (b"k" * 32,), (256,))
ALL = RequestHints(typing=True, tool_call=ToolCall("search", 2.0), session_ended=True)


class Record:
    """An `EngineHints` that keeps what is reported to it. `calls` of one message are in one list."""

    def __init__(self) -> None:
        self.messages: list[list[tuple[Any, ...]]] = []
        self.queue: list[QueuedRequest] = []

    @contextmanager
    def together(self) -> Iterator[None]:
        self.messages.append([])
        yield

    def put(self, request: QueuedRequest, before: str = "") -> None:
        names = [each.request_id for each in self.queue]
        self.queue.insert(names.index(before) if before else len(names), request)
        self.messages[-1].append(("put", request.request_id))

    def remove(self, request_id: str) -> None:
        self.queue = [each for each in self.queue if each.request_id != request_id]
        self.messages[-1].append(("remove", request_id))

    def __getattr__(self, kind: str) -> Any:
        return lambda *arguments, **fields: self.messages[-1].append((kind, *arguments, *fields.values()))

    @property
    def names(self) -> list[str]:
        return [each.request_id for each in self.queue]


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture
def hints(record: Record) -> QueueHints:
    def fail(error: Exception) -> None:
        raise error

    return QueueHints(record, fail)  # type: ignore[arg-type]


def test_a_step_in_which_nothing_changed_sends_nothing(hints: QueueHints, record: Record) -> None:
    hints.arrived("one", CHAIN, 0)
    hints.send()
    hints.send()
    hints.left("unknown")
    hints.send()
    assert record.messages == [[("put", "one")]]


def test_a_request_that_runs_in_the_step_in_which_it_came_is_not_sent(hints: QueueHints, record: Record) -> None:
    hints.arrived("one", CHAIN, 0)
    hints.left("one")
    hints.send()
    assert record.messages == []


def test_all_changes_of_a_step_are_one_message(hints: QueueHints, record: Record) -> None:
    hints.arrived("one", CHAIN, 0)
    hints.send()
    hints.left("one")
    hints.arrived("two", CHAIN, 0)
    hints.ended(CHAIN, None, 10, 5, "stop", ALL)
    hints.send()
    assert record.messages[1] == [
        ("remove", "one"),
        ("put", "two"),
        ("turn_finished", CHAIN, 10, 5, "stop"),
        ("tool_call", CHAIN, "search", 2.0),
        ("typing", CHAIN),
        ("session_ended", CHAIN),
    ]


def test_a_request_without_an_answer_is_no_turn(hints: QueueHints, record: Record) -> None:
    hints.ended(CHAIN, None, 10, 0, "abort", ALL)
    hints.send()
    assert record.messages == [[("session_ended", CHAIN)]]


def test_a_long_queue_is_sent_from_its_head_in_parts_and_the_others_follow(hints: QueueHints, record: Record) -> None:
    for number in range(1000):
        hints.arrived(str(number), CHAIN, 0)
    hints.send()
    assert len(record.queue) == 16
    for _ in range(20):
        hints.send()
    assert record.names == [str(number) for number in range(256)]
    assert len(record.messages) == 16
    for number in range(100, 300):
        hints.left(str(number))
    hints.send()
    while len(record.queue) < 256:
        hints.send()
    assert record.names == [str(number) for number in (*range(100), *range(300, 456))]


def test_the_most_urgent_requests_are_sent_first(hints: QueueHints, record: Record) -> None:
    for number in range(100):
        hints.arrived(str(number), CHAIN, number % 2)
    hints.send()
    assert record.names == [str(number) for number in range(1, 32, 2)]
    assert {each.priority for each in record.queue} == {1}


def test_a_request_that_waits_again_is_in_front_also_of_a_full_queue(hints: QueueHints, record: Record) -> None:
    for number in range(300):
        hints.arrived(str(number), CHAIN, 0)
    for _ in range(20):
        hints.send()
    hints.arrived("again", CHAIN, 0, is_first=True)
    hints.send()
    assert record.names[:2] == ["again", "0"]


def test_what_is_noted_without_being_sent_is_bounded(hints: QueueHints, record: Record) -> None:
    for number in range(20_000):
        hints.arrived(str(number), CHAIN, 0)
        hints.ended(CHAIN, None, 10, 5, "stop", RequestHints())
    assert len(hints._waiting) == 8192
    hints.send()
    assert len(record.messages[0]) == 16 + 256
    for number in range(20_000):
        hints.left(str(number))
    hints.arrived("new", CHAIN, 0)
    hints.send()
    assert record.names == ["new"]


def test_an_id_may_come_again_after_its_request_has_ended(hints: QueueHints, record: Record) -> None:
    hints.arrived("one", CHAIN, 0)
    hints.left("one")
    hints.arrived("one", CHAIN, 5)
    hints.send()
    assert [each.priority for each in record.queue] == [5]


def test_ids_and_keys_are_cut_to_what_a_daemon_takes(hints: QueueHints, record: Record) -> None:
    long = BlockChain(bytes(32), (b"k" * 32,) * 5000, (256,) * 5000)
    for name in ("i" * 201, "\ud800", ""):
        hints.arrived(name, long, 0)
    hints.send()
    assert record.names == ["#1", "#2", "#3"]
    assert {len(each.reads) for each in record.queue if isinstance(each.reads, BlockChain)} == {1024}


def test_priorities_are_cut_to_what_a_daemon_takes(hints: QueueHints, record: Record) -> None:
    for number, priority in enumerate((2**40, -(2**40), 0)):
        hints.arrived(str(number), CHAIN, priority)
    hints.send()
    assert [each.priority for each in record.queue] == [2**30, 0, -(2**30)]


def test_an_error_ends_the_hints_and_is_reported_once(record: Record) -> None:
    errors: list[Exception] = []
    hints = QueueHints(record, errors.append)  # type: ignore[arg-type]
    record.remove = None  # type: ignore[method-assign, assignment]
    hints.arrived("one", CHAIN, 0)
    hints.send()
    for _ in range(3):
        hints.left("one")
        hints.arrived("two", CHAIN, 0)
        hints.send()
    assert [type(each) for each in errors] == [TypeError]
    assert not hints.is_in_dram("two")
