"""The work of one transfer, shared among threads."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvservice_api.errors import DeadlineExceeded
from kvservice_client.retry import Deadline
from kvservice_client.transports import copying
from kvservice_client.transports.copying import Batch, Copiers
from tests.collections import without_collections
from tests.daemon import SOON_S

MIB = 1 << 20


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT interrupts, although a shell makes background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_who_waits_does_the_work_where_no_thread_helps() -> None:
    with ThreadPoolExecutor(1) as pool:
        release = threading.Event()
        pool.submit(release.wait)
        done: list[tuple[int, int]] = []
        with Batch(lambda: pool) as batch:
            group = batch.start(lambda part: done.append((part.start, threading.get_ident())), [MIB] * 8)
            batch.finish(group, Deadline(10))
            assert [at for at, _ in done] == list(range(8))
            assert {thread for _, thread in done} == {threading.get_ident()}
        release.set()


def test_helpers_begin_before_a_thread_waits(pool: ThreadPoolExecutor) -> None:
    with Batch(lambda: pool) as batch:
        helped = threading.Event()
        group = batch.start(lambda _: helped.set(), [MIB] * 2)
        assert helped.wait(60)
        batch.finish(group, Deadline(10))


def test_a_small_transfer_is_copied_by_who_waits_for_it() -> None:
    threads: set[int] = set()
    with Copiers().begin(MIB) as batch:
        groups = [batch.start(lambda _: threads.add(threading.get_ident()), [MIB // 8] * 2) for _ in range(4)]
        for group in groups:
            batch.finish(group, Deadline(10))
    assert threads == {threading.get_ident()}


def test_nothing_to_do_is_done(pool: ThreadPoolExecutor) -> None:
    with Batch(lambda: pool) as batch:
        batch.finish(batch.start(lambda _: None, []), Deadline(10))


def test_an_error_is_raised_where_the_work_is_waited_for_and_ends_it(pool: ThreadPoolExecutor) -> None:
    began: list[int] = []

    def work(part: range) -> None:
        began.append(part.start)
        raise ValueError(part.start)

    with Batch(lambda: pool) as batch:
        group = batch.start(work, [MIB] * 100)
        with pytest.raises(ValueError, match=r"^\d+$"):
            batch.finish(group, Deadline(10))
    assert len(began) <= 3  # At most one per thread.


def test_work_that_takes_longer_than_allowed_is_given_up(pool: ThreadPoolExecutor) -> None:
    hung, helped = threading.Event(), threading.Event()

    def work(part: range) -> None:
        if threading.current_thread() is not threading.main_thread():
            helped.set()
            hung.wait()

    with Batch(lambda: pool) as batch:
        group = batch.start(work, [MIB] * 2)
        assert helped.wait(60)
        with pytest.raises(DeadlineExceeded):
            batch.finish(group, Deadline(0.05))
        hung.set()


def test_leaving_a_batch_waits_for_what_runs_and_drops_the_rest(pool: ThreadPoolExecutor) -> None:
    running, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work(part: range) -> None:
        running.set()
        go_on.wait()
        done.append(part.start)

    with Batch(lambda: pool) as batch:
        batch.start(work, [MIB] * 100)
        assert running.wait(60)
        threading.Timer(0.05, go_on.set).start()
    assert 1 <= len(done) <= 3


def test_leaving_a_batch_waits_for_a_helper_whose_start_has_raised() -> None:
    """A thread pool may raise because it has too few threads, and have queued the work for those that it has."""

    class Pool(ThreadPoolExecutor):
        def submit(self, *work: Any, **options: Any) -> Any:
            super().submit(*work, **options)
            raise RuntimeError("can't start new thread")

    running, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work(part: range) -> None:
        running.set()
        go_on.wait(60)
        done.append(part.start)

    with Pool(1) as pool:
        with Batch(lambda: pool) as batch:
            batch.start(work, [MIB] * 100)
            assert running.wait(60)
            threading.Timer(0.05, go_on.set).start()
        assert len(done) == 1


def test_a_batch_without_helpers_does_all_work() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    done: list[int] = []
    with Batch(lambda: pool) as batch:
        batch.finish(batch.start(lambda part: done.append(part.start), [MIB] * 3), Deadline(10))
    assert done == [0, 1, 2]


def test_a_transfer_that_the_garbage_collector_ends_on_its_own_helper_does_not_wait_for_that() -> None:
    pool, is_dropped, is_collected = ThreadPoolExecutor(1), threading.Event(), threading.Event()

    def work(part: range) -> None:
        is_dropped.wait(60)
        gc.collect()
        is_collected.set()

    def transfer() -> Iterator[None]:
        with Batch(lambda: pool) as batch:
            batch.start(work, [MIB] * 2)
            yield

    with without_collections():
        cycle: list[object] = [running := transfer()]
        next(running)
        cycle.append(cycle)
        del cycle, running
        is_dropped.set()
        assert is_collected.wait(SOON_S)
    pool.shutdown()


@pytest.mark.usefixtures("interrupts")
def test_a_batch_that_is_interrupted_is_left_once_its_work_has_ended() -> None:
    go_on = threading.Event()
    written: list[int] = []

    def work(part: range) -> None:
        go_on.wait(60)
        written.append(part.start)

    timers = [threading.Timer(0.1 * number, os.kill, (os.getpid(), signal.SIGINT)) for number in (1, 2)]
    timers.append(threading.Timer(0.4, go_on.set))

    def interrupted() -> None:
        with Copiers().begin(100 * MIB) as batch:
            batch.start(work, [MIB] * 100)
            for timer in timers:
                timer.start()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert go_on.is_set()
    assert sorted(written) == list(range(copying._HELPERS)), "what ran has ended, and what waited was not begun"
    for timer in timers:
        timer.join()


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_is_raised_at_once_though_it_hit_the_work_of_others() -> None:
    """A thread that waits for one group does parts of the next groups meanwhile."""
    hung, helped = threading.Event(), threading.Event()

    def first(part: range) -> None:
        if part.start == 0:
            helped.set()
            hung.wait(60)

    def second(part: range) -> None:
        raise KeyboardInterrupt

    def interrupted(pool: ThreadPoolExecutor) -> None:
        with Batch(lambda: pool) as batch:
            group = batch.start(first, [MIB] * 2)
            assert helped.wait(60)
            batch.start(second, [MIB])
            threading.Timer(0.2, hung.set).start()
            batch.finish(group, Deadline(60))
            raise AssertionError("the interrupt was kept for later")

    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        interrupted(pool)
