"""Work on a client's threads: in order, bounded, and independent of errors and of the garbage collector."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvservice_client.background import Background

SOON_S = 30.0


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()
    background.join(SOON_S)


def test_work_runs_on_at_most_four_threads_and_queued_work_after_it(background: Background) -> None:
    running, go, done = threading.Semaphore(0), threading.Event(), threading.Semaphore(0)
    names: set[str] = set()

    def work() -> None:
        names.add(str(threading.get_ident()))
        running.release()
        go.wait()
        done.release()

    for _ in range(10):
        background.submit(work)
    for _ in range(4):
        assert running.acquire(timeout=SOON_S)
    assert not running.acquire(blocking=False)
    go.set()
    for _ in range(10):
        assert done.acquire(timeout=SOON_S)
    assert len(names) == 4


def test_work_that_raises_is_logged_and_later_work_runs(
    background: Background, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()
    with caplog.at_level(logging.ERROR):
        for _ in range(8):
            background.submit(lambda: 1 / 0)
        background.submit(done.set)
        assert done.wait(SOON_S)
    assert "ZeroDivisionError" in caplog.text


def test_work_of_one_name_is_queued_once_and_again_after_it_has_run(background: Background) -> None:
    go, done = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        go.wait()
        done.release()

    for _ in range(5):
        background.submit_once("attach", work)
    background.submit_once("another", work)
    go.set()
    for _ in range(2):
        assert done.acquire(timeout=SOON_S)
    background.close()
    background.join(SOON_S)
    assert not done.acquire(blocking=False)
    background.submit_once("attach", work)
    assert done.acquire(timeout=SOON_S)


def test_what_the_work_refers_to_is_dropped_when_it_has_run(background: Background) -> None:
    dropped = threading.Event()

    class Held:
        def use(self) -> None: ...

        def __del__(self) -> None:
            background.submit(dropped.set)  # As a lookup that is dropped does.

    background.submit(Held().use)
    assert dropped.wait(SOON_S)


def test_threads_end_at_the_close_and_work_that_is_queued_or_comes_later_still_runs() -> None:
    background, done, go = Background(), threading.Semaphore(0), threading.Event()

    def work() -> None:
        go.wait()
        done.release()

    for _ in range(6):
        background.submit(work)
    background.close()
    go.set()
    for _ in range(6):
        assert done.acquire(timeout=SOON_S)
    background.join(SOON_S)
    assert not background._threads
    background.submit(done.release)
    assert done.acquire(timeout=SOON_S)


def test_a_join_waits_for_a_thread_that_another_one_just_starts(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, go = threading.Event(), threading.Event()
    start = threading.Thread.start

    def start_late(thread: threading.Thread) -> None:
        if thread.name == "kvservice-background":
            starting.set()
            assert go.wait(SOON_S)
        start(thread)

    with ThreadPoolExecutor(2) as others:
        monkeypatch.setattr(threading.Thread, "start", start_late)
        submitted = others.submit(background.submit, lambda: None)
        assert starting.wait(SOON_S)
        monkeypatch.setattr(threading.Thread, "start", start)
        joined = others.submit(background.join, SOON_S)
        with pytest.raises(TimeoutError):
            joined.result(0.05)
        go.set()
        submitted.result(SOON_S)
        background.close()
        joined.result(SOON_S)
