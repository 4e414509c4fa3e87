"""What the client does where no thread can be started: it needs none, or tries again. No file stays open."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvservice_api.errors import DaemonUnavailable
from kvservice_api.mapping import Mapping
from kvservice_api.v1 import blocks_pb2 as pb
from kvservice_client import BlockChain, Client, Outcome, QueuedRequest, RequestReport
from kvservice_client.arena_map import _Threads
from kvservice_client.retry import Deadline
from kvservice_client.transports.shm import _AbandonQueue
from tests.daemon import SOON_S
from tests.thread_limit import no_threads


def test_a_client_without_threads_raises_kverrors_and_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = BlockChain(bytes(32), (bytes(32),), (1,))
    with Client("127.0.0.1:1", timeout_s=SOON_S) as client, no_threads(monkeypatch):
        for _ in range(2):  # Also not later: a thread that did not start is not waited for.
            with pytest.raises(DaemonUnavailable, match="no thread to attach"):
                client._connection.attach_stream.current(Deadline(SOON_S))
            client.report_request(RequestReport(request_id="one", outcome=Outcome.DONE))
            client.hints().set_queue([QueuedRequest("one", chain)])
        assert client._connection.reporter.dropped == 2


def test_a_reservation_that_no_thread_could_abandon_is_abandoned_with_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    abandoned, both = list[int](), threading.Event()

    def release(client_id: bytes, reservation_id: int) -> None:
        abandoned.append(reservation_id)
        if len(abandoned) == 2:
            both.set()

    attach_stream = SimpleNamespace(is_attached_as=lambda client_id: False)
    queue = _AbandonQueue(
        cast(Any, SimpleNamespace(attach_stream=attach_stream)), cast(Any, SimpleNamespace(release=release))
    )
    with no_threads(monkeypatch):
        queue.add(pb.AbandonBlocksRequest(reservation_id=1))
    queue.add(pb.AbandonBlocksRequest(reservation_id=2))
    assert both.wait(SOON_S) and abandoned == [1, 2]


def test_an_arena_is_mapped_without_a_thread_that_prepares_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, begun = _Threads(), threading.Event()

    def work(*given: object) -> None:
        begun.set()

    with (tmp_path / "arena").open("wb") as file:
        before = len(os.listdir("/proc/self/fd"))
        with no_threads(monkeypatch):
            threads.start(work, cast(Mapping, None), file.fileno())
        assert len(os.listdir("/proc/self/fd")) == before
        threads.start(work, cast(Mapping, None), file.fileno())
        assert begun.wait(SOON_S)
