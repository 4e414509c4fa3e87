"""Callers' memory as flat bytes: shared, never copied, for every array type."""

from __future__ import annotations

import array
import ctypes
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import DTYPE_BYTES, LayerGroup
from kvservice_client.buffers import Slices, readable, writable

TORCH_DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
]


def slices(
    dtype: str = "bfloat16", tokens: tuple[int, ...] = (4,), *, heads: int = 1, k: int = 1, v: int = 1
) -> Slices:
    return Slices(LayerGroup(1, heads, k, v, dtype), heads, tokens)


def raw(size_bytes: int) -> Slices:
    """The slices of a buffer of `size_bytes` plain bytes."""
    return slices("uint8", (size_bytes // 2,))


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_a_torch_tensor_of_every_dtype_shares_its_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).view(1, 2, 3, 4, 1).to(dtype)
    view = writable(tensor, "tensor", slices(str(dtype).removeprefix("torch."), heads=3))

    assert view.ctypes.data == tensor.data_ptr()
    assert view.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    view[:] = 0
    assert not tensor.view(torch.uint8).any()


def test_a_view_keeps_its_tensor_alive_until_the_views_end() -> None:
    tensor = torch.full((1 << 20,), 7, dtype=torch.bfloat16)
    storage = weakref.ref(tensor.untyped_storage())
    expected = tensor.view(torch.uint8).numpy().tobytes()

    view = readable(tensor, "tensor", slices(tokens=(1 << 19,)))
    del tensor
    gc.collect()
    assert view.tobytes() == expected
    del view
    gc.collect()
    assert storage() is None


def test_a_part_of_a_tensor_begins_where_it_begins() -> None:
    whole = torch.arange(32, dtype=torch.bfloat16).view(4, 2, 1, 4, 1)
    view = readable(whole[1:3], "part", slices(tokens=(4, 4)))
    assert view.ctypes.data == whole.data_ptr() + 16


@pytest.mark.parametrize(
    "source",
    [
        b"abcdefgh",
        bytearray(8),
        memoryview(b"abcdefgh"),
        memoryview(b"abcdefgh").cast("c"),
        array.array("B", b"abcdefgh"),
        np.arange(8, dtype=np.uint8),
        torch.arange(8, dtype=torch.uint8),
    ],
    ids=lambda source: type(source).__name__,
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e5m2"])
def test_plain_bytes_are_taken_for_any_layout(source: Any, dtype: str) -> None:
    view = readable(source, "source", slices(dtype, (4 // DTYPE_BYTES[dtype],)))
    assert view.dtype == np.uint8
    assert view.shape == (8,)
    assert view.tobytes() == bytes(source.numpy() if isinstance(source, torch.Tensor) else source)


NUMPY_KINDS = "float16 float32 float64 int8 uint8 int16 uint16 int32 int64 bool complex64".split()
OTHER_TORCH_DTYPES = [torch.int16, torch.uint16, torch.int64, torch.float64, torch.bool]
STAND_INS = {"bfloat16": {"int16", "uint16"}, "float8_e4m3fn": {"int8", "uint8"}, "float8_e5m2": {"int8", "uint8"}}


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("kind", NUMPY_KINDS)
def test_a_numpy_array_has_the_elements_of_its_layout_or_the_integers_that_stand_for_them(
    dtype: str, kind: str
) -> None:
    size_bytes = 16 * DTYPE_BYTES[dtype]
    array = np.zeros(size_bytes, np.uint8).view(kind)
    if array.size == 16:
        array = array.reshape(1, 2, 2, 4, 1)

    if kind == dtype or kind in STAND_INS.get(dtype, ()) or (kind == "uint8" and array.ndim == 1):
        assert readable(array, "array", slices(dtype, heads=2)).size == size_bytes
    else:
        with pytest.raises(InvalidRequest, match=f"array has elements of {kind}; its layer has {dtype}"):
            readable(array, "array", slices(dtype, heads=2))


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("kind", [*TORCH_DTYPES, *OTHER_TORCH_DTYPES], ids=str)
def test_a_torch_tensor_has_the_elements_of_its_layout(dtype: str, kind: torch.dtype) -> None:
    size_bytes = 16 * DTYPE_BYTES[dtype]
    tensor = torch.zeros(size_bytes // kind.itemsize, dtype=kind)
    name = str(kind).removeprefix("torch.")

    if name in (dtype, "uint8"):
        assert readable(tensor, "tensor", slices(dtype, heads=2)).size == size_bytes
    else:
        with pytest.raises(InvalidRequest, match=f"tensor has elements of {name}; its layer has {dtype}"):
            readable(tensor, "tensor", slices(dtype, heads=2))


def test_other_byte_orders_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="float16 of the other byte order"):
        readable(np.zeros(8, ">f2"), "array", slices("float16"))


@pytest.mark.parametrize("of", [torch.zeros, np.zeros], ids=["torch", "numpy"])
@pytest.mark.parametrize(
    ("tokens", "shape", "is_right"),
    [
        ((8,), (1, 2, 4, 8, 16), True),
        ((8,), (2, 4, 8, 16), True),
        ((8, 8), (2, 2, 4, 8, 16), True),
        ((8, 8), (2048,), True),
        ((8, 3), (2 * 4 * 11 * 16,), True),
        ((8,), (2, 8, 4, 16), False),  # [token][head].
        ((8,), (1, 2, 8, 4, 16), False),
        ((8,), (1, 4, 2, 8, 16), False),
        ((8,), (4, 2, 8, 16), False),
        ((8,), (1, 2, 4, 16, 8), False),
        ((8,), (2, 512), False),
        ((8,), (1, 1024), False),
        ((8,), (1, 1, 2, 4, 8, 16), False),
        ((8, 8), (2, 4, 16, 16), False),  # All tokens of a head together.
        ((8, 8), (4, 4, 8, 16), False),
        ((8, 3), (1, 2, 4, 11, 16), False),
    ],
)
def test_more_than_one_dimension_must_be_blocks_two_heads_tokens_dim(
    of: Any, tokens: tuple[int, ...], shape: tuple[int, ...], is_right: bool
) -> None:
    buffer = of(shape, dtype=torch.float16 if of is torch.zeros else np.float16)
    expected = slices("float16", tokens, heads=4, k=16, v=16)

    if is_right:
        assert readable(buffer, "buffer", expected).size == expected.size_bytes
    else:
        with pytest.raises(InvalidRequest, match=r"buffer has shape .* \[blocks, 2, kv_heads, tokens, dim\]"):
            readable(buffer, "buffer", expected)


def test_raw_bytes_of_more_than_one_dimension_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="elements of uint8"):
        readable(np.zeros((2, 8), np.uint8), "buffer", slices("float16", heads=2))


def test_a_latent_group_has_one_vector_instead_of_keys_and_values() -> None:
    latent = slices("float16", (8, 8), k=16, v=0)

    assert readable(np.zeros((2, 1, 1, 8, 16), np.float16), "buffer", latent).size == 512
    with pytest.raises(InvalidRequest, match="buffer has shape"):
        readable(np.zeros((2, 2, 1, 8, 8), np.float16), "buffer", latent)


def test_where_keys_and_values_have_other_dims_only_flat_buffers_are_taken() -> None:
    expected = slices("float16", (8,), k=24, v=16)

    assert readable(np.zeros(8 * 40, np.float16), "buffer", expected).size == 640
    with pytest.raises(InvalidRequest, match="one dimension"):
        readable(np.zeros((1, 2, 1, 8, 20), np.float16), "buffer", expected)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (torch.zeros(4, 4, dtype=torch.bfloat16).T[:2], "not contiguous"),
        (np.zeros((4, 4), np.uint16)[:, :2], "not contiguous"),
        (np.asfortranarray(np.zeros((2, 4), np.uint16)), "not contiguous"),
        (memoryview(bytes(32))[::2], "not contiguous"),
        (torch.zeros(8, dtype=torch.bfloat16, requires_grad=True), "cannot be exported by DLPack.*"),
        (torch.zeros(8, dtype=torch.bfloat16, device="meta"), "not in host memory|cannot be exported"),
        (torch.zeros(0, dtype=torch.bfloat16), "has 0 bytes; it must have 16"),
        ((ctypes.c_void_p * 1)(), "has elements of a kind that NumPy lacks"),
        (array.array("u", "abcd"), "has elements of str32"),
        (np.zeros(8, "V1"), "has elements of void8"),
        ([1, 2, 3], "is a list: it has neither a buffer nor DLPack"),
        (bytes(15), "has 15 bytes; it must have 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_shared_is_refused_by_name(source: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^layers\[0\] (is )?({problem})"):
        readable(source, "layers[0]", slices())


@pytest.mark.parametrize("target", [bytes(4), memoryview(b"abcd"), np.frombuffer(b"abcd", np.uint8)])
def test_read_only_memory_is_no_target(target: Any) -> None:
    with pytest.raises(InvalidRequest, match="into is read-only"):
        writable(target, "into", raw(4))
