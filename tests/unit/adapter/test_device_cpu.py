"""The CPU as a device: the contract, and the references of its threads."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch

from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from tests.contracts.device import WAIT_S, DeviceContract, numbering, pages_of
from tests.daemon import until


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


class TestCpuDevice(DeviceContract):
    @pytest.fixture
    def device(self) -> CpuDevice:
        return CpuDevice()


def test_a_stream_has_no_thread_before_its_first_work_and_none_once_it_is_dropped() -> None:
    stream = CpuDevice().stream("dropped-stream")
    assert not threads_named("dropped-stream")
    assert stream.submit(lambda: None).wait(WAIT_S)
    assert len(threads_named("dropped-stream")) == 1

    del stream
    gc.collect()

    until(lambda: not threads_named("dropped-stream"))


def test_a_closed_streams_thread_ends() -> None:
    stream = CpuDevice().stream("closed-stream")
    assert stream.submit(lambda: None).wait(WAIT_S)

    stream.close()

    until(lambda: not threads_named("closed-stream"))


def test_an_event_that_is_kept_does_not_keep_the_tensors() -> None:
    stream = CpuDevice().stream("test")
    keys, values = torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4)
    held = weakref.ref(keys)

    event = stream.gather(Pages(keys, values, [0]), [8], np.zeros(8 * 2 * 8 * 4, np.uint8))
    del keys, values

    assert event.wait(WAIT_S)
    until(lambda: held() is None)


def test_tensors_with_gradients_are_copied_as_any_others() -> None:
    stream, into = CpuDevice().stream("test"), np.zeros(8 * 2 * 8 * 4, np.uint8)
    keys, values = torch.ones(1, 2, 8, 4, requires_grad=True), torch.ones(1, 2, 8, 4, requires_grad=True)

    event = stream.gather(Pages(keys, values, [0]), [8], into)

    assert event.wait(WAIT_S)
    assert event.error is None
    assert np.all(into.view(np.float32) == 1)


def test_rotating_many_keys_starts_no_threads_beside_the_streams_own() -> None:
    stream, tokens = CpuDevice().stream("test"), 4096
    pages = pages_of(1, tokens, [0])
    assert stream.submit(lambda: None).wait(WAIT_S)
    before = len(os.listdir("/proc/self/task"))

    ones = np.ones(tokens * pages.token_bytes // 4, np.float32).view(np.uint8)
    event = stream.scatter(ones, [tokens], pages, numbering(tokens))

    assert event.wait(WAIT_S)
    assert len(os.listdir("/proc/self/task")) == before
    assert torch.equal(pages.keys, torch.arange(1.0, tokens + 1)[:, None].expand_as(pages.keys))


def test_a_process_ends_while_its_streams_are_at_work() -> None:
    program = """
import threading
from kvservice_adapter.device.cpu import CpuDevice

idle, busy, started = CpuDevice().stream("idle"), CpuDevice().stream("busy"), threading.Event()
idle.submit(print).wait(10)
busy.submit(lambda: (started.set(), threading.Event().wait()))
busy.submit(lambda: print("never"))
started.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
