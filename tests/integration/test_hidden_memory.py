"""The pipelines with an engine whose memory the host cannot access, and without torch: they use only addresses."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice_adapter.device.arrays import bits_of, view_of
from kvservice_adapter.device.base import Pages
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.save import LayerSaver
from kvservice_client import BlockCache, BlockChain, Client, Layout
from tests.contracts.device import WAIT_S, numbering
from tests.daemon import MIB, DaemonProcess
from tests.hidden_device import HiddenArray, HiddenDevice
from tests.integration.conversations import new_chain

# Two geometries; NumPy has no bfloat16, so its arrays are integers under that name.
LAYOUT = Layout("hidden", "bfloat16", layers=5, kv_heads=2, k_head_dim=16, v_head_dim=8, block_tokens=16)
TOKENS, PAGE_TOKENS, PAGES = 40, 12, [5, 0, 3, 6]
Bits = NDArray[np.uint16]


@pytest.fixture
def device() -> Iterator[HiddenDevice]:
    device = HiddenDevice()
    yield device
    device.close()


@pytest.fixture(params=["shm", "grpc"])
def client(request: pytest.FixtureRequest, daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client("hidden", transport=request.param, timeout_s=15) as client:
        yield client


def some_bits(layer: int, dim: int) -> Bits:
    """Pages of one layer's keys or values, ``[page, head, token, dim]``."""
    generator = np.random.default_rng([layer, dim])
    return generator.integers(0, 2**16, (7, 2, PAGE_TOKENS, dim), np.uint16)


def pages_of(device: HiddenDevice, keys: Bits, values: Bits) -> Pages:
    return Pages(device.array(keys), device.array(values), PAGES, 2, dtype="bfloat16")


def run_of(pages: Bits) -> Bits:
    """The tokens that `pages_of` names, ``[head, token, dim]``."""
    return np.concatenate(list(pages[PAGES]), axis=1)[:, 2 : 2 + TOKENS]


def read(device: HiddenDevice, array: object) -> Bits:
    assert isinstance(array, HiddenArray)
    return device.read(array, np.uint16)


def save(device: HiddenDevice, blocks: BlockCache) -> BlockChain:
    chain, saver = new_chain(LAYOUT, TOKENS), LayerSaver(device, blocks, staging_bytes=MIB)
    job = saver.begin(chain)
    assert job is not None
    for layer in range(LAYOUT.layers):
        job.layer(layer, pages_of(device, some_bits(layer, 16), some_bits(layer, 8)))
    job.commit()
    assert saver.flush(WAIT_S)
    assert (saver.stats.saved, saver.stats.failed) == (1, 0)
    saver.close()
    return chain


def test_what_is_saved_from_such_memory_is_loaded_into_it_to_the_bit(device: HiddenDevice, client: Client) -> None:
    blocks = client.open_layout(LAYOUT)
    chain = save(device, blocks)
    nothing = {dim: np.zeros((7, 2, PAGE_TOKENS, dim), np.uint16) for dim in (16, 8)}

    lease, stream = blocks.lookup(chain), device.stream("hidden-load")
    loader = LayerLoader(
        device,
        stream,
        HostLayers(stream, lease.load, lease.token_counts),
        lambda layer: pages_of(device, nothing[16], nothing[8]),
        layer_count=LAYOUT.layers,
        wait_s=WAIT_S,
        release=lease.release,
    )
    loader.start()

    for layer in range(LAYOUT.layers):
        pages = loader.wait(layer)
        for dim, array in ((16, pages.keys), (8, pages.values)):
            assert np.array_equal(run_of(read(device, array)), run_of(some_bits(layer, dim)))
            assert np.count_nonzero(read(device, array)) <= 2 * TOKENS * dim, "nothing is written beside the run"


def test_keys_are_turned_inside_such_memory(device: HiddenDevice) -> None:
    ones = np.full((7, 2, PAGE_TOKENS, 16), 0x3F80, np.uint16)
    pages = pages_of(device, ones, ones[..., :8])
    slices = np.full(TOKENS * 2 * (16 + 8), 0x3F80, np.uint16).view(np.uint8)

    event = device.stream("hidden").scatter(slices, [16, 16, 8], pages, numbering(TOKENS, 16))

    assert event.wait(WAIT_S)
    assert event.error is None
    numbers = (run_of(read(device, pages.keys)).astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(numbers, np.broadcast_to(np.arange(1.0, TOKENS + 1)[:, None], (2, TOKENS, 16)))


def test_a_host_that_reads_such_memory_is_refused_and_one_that_insists_ends(device: HiddenDevice) -> None:
    """So the tests above would fail if a pipeline accessed the memory."""
    with pytest.raises(ValueError, match="cannot be read by the host"):
        bits_of(view_of(device.array(np.ones(8, np.uint16))))
    program = """
import ctypes, numpy as np
from kvservice_adapter.device.arrays import view_of
from tests.hidden_device import HiddenDevice
ctypes.string_at(view_of(HiddenDevice().array(np.ones(8, np.uint16))).address, 16)
"""
    done = subprocess.run([sys.executable, "-c", program], env=_environment(), timeout=60, check=False)
    assert done.returncode == -signal.SIGSEGV


def test_numpy_arrays_alone_do_where_torch_cannot_be_imported(daemon: DaemonProcess) -> None:
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import numpy as np
from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.engine import forward_saves, planning, prefix_lookup, request_report, session_sync
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.save import LayerSaver
from kvservice_client import Client, Layout, block_chain

layout = Layout("numpy alone", "float32", layers=3, kv_heads=2, k_head_dim=16, v_head_dim=16, block_tokens=16)
chain, device = block_chain(layout, range(40), with_partial=True), CpuDevice()
states = [np.random.default_rng(layer).random((2, 1, 2, 40, 16), np.float32) for layer in range(3)]
with Client({daemon.address!r}) as client:
    blocks = client.open_layout(layout)
    saver = LayerSaver(device, blocks, staging_bytes=1 << 20)
    job = saver.begin(chain)
    for layer, (keys, values) in enumerate(states):
        job.layer(layer, Pages(keys, values, [0]))
    job.commit()
    assert saver.flush(60)
    lease, stream = blocks.lookup(chain), device.stream("load")
    empty = lambda layer: Pages(*np.zeros((2, 1, 2, 40, 16), np.float32), [0])
    source = HostLayers(stream, lease.load, lease.token_counts)
    loader = LayerLoader(device, stream, source, empty, layer_count=3, wait_s=60, release=lease.release)
    loader.start()
    for layer, (keys, values) in enumerate(states):
        pages = loader.wait(layer)
        assert np.array_equal(pages.keys, keys) and np.array_equal(pages.values, values)
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == ("same\n", 0), done.stderr


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    sources = [root, root / "proto", root / "client", root / "engine_adapter"]
    return {"PYTHONPATH": ":".join(map(str, sources)), "PATH": "/usr/bin:/bin"}
