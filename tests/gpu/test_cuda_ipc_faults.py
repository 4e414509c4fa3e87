"""cuda_ipc when a process dies, stops or hangs, and when CUDA fails in the daemon."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import DaemonUnavailable, DeadlineExceeded, DeviceUnavailable, IncompleteSave, Overloaded
from kvservice_client import Client, block_chain
from kvservice_client.device_memory import LoadPlace
from tests.daemon import DaemonProcess, until
from tests.gpu.ipc_engine import LAYERS, Engine, layout_of, new_chain, same_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.sim]

FROM, TO = [7, 2, 9, 4], [3, 11, 0, 5]
PLACE = LoadPlace(0, [TO], [0], 64)
SLOW_US = "20000"  # Of each piece of the daemon's work on the GPU: a load takes a fifth of a second.


def engine_of(cupy: Any, client: Client) -> Engine:
    made = Engine(cupy, client, layout_of("bfloat16"))
    assert made.memory.register(), client.stats().cuda_ipc_refused_because
    return made


def test_an_engine_that_is_killed_while_the_daemon_copies_leaves_nothing(
    cupy: Any, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us=SLOW_US)
    first_token = 5_000_000
    with daemon.client("engine") as client:
        engine = engine_of(cupy, client)
        chain = block_chain(engine.layout, np.arange(64) + first_token)
        saved = engine.fill()
        engine.save(chain, FROM)
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.ipc_worker", daemon.address, str(first_token)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == "loading\n"

        worker.kill()
        worker.wait()

        daemon.wait_for_log("GPU memory of a client is closed", client="worker")
        assert client.admin.status().cuda.registrations == 1
        until(lambda: client.admin.status().leases == 0)
        engine.clear()
        engine.load(chain, TO)
        assert same_tokens(saved, FROM, engine.read(), TO, 0, 64)
        worker.stdout.close()


def test_a_daemon_that_is_killed_while_it_copies_fails_the_load_at_once(
    cupy: Any, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us=SLOW_US)
    with daemon.client("engine", reconnect_wait_s=0.1) as client:
        engine = engine_of(cupy, client)
        chain = new_chain(engine.layout, 64)
        engine.fill()
        engine.save(chain, FROM)
        lease = engine.blocks.lookup(chain)
        copies = engine.copies(lease, PLACE)
        next(copies)

        daemon.kill()

        with pytest.raises(DaemonUnavailable):
            list(copies)
        engine.clear()
        assert not any(layer.any() for layer in engine.read())


def test_a_stopped_daemon_that_continues_writes_no_pages_of_a_load_that_was_given_up(
    cupy: Any, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us=SLOW_US)
    with daemon.client("engine") as client:
        engine = engine_of(cupy, client)
        chain = new_chain(engine.layout, 64)
        saved = engine.fill()
        engine.save(chain, FROM)
        lease = engine.blocks.lookup(chain)
        copies = engine.copies(lease, PLACE, layer_s=0.3)
        next(copies)  # The next layers are queued on the GPU.
        with daemon.stopped():
            with pytest.raises(DeadlineExceeded):
                list(copies)
            other = engine.fill()  # The pages are another request's now.

        engine.memory.close()  # It waits for the daemon's copies.

        assert all(np.array_equal(before, after) for before, after in zip(other, engine.read(), strict=True))
        assert not same_tokens(saved, FROM, engine.read(), TO, 0, 64)


def test_pages_that_changed_while_a_stopped_daemon_read_them_are_not_stored(
    cupy: Any, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(delay_us=SLOW_US)
    with daemon.client("engine") as client:
        engine = engine_of(cupy, client)
        chain = new_chain(engine.layout, 64)
        engine.fill()
        with engine.begin_save(chain, FROM, answer_s=0.3) as save, daemon.stopped():
            with pytest.raises(DeadlineExceeded):
                save.gather()
            engine.fill()

        until(lambda: client.admin.status().uploads == 0)
        assert engine.blocks.contains(chain) == 0


def test_a_launch_that_fails_in_the_middle_layer_ends_this_load_only_and_no_byte_is_wrong(
    cupy: Any, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon(faults="cuLaunchKernel:2:4:1")  # Three gather, the second of three that scatter fails.
    with daemon.client("engine") as client:
        engine = engine_of(cupy, client)
        chain = new_chain(engine.layout, 64)
        saved = engine.fill()
        engine.save(chain, FROM)
        engine.clear()
        given: list[int] = []

        with engine.blocks.lookup(chain) as lease, pytest.raises(DeviceUnavailable, match="GPU copy failed"):
            given.extend(engine.copies(lease, PLACE))

        assert given in ([], [0])
        assert engine.exported.begin_load()[1] == 2  # Should the daemon be wrong, a late copy does not write.
        assert client.admin.status().cuda.refused_because == ""
        engine.load(chain, TO)
        assert same_tokens(saved, FROM, engine.read(), TO, 0, 64)


def test_a_sticky_error_ends_cuda_ipc_and_nothing_else(cupy: Any, slow_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = slow_daemon({"server__metrics_address": "127.0.0.1:0"}, faults="@kernel:700:3:1")
    with daemon.client("engine") as client:
        engine = engine_of(cupy, client)
        chain = new_chain(engine.layout, 64)
        engine.fill()
        engine.save(chain, FROM)
        with engine.blocks.lookup(chain) as lease:
            with pytest.raises(DeviceUnavailable):
                list(engine.copies(lease, PLACE))

            stored = [each.data.copy() for each in lease.load()]

        assert len(stored) == LAYERS
        assert client.admin.status().cuda.failed
        assert "error" in client.admin.status().cuda.refused_because
        assert "cuda_ipc" not in client.capabilities().transports
        daemon.wait_for_log("cuda_ipc is not offered any more")
        with pytest.raises(DeviceUnavailable):
            engine.register_anyway()
        with pytest.raises(DeviceUnavailable):
            engine.save(new_chain(engine.layout, 64), FROM)
        assert len(daemon.logged("cuda_ipc is not offered any more")) == 1


def test_a_gpu_without_memory_for_the_staging_refuses_the_registration(
    cupy: Any, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    with slow_daemon(mem="48M").client("engine") as client:
        engine = Engine(cupy, client, layout_of("bfloat16"))

        assert not engine.memory.register()

        assert isinstance(engine.memory.refusal, Overloaded)
        assert "cuda.staging_bytes" in engine.memory.refusal.message
        assert client.admin.status().cuda.registrations == 0


def test_a_daemon_that_gets_sigterm_while_it_copies_ends_in_time(
    cupy: Any, slow_daemon: Callable[..., DaemonProcess]
) -> None:
    daemon = slow_daemon({"server__drain_timeout_s": 0.1}, delay_us=SLOW_US)
    with daemon.client("engine", reconnect_wait_s=0.1) as client:
        engine = engine_of(cupy, client)
        chain = new_chain(engine.layout, 64)
        engine.fill()
        engine.save(chain, FROM)
        copies = engine.copies(engine.blocks.lookup(chain), PLACE)
        next(copies)

        daemon.terminate()

        with suppress(DaemonUnavailable):  # Or it is done before the daemon ends.
            list(copies)
        assert daemon.wait_for_end() == 0


def test_a_daemon_ends_with_nothing_of_cuda_open(cupy: Any, slow_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = slow_daemon(leaks="1", debug="1")
    with daemon.client("engine") as client:
        engine = engine_of(cupy, client)
        chain = new_chain(engine.layout, 64)
        engine.fill()
        engine.save(chain, FROM)
        engine.load(chain, TO)
    daemon.wait_for_log("GPU memory of a client is closed", client="engine")

    assert daemon.stop() == 0

    said = [line for line in daemon.lines if line.startswith("cudasim:") and " patched " not in line]
    assert said == []


def test_a_save_whose_client_says_nothing_more_is_ended(cupy: Any, slow_daemon: Callable[..., DaemonProcess]) -> None:
    daemon = slow_daemon({"server__transfer_idle_s": 0.2})
    with daemon.client("engine") as client:
        engine = engine_of(cupy, client)
        chain = new_chain(engine.layout, 64)
        engine.fill()
        with engine.begin_save(chain, FROM) as save:
            save.gather()
            until(lambda: client.admin.status().uploads == 0)

            with pytest.raises(IncompleteSave):
                save.commit()
