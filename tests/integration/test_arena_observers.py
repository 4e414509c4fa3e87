"""Observers of the daemon's arena in a client's process, and an engine whose device reads the arena itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvservice_adapter.device.cpu import CpuDevice
from kvservice_api.errors import LeaseExpired
from kvservice_client import Client
from kvservice_client.buffers import Bytes
from kvservice_client.transports.in_place import InPlace, View
from tests.daemon import DaemonProcess, until
from tests.forking import in_child
from tests.integration.arena_observer import LAYOUT, Observer, answers
from tests.unit.connector_models import BLOCK_TOKENS, computed, connector, prompt, states, tiny_llama


def test_an_observer_follows_an_arena_from_its_mapping_on_until_another_replaces_it(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon, observer = new_daemon(), Observer()
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        client.observe_arenas(observer)
        client.observe_arenas(observer)
        blocks.ping()
        until(lambda: observer.has_all)
        ((readable, writable),) = observer.aliases
        assert readable.size == writable.size
        assert (readable.flags.writeable, writable.flags.writeable) == (False, True)
        assert np.array_equal(readable[:64], writable[:64])
        address = writable.ctypes.data
        del readable, writable
        observer.aliases.clear()

        daemon.stop()
        shutil.rmtree(daemon.arena_folder)
        daemon.start()
        until(lambda: answers(blocks))

        until(lambda: observer.forgotten == [address])
        until(lambda: bool(observer.aliases) and observer.has_all)


def test_one_that_comes_later_sees_the_arena_that_is_mapped_and_a_forked_child_none(daemon: DaemonProcess) -> None:
    observer, in_childs = Observer(), Observer()
    with daemon.client() as client:
        blocks = client.open_layout(LAYOUT)
        blocks.ping()

        client.observe_arenas(observer)

        until(lambda: observer.has_all)

        def work() -> int:
            client.observe_arenas(in_childs)
            return len(in_childs.aliases) + len(observer.forgotten)

        assert in_child(work) == 0


def test_where_there_is_no_arena_an_observer_is_not_called(daemon: DaemonProcess) -> None:
    observer = Observer()
    with daemon.client(transport="grpc") as client:
        client.observe_arenas(observer)
        client.open_layout(LAYOUT).ping()

        assert not observer.aliases


_ENDS = """
import sys
from kvservice_client import Client
from tests.daemon import until
from tests.integration.arena_observer import LAYOUT, Observer, answers

class Told(Observer):
    def forget(self, memory):
        print("forgotten", flush=True)

observer, client = Told(), Client(sys.argv[1])
client.observe_arenas(observer)
client.open_layout(LAYOUT).ping()
until(lambda: observer.has_all)
print("ends", flush=True)
"""


def test_an_observer_is_not_called_by_a_thread_while_its_process_ends(daemon: DaemonProcess) -> None:
    """The calls that it makes, such as CUDA's, may crash then; the end of the process does the same."""
    ended = subprocess.run([sys.executable, "-c", _ENDS, daemon.address], capture_output=True, text=True, timeout=60)

    assert (ended.returncode, ended.stdout) == (0, "ends\n"), ended.stderr


class InPlaceDevice(CpuDevice):
    """Reads the daemon's memory where it is, as a GPU does."""

    def __init__(self) -> None:
        self.observer = self.arena_observer = Observer()


def restored_with(client: Client, model: Any, tokens: torch.Tensor, device: InPlaceDevice) -> Any:
    subject = connector(client, model, model_id="in-place", device=device, save_wait_s=30.0)
    cache = computed(model, tokens)
    subject.save(tokens, cache)
    return subject.restore(tokens), cache


def test_an_engine_whose_device_reads_in_place_is_given_the_daemons_memory_and_no_copy(daemon: DaemonProcess) -> None:
    model, tokens = tiny_llama(), prompt(6 * BLOCK_TOKENS + 1)
    with daemon.client() as client:
        device = InPlaceDevice()
        restored, cache = restored_with(client, model, tokens, device)

        assert restored.tokens == 6 * BLOCK_TOKENS
        for before, after in zip(states(cache), states(restored.cache), strict=True):
            assert torch.equal(before[0][:, :, : restored.tokens], after[0])
            assert torch.equal(before[1][:, :, : restored.tokens], after[1])
        assert restored.error is None
        stats = client.stats()
        assert (stats.viewed_bytes, stats.loaded_bytes) == (restored.size_bytes, {})
        until(lambda: device.observer.has_all)


def test_where_blocks_are_not_in_shared_memory_it_is_given_copies(daemon: DaemonProcess) -> None:
    model, tokens = tiny_llama(), prompt(6 * BLOCK_TOKENS + 1)
    with daemon.client(transport="grpc") as client:
        restored, cache = restored_with(client, model, tokens, InPlaceDevice())

        for before, after in zip(states(cache), states(restored.cache), strict=True):
            assert torch.equal(before[0][:, :, : restored.tokens], after[0])
        assert restored.error is None
        assert client.stats().viewed_bytes == 0


def test_a_history_whose_blocks_are_replaced_while_they_are_copied_is_computed_from_the_first_wrong_layer_on(
    new_daemon: Callable[..., DaemonProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a layer's copy reads is compared with the daemon's generations before the model gets that layer."""
    model, tokens = tiny_llama(initializer_range=0.3), prompt(6 * BLOCK_TOKENS + 1)
    right = model(tokens).logits[:, -1]
    slices_of, replaced = View.slices, list[int]()

    def slices(view: View, layer: int) -> list[tuple[Bytes, ...]]:
        found = slices_of(view, layer)
        if layer != 1:
            return found
        replaced.append(layer)  # Another block has taken the place: its bytes are what is copied.
        return [tuple(np.full_like(part.view(np.float32), 3.0).view(np.uint8) for part in block) for block in found]

    monkeypatch.setattr(View, "slices", slices)
    monkeypatch.setattr(InPlace, "are_replaced", property(lambda blocks: bool(replaced)))
    with new_daemon().client() as client:
        restored, _ = restored_with(client, model, tokens, InPlaceDevice())
        logits = model(tokens[:, restored.tokens :], past_key_values=restored.cache).logits[:, -1]

        assert restored.tokens == 6 * BLOCK_TOKENS
        assert isinstance(restored.error, LeaseExpired)
        assert torch.allclose(logits, right, atol=1e-4)
