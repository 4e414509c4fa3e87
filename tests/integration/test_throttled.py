"""A throttled client: the same bytes, no faster than it was told."""

from __future__ import annotations

import numpy as np
import pytest

from kvservice_api.errors import DeadlineExceeded, InvalidRequest, NotShared
from kvservice_client import Client
from tests.clock import ClientClock
from tests.daemon import DaemonProcess
from tests.integration.conversations import large_layout, layers_of, new_chain

LAYOUT = large_layout()
RATE = 100e6


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_bytes_arrive_no_faster_than_the_throttle_lets_them(daemon: DaemonProcess, transport: str) -> None:
    chain, clock = new_chain(LAYOUT, 2 * LAYOUT.block_tokens), ClientClock()
    with daemon.client(transport=transport, throttle_bytes_per_s=RATE, clock=clock) as client:
        blocks = client.open_layout(LAYOUT)
        layers = layers_of(blocks, chain)
        layer_s = layers[0].nbytes / RATE

        begin_s = clock.now_s()
        assert blocks.save(chain, layers).stored == 2
        assert clock.now_s() - begin_s == pytest.approx(layer_s * LAYOUT.layers)

        with blocks.lookup(chain) as lease:
            load = lease.load()
            for index in range(LAYOUT.layers):
                clock.advance(seconds=1)  # A link that idles saves nothing up.
                begin_s = clock.now_s()
                loaded = next(load)
                assert clock.now_s() - begin_s == pytest.approx(layer_s)
                assert np.array_equal(loaded.data, layers[index])
            assert next(load, None) is None


def test_a_load_that_the_throttle_makes_too_slow_ends_with_its_time(daemon: DaemonProcess) -> None:
    chain = new_chain(LAYOUT, LAYOUT.block_tokens)
    with daemon.client() as client:
        client.open_layout(LAYOUT).save(chain, layers_of(client.open_layout(LAYOUT), chain))
    clock = ClientClock()
    with (
        daemon.client(throttle_bytes_per_s=1000.0, clock=clock) as client,
        client.open_layout(LAYOUT).lookup(chain) as lease,
    ):
        begin_s = clock.now_s()
        with pytest.raises(DeadlineExceeded):
            list(lease.load(timeout_s=20.0))
        assert clock.now_s() - begin_s == pytest.approx(20)  # All of it would take hours.
        with pytest.raises(NotShared):
            lease.view()


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(InvalidRequest, match="throttle"):
        Client(throttle_bytes_per_s=rate)
