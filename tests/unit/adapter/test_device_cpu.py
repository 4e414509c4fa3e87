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
from numpy.typing import NDArray

from kvservice_adapter.device.base import Pages, StreamClosed
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_api.image import checksum
from tests.contracts.device import WAIT_S, DeviceContract, noise, numbering, pages_of
from tests.daemon import until
from tests.thread_limit import no_threads


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


def test_work_that_no_thread_could_do_is_refused_and_never_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine may use the pages for other tokens by then."""
    stream, done = CpuDevice().stream("test"), list[str]()
    with no_threads(monkeypatch), pytest.raises(StreamClosed, match="can't start new thread"):
        stream.submit(lambda: done.append("refused"))
    assert stream.submit(lambda: done.append("accepted")).wait(WAIT_S)
    assert done == ["accepted"]
    stream.close()


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


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("token_major", [False, True], ids=["heads first", "tokens first"])
def test_a_scatter_gives_the_checksum_of_each_slice_that_it_copied(token_major: bool) -> None:
    """Blocks of 8 tokens and a shorter last one, in pages of 6 tokens; the run begins within a page."""
    counts, page_ids = [8, 8, 8, 3], [4, 0, 6, 2, 5]
    keys, values = (np.zeros((7, 6, 2, dim) if token_major else (7, 2, 6, dim), np.float16) for dim in (16, 8))
    if token_major:
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    pages = Pages(keys, values, page_ids, 2)
    slices = [noise(count * pages.token_bytes, seed) for seed, count in enumerate(counts)]
    found: list[int] = []
    calls: list[str] = []

    def verify(sums: NDArray[np.uint64]) -> None:
        found.extend(sums.tolist())
        calls.append("verify")

    event = CpuDevice().stream("test").scatter(slices, counts, pages, None, lambda: calls.append("then"), verify)

    assert event.wait(WAIT_S)
    assert event.error is None
    assert found == [checksum(each.data) for each in slices]
    assert calls == ["verify", "then"]
    for position, (block, token) in enumerate((b, t) for b, count in enumerate(counts) for t in range(count)):
        page, at = divmod(2 + position, 6)
        count = counts[block]
        stored = slices[block].view(np.uint16)
        stored_keys = stored[: 2 * count * 16].reshape(2, count, 16)[:, token]
        stored_values = stored[2 * count * 16 :].reshape(2, count, 8)[:, token]
        assert np.array_equal(keys[page_ids[page], :, at].view(np.uint16), stored_keys)
        assert np.array_equal(values[page_ids[page], :, at].view(np.uint16), stored_values)


@pytest.mark.usefixtures("implementation")
def test_what_the_verification_of_a_scatter_raises_is_its_error_and_nothing_is_done_after_it() -> None:
    pages, calls = pages_of(1, 8, [0]), list[str]()

    def verify(sums: NDArray[np.uint64]) -> None:
        raise KeyError("damaged")

    stream = CpuDevice().stream("test")
    event = stream.scatter([noise(8 * pages.token_bytes)], [8], pages, None, lambda: calls.append("then"), verify)

    assert event.wait(WAIT_S)
    assert isinstance(event.error, KeyError)
    assert not calls
