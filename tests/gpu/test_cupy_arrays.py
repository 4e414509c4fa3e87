"""An engine whose KV is in CuPy arrays, without torch: both pipelines, with real CUDA memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvservice_adapter.device.arrays import CUDA, ArrayView, view_of
from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.device.rotation import Rotation
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader
from kvservice_adapter.save import LayerSaver
from kvservice_client import Layout
from tests.contracts.device import WAIT_S, numbering
from tests.daemon import MIB, DaemonProcess
from tests.integration.conversations import new_chain

pytestmark = pytest.mark.gpu
LAYOUT = Layout("cupy", "float16", layers=4, kv_heads=2, k_head_dim=16, v_head_dim=8, block_tokens=16)
TOKENS = 40


@pytest.fixture
def cupy() -> Any:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"there is no CUDA device: {error}")
    return cupy


class CupyDevice(CpuDevice):
    """Copies with CuPy on the streams' threads, and waits for each copy: only what the pipelines need."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def bits(self, view: ArrayView) -> Any:
        assert view.device[0] == CUDA
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        memory = self._cupy.cuda.UnownedMemory(view.address, last + view.item_bytes, view.array)
        pointer = self._cupy.cuda.MemoryPointer(memory, 0)
        return self._cupy.ndarray(view.shape, f"u{view.item_bytes}", pointer, view.strides)

    def copy(self, source: Any, target: Any) -> None:
        if isinstance(target, np.ndarray):
            np.copyto(target, self._cupy.asnumpy(source))
        else:
            target[...] = self._cupy.asarray(source)
            self._cupy.cuda.get_current_stream().synchronize()

    def rotate_bits(self, keys: Any, dtype: str, rotation: Rotation, first_token: int) -> None:
        on_host = self._cupy.asnumpy(keys)
        super().rotate_bits(on_host, dtype, rotation, first_token)
        self.copy(on_host, keys)


def states(cupy: Any, layer: int) -> tuple[Any, Any]:
    """Keys and values ``[row, head, token, dim]``, in an array of both with room after the tokens."""
    generator = np.random.default_rng(layer)
    both = cupy.asarray(generator.random((1, 2, TOKENS + 5, 16 + 8), np.float32).astype(np.float16))
    return both[:, :, :TOKENS, :16], both[:, :, :TOKENS, 16:]


def test_an_arrays_place_and_shape_are_known_without_a_copy(cupy: Any) -> None:
    keys, _ = states(cupy, 0)

    view = view_of(keys)

    assert (view.address, view.shape, view.strides) == (keys.data.ptr, keys.shape, keys.strides)
    assert (view.dtype, view.device, view.is_on_host) == ("float16", (CUDA, 0), False)
    with pytest.raises(ValueError, match="cannot be read by the host"):
        CpuDevice().bits(view)


def test_what_is_saved_from_cupy_arrays_is_loaded_into_others_to_the_bit(cupy: Any, daemon: DaemonProcess) -> None:
    device, computed = CupyDevice(cupy), [states(cupy, layer) for layer in range(LAYOUT.layers)]
    with daemon.client("cupy", timeout_s=15) as client:
        blocks, chain = client.open_layout(LAYOUT), new_chain(LAYOUT, TOKENS)
        saver = LayerSaver(device, blocks, staging_bytes=MIB)
        job = saver.begin(chain)
        assert job is not None
        for layer, (keys, values) in enumerate(computed):
            job.layer(layer, Pages(keys, values, [0]))
        job.commit()
        assert saver.flush(WAIT_S)
        assert (saver.stats.saved, saver.stats.failed) == (1, 0)

        lease, stream = blocks.lookup(chain), device.stream("cupy-load")
        empty_keys, empty_values = (cupy.zeros((1, 2, TOKENS, dim), cupy.float16) for dim in (16, 8))
        loader = LayerLoader(
            device,
            stream,
            HostLayers(stream, lease.load, lease.token_counts),
            lambda layer: Pages(empty_keys.copy(), empty_values.copy(), [0]),
            layer_count=LAYOUT.layers,
            wait_s=WAIT_S,
            release=lease.release,
        )
        loader.start()

        for layer, (keys, values) in enumerate(computed):
            pages = loader.wait(layer)
            assert cupy.array_equal(pages.keys, keys)
            assert cupy.array_equal(pages.values, values)


def test_keys_in_cupy_arrays_are_turned(cupy: Any) -> None:
    device, ones = CupyDevice(cupy), np.ones(TOKENS * 2 * (16 + 8), np.float16).view(np.uint8)
    pages = Pages(cupy.zeros((3, 2, 16, 16), cupy.float16), cupy.zeros((3, 2, 16, 8), cupy.float16), [2, 0, 1])

    event = device.stream("cupy").scatter(ones, [16, 16, 8], pages, numbering(TOKENS, 16))

    assert event.wait(WAIT_S)
    assert event.error is None
    assert [float(pages.keys[page, 1, 3, 15]) for page in (2, 0, 1)] == [4.0, 20.0, 36.0]
