"""Copies by several threads: none of them goes on once their batch was left."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from kvservice_client.transports.copying import Copiers


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
