"""The circuit breaker with a real daemon that is killed, hangs, and returns."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from kvservice_adapter.breaker import Breaker, State, answered, probe_of
from kvservice_api.errors import KVError
from kvservice_api.keys import BlockChain
from kvservice_client import BlockCache, Client
from kvservice_client.retry import Deadline
from tests.daemon import NEVER_S, SOON_S, DaemonProcess, until
from tests.integration.conversations import layers_of, new_chain, small_layout

NewDaemon = Callable[..., DaemonProcess]

WAIT_S = 0.25  # How long a request waits for a daemon that is away or hangs.


@contextmanager
def hanging(daemon: DaemonProcess) -> Iterator[None]:
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)


def saved(blocks: BlockCache) -> BlockChain:
    chain = new_chain(blocks.layout, 3 * blocks.layout.block_tokens)
    assert blocks.save(chain, layers_of(blocks, chain)).is_complete
    return chain


class Probe:
    """The probe that users have, and how often it has been tried."""

    def __init__(self, blocks: BlockCache) -> None:
        self._probe = probe_of(blocks)
        self.failed = 0

    def __call__(self) -> bool:
        try:
            return self._probe()
        except KVError:
            self.failed += 1
            raise


class Request(NamedTuple):
    hit_blocks: int
    asked: bool  # Whether the daemon was.
    waited_s: float


def request_of(breaker: Breaker, blocks: BlockCache, chain: BlockChain, wait_s: float = SOON_S) -> Request:
    """An engine's calls for one request that waits for the daemon at most `wait_s`."""
    began_s = time.monotonic()
    hit_blocks, error = 0, None
    if asked := breaker.allow():
        deadline = Deadline(wait_s)
        try:
            lease = blocks.lookup(chain, timeout_s=deadline.remaining_s)
            hit_blocks = lease.hit_blocks
            list(lease.load(timeout_s=deadline.remaining_s))
        except KVError as caught:
            error = caught
        breaker.record(answered(error))
    return Request(hit_blocks if error is None else 0, asked, time.monotonic() - began_s)


def test_a_daemon_that_was_killed_is_left_alone_and_found_again(new_daemon: NewDaemon) -> None:
    daemon, layout = new_daemon(), small_layout()
    with Client(daemon.address, timeout_s=NEVER_S, reconnect_wait_s=NEVER_S) as client:
        blocks = client.open_layout(layout)
        chain = saved(blocks)
        with Breaker(probe := Probe(blocks)) as breaker:
            assert request_of(breaker, blocks, chain).hit_blocks == 3
            daemon.kill()
            for _ in range(2):
                request = request_of(breaker, blocks, chain, WAIT_S)
                assert (request.hit_blocks, request.asked) == (0, True)
                assert request.waited_s < SOON_S
            until(lambda: probe.failed >= 2)
            assert not breaker.allow()

            daemon.start()
            until(breaker.allow)
            assert request_of(breaker, blocks, chain).hit_blocks == 3
            assert breaker.times_opened == 1


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_daemon_that_hangs_costs_two_bounded_waits_and_is_found_again(new_daemon: NewDaemon, transport: str) -> None:
    daemon, layout = new_daemon(), small_layout()
    with daemon.client(transport=transport, timeout_s=NEVER_S) as client:
        blocks = client.open_layout(layout)
        chain = saved(blocks)
        with Breaker(probe := Probe(blocks)) as breaker:
            with hanging(daemon):
                requests = [request_of(breaker, blocks, chain, WAIT_S) for _ in range(20)]
                assert all(WAIT_S < each.waited_s < SOON_S for each in requests[:2])
                assert [each.asked for each in requests] == [True] * 2 + [False] * 18, (
                    "later requests do not ask the daemon"
                )
                until(lambda: probe.failed >= 2)
                assert not breaker.allow()
            until(breaker.allow)
            assert request_of(breaker, blocks, chain).hit_blocks == 3


def test_a_daemon_with_an_empty_store_is_ready_for_the_first_request_after_the_probe(new_daemon: NewDaemon) -> None:
    layout = small_layout()
    first = new_daemon()
    with Client(first.address) as client:
        blocks = client.open_layout(layout)
        chain = saved(blocks)
        with Breaker(probe_of(blocks), failures=1) as breaker:
            first.kill()
            request_of(breaker, blocks, chain, WAIT_S)
            assert not breaker.allow()
            new_daemon(server__address=first.address)
            until(breaker.allow)
            assert blocks.lookup(chain).hit_blocks == 0
            assert blocks.save(chain, layers_of(blocks, chain)).stored == 3


def test_a_closed_breaker_leaves_no_thread_though_the_daemon_hangs(new_daemon: NewDaemon) -> None:
    daemon, layout = new_daemon(), small_layout()
    with Client(daemon.address) as client:
        blocks = client.open_layout(layout)
        chain = saved(blocks)
        breaker = Breaker(probe_of(blocks), failures=1, probe_s=0.01)
        before = set(threading.enumerate())
        with hanging(daemon):
            request_of(breaker, blocks, chain, WAIT_S)
            until(lambda: breaker.state is State.HALF_OPEN)
            breaker.close()
            assert "kvservice-breaker" not in [each.name for each in set(threading.enumerate()) - before]


def test_a_lease_is_released_within_the_time_given_by_a_daemon_that_hangs(new_daemon: NewDaemon) -> None:
    daemon, layout = new_daemon(), small_layout()
    with Client(daemon.address) as client:
        blocks = client.open_layout(layout)
        lease = blocks.lookup(saved(blocks))
        with hanging(daemon):
            began_s = time.monotonic()
            lease.release(timeout_s=0.05)
            assert time.monotonic() - began_s < SOON_S
        assert lease.remaining_s == 0
