"""Callers' memory as flat bytes: shared, never copied, whatever it comes in."""

from __future__ import annotations

import array
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from kvservice_api.errors import InvalidRequest
from kvservice_client.buffers import readable, writable

TORCH_DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_a_torch_tensor_of_every_dtype_shares_its_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    view = writable(tensor, "tensor", 24 * dtype.itemsize)

    assert view.ctypes.data == tensor.data_ptr()
    assert view.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    view[:] = 0
    assert not tensor.view(torch.uint8).any()


def test_a_view_keeps_its_tensor_alive_and_lets_it_go() -> None:
    tensor = torch.full((1 << 20,), 7, dtype=torch.bfloat16)
    storage = weakref.ref(tensor.untyped_storage())
    expected = tensor.view(torch.uint8).numpy().tobytes()

    view = readable(tensor, "tensor", 2 << 20)
    del tensor
    gc.collect()
    assert view.tobytes() == expected
    del view
    gc.collect()
    assert storage() is None


def test_a_part_of_a_tensor_begins_where_it_begins() -> None:
    whole = torch.arange(32, dtype=torch.bfloat16).view(4, 8)
    view = readable(whole[1:3], "part", 32)
    assert view.ctypes.data == whole.data_ptr() + 16


@pytest.mark.parametrize(
    "source",
    [b"abcdefgh", bytearray(8), memoryview(b"abcdefgh"), array.array("I", [1, 2]), np.arange(4, dtype=np.uint16)],
    ids=lambda source: type(source).__name__,
)
def test_buffers_and_arrays_are_taken_as_they_are(source: Any) -> None:
    view = readable(source, "source", 8)
    assert view.dtype == np.uint8
    assert view.shape == (8,)
    assert view.tobytes() == memoryview(source).tobytes()


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (torch.zeros(4, 4, dtype=torch.bfloat16).T[:2], "not contiguous"),
        (np.zeros((4, 4), np.uint16)[:, :2], "not contiguous"),
        (np.asfortranarray(np.zeros((2, 4), np.uint16)), "not contiguous"),
        (memoryview(bytes(32))[::2], "not contiguous"),
        (torch.zeros(8, dtype=torch.bfloat16, requires_grad=True), "cannot be lent by DLPack.*"),
        (torch.zeros(8, dtype=torch.bfloat16, device="meta"), "not in host memory|cannot be lent"),
        (torch.zeros(0, dtype=torch.bfloat16), "has 0 bytes; it must have 16"),
        ([1, 2, 3], "is a list: it has neither a buffer nor DLPack"),
        (bytes(15), "has 15 bytes; it must have 16"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_is_refused_by_name(source: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^layers\[0\] (is )?({problem})"):
        readable(source, "layers[0]", 16)


@pytest.mark.parametrize("target", [bytes(4), memoryview(b"abcd"), np.frombuffer(b"abcd", np.uint8)])
def test_read_only_memory_is_no_target(target: Any) -> None:
    with pytest.raises(InvalidRequest, match="into is read-only"):
        writable(target, "into", 4)
