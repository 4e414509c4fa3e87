"""Copies by several threads: what their checksums are of, and that none goes on once their batch was left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvservice_api.layout import checksum
from kvservice_client.buffers import Bytes
from kvservice_client.transports import copying
from kvservice_client.transports.copying import Copiers, copy_and_sum, copy_runs_and_sum, sum_and_copy

_COPY = copying._copy_in_pieces


def test_a_batch_that_is_interrupted_is_left_once_its_work_has_ended() -> None:
    go_on, written = threading.Event(), []

    def work(position: int) -> None:
        go_on.wait(10)
        written.append(position)

    timers = [threading.Timer(0.1 * number, os.kill, (os.getpid(), signal.SIGINT)) for number in (1, 2)]
    timers.append(threading.Timer(0.4, go_on.set))

    def interrupted() -> None:
        with Copiers().begin() as batch:
            batch.start(work, [8 << 20] * 3)
            for timer in timers:
                timer.start()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert go_on.is_set()
    assert sorted(written) == [0, 1], "what ran has ended, and what waited was not begun"
    for timer in timers:
        timer.join()


def damaged(source: Bytes, target: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
    """Copies, and gets one bit of the copy wrong."""
    for piece, copied in _COPY(source, target):
        copied[len(copied) // 2] ^= 1
        yield piece, copied


def test_a_load_is_verified_by_what_arrived_and_a_save_by_what_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.frombuffer(np.random.default_rng(1).bytes(100_000), np.uint8)
    meant = checksum(source.data)
    assert copy_and_sum(source, np.empty_like(source)) == meant
    monkeypatch.setattr(copying, "_copy_in_pieces", damaged)
    assert copy_and_sum(source, np.empty_like(source)) != meant
    assert copy_runs_and_sum(source, [(0, 50_000)], np.empty(50_000, np.uint8)) != meant
    assert sum_and_copy(source, np.empty_like(source)) == meant
