"""Views of arrays of any library; rounding to halves is as in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvservice_adapter.device.arrays import CPU, CUDA, bits_of, view_of
from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.device.rotation import rounded
from kvservice_client import LayerGroup
from tests.contracts.device import WAIT_S


class OnAGpu:
    """An array that has only the interface, as in Numba."""

    def __init__(self, **described: Any) -> None:
        self.__cuda_array_interface__ = {"data": (4096, False), "version": 3, **described}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_torch_tensor_and_its_numpy_view_lie_at_the_same_place(dtype: torch.dtype) -> None:
    tensor = torch.arange(48).view(2, 4, 6).to(dtype)[:, ::2, 1:].transpose(0, 1)

    view = view_of(tensor)

    assert (view.address, view.shape, view.device) == (tensor.data_ptr(), (2, 2, 5), (CPU, 0))
    assert view.dtype == str(dtype).removeprefix("torch.")
    assert view.strides == tuple(stride * dtype.itemsize for stride in tensor.stride())
    assert bits_of(view).tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_writing_the_bits_writes_the_array() -> None:
    array = np.zeros((2, 3), np.float32)
    bits_of(view_of(array))[1, 2] = np.float32(1).view(np.uint32)
    assert array[1, 2] == 1


def test_an_array_interface_of_cuda_is_enough() -> None:
    compact = view_of(OnAGpu(shape=(2, 3, 4), strides=None, typestr="<f2"))
    strided = view_of(OnAGpu(shape=(2, 3), strides=(64, 8), typestr="<f4"))

    assert (compact.address, compact.dtype, compact.strides) == (4096, "float16", (24, 8, 2))
    assert (strided.dtype, strided.strides, strided.device) == ("float32", (64, 8), (CUDA, 0))
    with pytest.raises(ValueError, match="cannot be read by the host"):
        bits_of(compact)


@pytest.mark.parametrize("given", [[1.0, 2.0], b"bytes", None, object()], ids=lambda each: type(each).__name__)
def test_what_is_no_array_is_refused_with_its_type(given: object) -> None:
    with pytest.raises(ValueError, match=f"a {type(given).__name__} does not export its memory"):
        view_of(given)


def test_elements_that_a_library_lacks_are_named_by_its_user() -> None:
    group = LayerGroup(1, 2, 8, 4, "bfloat16")
    keys, values = np.zeros((1, 2, 16, 8), np.uint16), np.zeros((1, 2, 16, 4), np.uint16)

    Pages(keys, values, [0], dtype="bfloat16").check(group)
    with pytest.raises(ValueError, match="pages of uint16"):
        Pages(keys, values, [0]).check(group)


def test_pages_that_may_not_be_written_are_an_error_and_stay_as_they_are() -> None:
    keys, values = np.ones((1, 2, 16, 8), np.float32), np.ones((1, 2, 16, 4), np.float32)
    keys.setflags(write=False)

    event = CpuDevice().stream("test").scatter(np.zeros(16 * 2 * 12 * 4, np.uint8), [16], Pages(keys, values, [0]))

    assert event.wait(WAIT_S)
    assert isinstance(event.error, ValueError)
    assert np.all(keys == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    """All fp16 values, values between any two of them, ties, overflow, zeros of both signs, and NaN."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float().numpy()
    with np.errstate(invalid="ignore"):
        beside = [np.nextafter(halves, np.float32(to)) for to in (-np.inf, np.inf)]
    ties = (halves.view(np.uint32) | np.uint32(0x8000 if dtype is torch.bfloat16 else 0x1000)).view(np.float32)
    values = np.concatenate([halves, *beside, ties])

    ours = rounded(values, str(dtype).removeprefix("torch."))
    theirs = torch.from_numpy(values).to(dtype).float().numpy()

    is_number = ~np.isnan(values)
    assert np.array_equal(np.isnan(ours), ~is_number)
    assert np.array_equal(ours[is_number].view(np.uint32), theirs[is_number].view(np.uint32))
