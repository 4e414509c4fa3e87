"""The circuit breaker before a real daemon that is killed, hangs, and comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvservice_adapter.breaker import Breaker, State, answered, probe_of
from kvservice_api.errors import KVError
from kvservice_api.keys import BlockChain
from kvservice_client import BlockCache, Client
from kvservice_client.retry import Deadline
from tests.daemon import DaemonProcess, until
from tests.integration.conversations import layers_of, new_chain, small_layout

NewDaemon = Callable[..., DaemonProcess]

WAIT_S = 0.25
SLACK_S = 0.25  # What a busy machine may add to a wait that ends in time.


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


def request_of(breaker: Breaker, blocks: BlockCache, chain: BlockChain) -> tuple[int, float]:
    """What an engine does for one request: how many blocks it found, and what it waited."""
    began_s = time.monotonic()
    hit_blocks, error = 0, None
    if breaker.allow():
        deadline = Deadline(WAIT_S)
        try:
            lease = blocks.lookup(chain, timeout_s=deadline.remaining_s)
            hit_blocks = lease.hit_blocks
            list(lease.load(timeout_s=deadline.remaining_s))
        except KVError as caught:
            error = caught
        breaker.record(answered(error))
    return hit_blocks if error is None else 0, time.monotonic() - began_s


def test_a_daemon_that_was_killed_is_left_alone_and_found_again(new_daemon: NewDaemon) -> None:
    daemon, layout = new_daemon(), small_layout()
    with Client(daemon.address) as client:
        blocks = client.open_layout(layout)
        chain = saved(blocks)
        with Breaker(probe := Probe(blocks)) as breaker:
            assert request_of(breaker, blocks, chain)[0] == 3
            daemon.kill()
            for _ in range(2):
                hit_blocks, waited_s = request_of(breaker, blocks, chain)
                assert hit_blocks == 0
                assert waited_s < WAIT_S + SLACK_S
            until(lambda: probe.failed == 2)
            assert not breaker.allow()

            daemon.start()
            assert until(breaker.allow) < 2.0
            assert request_of(breaker, blocks, chain)[0] == 3
            assert breaker.times_opened == 1


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_daemon_that_hangs_costs_two_bounded_waits_and_is_found_again(new_daemon: NewDaemon, transport: str) -> None:
    daemon, layout = new_daemon(), small_layout()
    with daemon.client(transport=transport) as client:
        blocks = client.open_layout(layout)
        chain = saved(blocks)
        with Breaker(probe := Probe(blocks)) as breaker:
            with hanging(daemon):
                waits_s = [request_of(breaker, blocks, chain)[1] for _ in range(20)]
                assert all(WAIT_S < waited_s < WAIT_S + SLACK_S for waited_s in waits_s[:2])
                assert sum(waits_s[2:]) < WAIT_S, "who comes later asks nobody"
                until(lambda: probe.failed == 2)
                assert not breaker.allow()
            assert until(breaker.allow) < 2.0
            assert request_of(breaker, blocks, chain)[0] == 3


def test_a_daemon_with_an_empty_store_is_ready_for_the_first_request_after_the_probe(new_daemon: NewDaemon) -> None:
    layout = small_layout()
    first = new_daemon()
    with Client(first.address) as client:
        blocks = client.open_layout(layout)
        chain = saved(blocks)
        with Breaker(probe_of(blocks), failures=1) as breaker:
            first.kill()
            request_of(breaker, blocks, chain)
            assert not breaker.allow()
            new_daemon(server__address=first.address)
            until(breaker.allow)
            assert blocks.lookup(chain, timeout_s=WAIT_S).hit_blocks == 0
            assert blocks.save(chain, layers_of(blocks, chain)).stored == 3


def test_a_closed_breaker_leaves_no_thread_though_the_daemon_hangs(new_daemon: NewDaemon) -> None:
    daemon, layout = new_daemon(), small_layout()
    with Client(daemon.address) as client:
        blocks = client.open_layout(layout)
        chain = saved(blocks)
        breaker = Breaker(probe_of(blocks), failures=1, probe_s=0.01)
        before = set(threading.enumerate())
        with hanging(daemon):
            request_of(breaker, blocks, chain)
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
            assert time.monotonic() - began_s < 0.05 + SLACK_S
        assert lease.remaining_s == 0
