"""Copies and their checksums, and the work of one transfer shared among threads."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvservice_api.errors import DeadlineExceeded
from kvservice_api.image import checksum
from kvservice_client.buffers import Bytes
from kvservice_client.retry import Deadline
from kvservice_client.transports import copying
from kvservice_client.transports.copying import (
    PIECE_BYTES,
    Batch,
    Copiers,
    copy_and_sum,
    copy_runs_and_sum,
    sum_and_copy,
)

MIB = 1 << 20
_COPY = copying._copy


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


@pytest.mark.parametrize("size", [1, 4095, 64 << 10, PIECE_BYTES, PIECE_BYTES + 8, 3 * PIECE_BYTES + 5])
@pytest.mark.parametrize("shift", [0, 1, 8, 16])
def test_a_copy_has_its_bytes_and_its_checksum_for_every_alignment(size: int, shift: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, size + 64, np.uint8)[:size]
    for copy in (copy_and_sum, sum_and_copy):
        target = np.zeros(size + 64, np.uint8)[shift : shift + size]
        assert copy(source, target) == checksum(source.data)
        assert np.array_equal(source, target)


def test_runs_are_copied_and_all_of_the_source_is_summed() -> None:
    source = np.random.default_rng(1).integers(0, 256, 2 * PIECE_BYTES, np.uint8)
    runs = [(3, 100), (200, PIECE_BYTES + 300)]
    target = np.zeros(sum(end - start for start, end in runs), np.uint8)
    assert copy_runs_and_sum(source, runs, target) == checksum(source.data)
    assert np.array_equal(target, np.concatenate([source[start:end] for start, end in runs]))


def damaged(source: Bytes, target: Bytes, *, by_words: bool) -> None:
    """Copies, and gets one bit of the copy wrong."""
    _COPY(source, target, by_words=by_words)
    target[len(target) // 2] ^= 1


@pytest.mark.parametrize("size", [100_000, 3 * PIECE_BYTES])
def test_a_load_is_verified_by_what_arrived_and_a_save_by_what_was_meant(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    source = np.frombuffer(np.random.default_rng(1).bytes(size), np.uint8)
    meant = checksum(source.data)
    monkeypatch.setattr(copying, "_copy", damaged)
    assert copy_and_sum(source, np.empty_like(source)) != meant
    assert copy_runs_and_sum(source, [(0, size // 2)], np.empty(size // 2, np.uint8)) != meant
    assert sum_and_copy(source, np.empty_like(source)) == meant


def test_who_waits_does_the_work_where_no_thread_helps() -> None:
    with ThreadPoolExecutor(1) as pool:
        release = threading.Event()
        pool.submit(release.wait)
        done: list[tuple[int, int]] = []
        with Batch(lambda: pool) as batch:
            group = batch.start(lambda at: done.append((at, threading.get_ident())), [MIB] * 8)
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


def test_nothing_to_do_is_done(pool: ThreadPoolExecutor) -> None:
    with Batch(lambda: pool) as batch:
        batch.finish(batch.start(lambda _: None, []), Deadline(10))


def test_an_error_is_raised_where_the_work_is_waited_for_and_ends_it(pool: ThreadPoolExecutor) -> None:
    began: list[int] = []

    def work(at: int) -> None:
        began.append(at)
        raise ValueError(at)

    with Batch(lambda: pool) as batch:
        group = batch.start(work, [MIB] * 100)
        with pytest.raises(ValueError, match=r"^\d+$"):
            batch.finish(group, Deadline(10))
    assert len(began) <= 3  # At most one per thread.


def test_work_that_takes_longer_than_allowed_is_given_up(pool: ThreadPoolExecutor) -> None:
    hung, helped = threading.Event(), threading.Event()

    def work(at: int) -> None:
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

    def work(at: int) -> None:
        running.set()
        go_on.wait()
        done.append(at)

    with Batch(lambda: pool) as batch:
        batch.start(work, [MIB] * 100)
        assert running.wait(60)
        threading.Timer(0.05, go_on.set).start()
    assert 1 <= len(done) <= 3


@pytest.mark.usefixtures("interrupts")
def test_a_batch_that_is_interrupted_is_left_once_its_work_has_ended() -> None:
    go_on = threading.Event()
    written: list[int] = []

    def work(position: int) -> None:
        go_on.wait(60)
        written.append(position)

    timers = [threading.Timer(0.1 * number, os.kill, (os.getpid(), signal.SIGINT)) for number in (1, 2)]
    timers.append(threading.Timer(0.4, go_on.set))

    def interrupted() -> None:
        with Copiers().begin() as batch:
            batch.start(work, [MIB] * 100)
            for timer in timers:
                timer.start()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert go_on.is_set()
    assert sorted(written) == [0, 1], "what ran has ended, and what waited was not begun"
    for timer in timers:
        timer.join()


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_is_raised_at_once_though_it_hit_the_work_of_others() -> None:
    """A thread that waits for one group does parts of the next groups meanwhile."""
    hung, helped = threading.Event(), threading.Event()

    def first(at: int) -> None:
        if at == 0:
            helped.set()
            hung.wait(60)

    def second(at: int) -> None:
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
