"""The kernels between stored slices and pages, and the rotation of keys: bit for bit what the CPU device does."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice_adapter.device.arrays import CUDA, ArrayView
from kvservice_adapter.device.rotation import Rotation, Stretch
from kvservice_api.cuda.geometry import LayerPages, PageArray
from kvservice_api.cuda.page_kernels import DeviceRotation, PageKernels
from kvservice_api.cuda.runtime import Gpu
from tests.contracts.device import noise
from tests.gpu.page_arrays import LAYOUTS, MARGIN_BYTES, Copier, PagesOnBoth, Run, Shape, on_device

pytestmark = pytest.mark.gpu
ITEM_BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
ROTATED = ["float32", "float16", "bfloat16"]


@pytest.fixture
def copier(cupy: Any, gpu: Gpu, kernels: PageKernels) -> Copier:
    return Copier(cupy, gpu, kernels)


def pages_of(cupy: Any, layout: str = "token-major", shape: Shape | None = None, dtype: str = "float16") -> PagesOnBoth:
    return PagesOnBoth(cupy, layout, shape or Shape(), ITEM_BYTES[dtype], dtype)


def slices_of(pages: PagesOnBoth, run: Run) -> NDArray[np.uint8]:
    return noise(run.tokens * pages.layer.token_bytes, seed=1)


def stretch(first: int, end: int, half: int, *, rows: int = 0) -> Stretch:
    """With a row for each token, or `rows` of them."""
    angles = np.random.default_rng(first).uniform(-4, 4, (rows or end - first, half)).astype(np.float32)
    return Stretch(first, end, np.cos(angles), np.sin(angles))


def same_numbers(ours: NDArray[np.uint8], theirs: NDArray[np.uint8], dtype: str) -> bool:
    """The same bits; but CUDA's NaN may have others than the CPU's."""
    infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    bits = [part.view(f"u{ITEM_BYTES[dtype]}") for part in (ours, theirs)]
    are_nans = [part & (infinity | (infinity & -infinity) - 1) > infinity for part in bits]
    return bool(((bits[0] == bits[1]) | (are_nans[0] & are_nans[1])).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32", "float64"])
def test_slices_reach_pages_and_come_back_as_on_the_cpu(cupy: Any, copier: Copier, layout: str, dtype: str) -> None:
    pages, run = pages_of(cupy, layout, dtype=dtype), Run()

    copier.scatter(slices_of(pages, run), pages, run)

    assert np.array_equal(pages.device.get(), pages.host)
    ours, theirs = copier.gather(pages, run, noise(run.tokens * pages.layer.token_bytes, seed=2))
    assert np.array_equal(ours, theirs)
    assert np.array_equal(ours, slices_of(pages, run))


@pytest.mark.parametrize(
    "shape", [Shape(heads=1, k_dim=36, v_dim=0), Shape(heads=1, tokens=1), Shape(pages=7, heads=3, k_dim=1, v_dim=1)]
)
def test_latent_pages_and_pages_of_one_token_or_one_dim(cupy: Any, copier: Copier, shape: Shape) -> None:
    pages = pages_of(cupy, shape=shape, dtype="bfloat16")
    run = Run((2, 3), (6, 0, 3, 5, 1), 0)

    copier.scatter(slices_of(pages, run), pages, run)

    assert np.array_equal(pages.device.get(), pages.host)
    ours, theirs = copier.gather(pages, run, noise(run.tokens * pages.layer.token_bytes, seed=2))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(16, 16), (8, 24), (4, 12), (16, 2), (3, 5), (6, 9)])
@pytest.mark.parametrize("staging_offset", [0, 8, 2])
def test_accesses_are_as_wide_as_addresses_and_rows_allow(
    cupy: Any, gpu: Gpu, kernels: PageKernels, dtype: str, k_dim: int, v_dim: int, staging_offset: int
) -> None:
    pages, run = pages_of(cupy, "head-major", Shape(k_dim=k_dim, v_dim=v_dim), dtype), Run()
    copier = Copier(cupy, gpu, kernels, staging_offset)

    copier.scatter(slices_of(pages, run), pages, run)

    assert np.array_equal(pages.device.get(), pages.host)
    ours, theirs = copier.gather(pages, run, noise(run.tokens * pages.layer.token_bytes, seed=2))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("copied", [(0, 14), (3, 11), (7, 8), (5, 5), (13, 40)])
def test_only_the_tokens_that_are_to_be_copied_are_touched(cupy: Any, copier: Copier, copied: tuple[int, int]) -> None:
    pages, run = pages_of(cupy), Run(copied=copied)

    copier.scatter(slices_of(pages, run), pages, run, rotation=Rotation((stretch(0, 14, 4),)))

    assert same_numbers(pages.device.get(), pages.host, "float16")
    ours, theirs = copier.gather(pages, run, noise(run.tokens * pages.layer.token_bytes, seed=2))
    assert same_numbers(ours, theirs, "float16")


def test_more_pieces_than_a_grid_has_rows_are_copied(cupy: Any, gpu: Gpu, kernels: PageKernels, copier: Copier) -> None:
    count = 66_000  # Pages of one token and one dim.
    run = Run((count,), tuple(np.random.default_rng(0).permutation(count).tolist()), 0)
    pages = pages_of(cupy, shape=Shape(count, 1, 1, 1, 1), dtype="float8_e4m3fn")
    keys, values = slices_of(pages, run).reshape(2, count)
    staging, table, stream = on_device(cupy, slices_of(pages, run)), copier.pieces(pages, run), gpu.stream()

    kernels.scatter(stream, staging.data.ptr, table.data.ptr, count, pages.layer)

    stream.synchronize()
    paged = pages.device.get()[MARGIN_BYTES:][: 2 * count].reshape(count, 2)
    assert np.array_equal(paged[list(run.page_ids)], np.stack([keys, values], axis=1))


@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", ROTATED)
@pytest.mark.parametrize(("k_dim", "half"), [(32, 16), (40, 8), (7, 3), (6, 3), (24, 4)])
def test_a_scatter_rotates_keys_as_the_cpu_does(
    cupy: Any, copier: Copier, dtype: str, pairing: str, in_fp32: bool, k_dim: int, half: int
) -> None:
    pages, run = pages_of(cupy, shape=Shape(k_dim=k_dim), dtype=dtype), Run()
    stretches = stretch(0, 3, half), stretch(4, 9, half, rows=1), stretch(12, 1 << 40, half, rows=1)

    copier.scatter(slices_of(pages, run), pages, run, Rotation(stretches, pairing, in_fp32))

    assert same_numbers(pages.device.get(), pages.host, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_rotated_in_pages_of_every_layout(cupy: Any, copier: Copier, layout: str) -> None:
    pages, run = pages_of(cupy, layout, Shape(k_dim=16), dtype="bfloat16"), Run()

    copier.scatter(slices_of(pages, run), pages, run, Rotation((stretch(2, 14, 8),)))

    assert same_numbers(pages.device.get(), pages.host, "bfloat16")


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", ROTATED)
def test_numbers_of_every_size_are_rotated_in_place_as_on_the_cpu(
    cupy: Any, gpu: Gpu, kernels: PageKernels, dtype: str, pairing: str
) -> None:
    """All halves, among them subnormal ones, infinities and NaNs; products that are subnormal, and too large."""
    element = f"u{ITEM_BYTES[dtype]}"
    bits = np.arange(1 << 16, dtype=np.uint32) if dtype != "float32" else noise(1 << 18).view(np.uint32)
    host = np.random.default_rng(3).permutation(bits).astype(element).reshape(1, 2, 512, 64)
    sizes = np.float32(2.0) ** np.random.default_rng(4).integers(-20, 4, (512, 32))
    angles = np.random.default_rng(5).uniform(-4, 4, (512, 32))
    tables = [(sizes * part).astype(np.float32) for part in (np.cos(angles), np.sin(angles))]
    for in_fp32 in (True, False):
        rotation, device = Rotation((Stretch(0, 512, *tables),), pairing, in_fp32), on_device(cupy, host)

        rotate(gpu, kernels, device, dtype, rotation)

        expected = host.copy()
        rotation.rotate_bits(expected, dtype)
        assert same_numbers(device.get().view(np.uint8), expected.view(np.uint8), dtype)


def rotate(gpu: Gpu, kernels: PageKernels, keys: Any, dtype: str, rotation: Rotation) -> None:
    view = ArrayView(keys.data.ptr, keys.shape, keys.strides, dtype, keys.itemsize, (CUDA, 0), keys)
    stream = gpu.stream()
    kernels.rotate(stream, view, kernels.rotation(rotation))
    stream.synchronize()


@pytest.mark.parametrize(
    "axes",
    [(0, 1, 2, 3, 4), (3, 0, 1, 2, 4), (1, 0, 2, 3, 4), (0, 1, 2, 4, 3)],
    ids=lambda axes: "".join(map(str, axes)),
)
def test_an_array_of_any_strides_is_rotated_in_place(
    cupy: Any, gpu: Gpu, kernels: PageKernels, axes: tuple[int, ...]
) -> None:
    """Beside the first 24 dims, and the tokens without a rotation, nothing changes."""
    host = noise(3 * 2 * 2 * 5 * 40 * 2).view(np.uint16).reshape(3, 2, 2, 5, 40)
    device, rotation = on_device(cupy, host), Rotation((stretch(1, 3, 1), stretch(3, 5, 1, rows=1)))
    shown = device[:, :, :, :, :32].transpose(axes)

    rotate(gpu, kernels, shown, "float16", rotation)

    rotation.rotate_bits(host[:, :, :, :, :32].transpose(axes), "float16")
    assert same_numbers(device.get().view(np.uint8), host.view(np.uint8), "float16")


def test_a_rotation_is_uploaded_once_and_its_memory_used_again(gpu: Gpu) -> None:
    kernels, first = PageKernels(gpu), Rotation((stretch(0, 8, 4),))

    held = kernels.rotation(first)

    assert kernels.rotation(first) is held
    others = [Rotation((stretch(0, 8, 4),)) for _ in range(9)]
    places = {place_of(kernels.rotation(other)) for other in others}
    assert len(places) == 9
    place = place_of(held)
    assert place not in places
    del held
    gc.collect()
    longer = Rotation((stretch(0, 9, 4),))
    assert place_of(kernels.rotation(longer)) in {place, *places}


def place_of(rotation: DeviceRotation) -> int:
    return int(rotation.argument("float16", 2)["stretches"])


def test_a_fence_stops_the_kernels_that_come_after_it(cupy: Any, gpu: Gpu, kernels: PageKernels) -> None:
    pages, run = pages_of(cupy), Run()
    staging, word, stream = (
        on_device(cupy, slices_of(pages, run)),
        on_device(cupy, np.array([7], np.uint32)),
        gpu.stream(),
    )
    pieces = Copier(cupy, gpu, kernels).pieces(pages, run)
    arguments = stream, staging.data.ptr, pieces.data.ptr, len(pieces) // 32, pages.layer

    for rotation in (None, kernels.rotation(Rotation((stretch(0, 8, 4),)))):
        kernels.scatter(*arguments, rotation, fence=(word.data.ptr, 8))
        stream.synchronize()
        assert np.array_equal(pages.device.get(), pages.host)

    kernels.scatter(*arguments, fence=(word.data.ptr, 7))
    stream.synchronize()
    assert not np.array_equal(pages.device.get(), pages.host)


def array(address: int = 4096, strides: tuple[int, int, int, int] = (512, 256, 32, 2), dim: int = 16) -> PageArray:
    return PageArray(address, 4, strides, dim)


def layer_of(keys: PageArray, dtype: str = "float16", page_tokens: int = 8) -> LayerPages:
    return LayerPages(keys, array(8192), 2, page_tokens, ITEM_BYTES[dtype], dtype)


@pytest.mark.parametrize(
    ("pages", "staging", "message"),
    [
        (layer_of(array(4097)), 0, "are not aligned"),
        (layer_of(array(strides=(512, 256, 33, 2))), 0, "are not aligned"),
        (layer_of(array(strides=(512, 256, 32, 3))), 0, "are not aligned"),
        (layer_of(array()), 1, "are not aligned"),
        (layer_of(array(strides=(-512, 256, 32, 2))), 0, "strides"),
        (layer_of(array(), page_tokens=1 << 30), 0, "too large"),
    ],
)
def test_pages_that_a_kernel_cannot_reach_are_refused_before_the_launch(
    gpu: Gpu, kernels: PageKernels, pages: LayerPages, staging: int, message: str
) -> None:
    stream = gpu.stream()

    with pytest.raises(ValueError, match=message):
        kernels.scatter(stream, staging, 0, 1, pages)
    with pytest.raises(ValueError, match=message):
        kernels.gather(stream, pages, 0, 1, staging)
    stream.synchronize()


def test_rotations_that_do_not_fit_are_refused_before_the_launch(gpu: Gpu, kernels: PageKernels) -> None:
    stream, fitting = gpu.stream(), kernels.rotation(Rotation((stretch(0, 8, 4),)))

    with pytest.raises(ValueError, match="keys of float8_e4m3fn cannot be rotated"):
        kernels.scatter(stream, 0, 0, 1, layer_of(array(), "float8_e4m3fn"), fitting)
    with pytest.raises(ValueError, match="rotation of 18 dims is given for keys of 16"):
        kernels.scatter(stream, 0, 0, 1, layer_of(array()), kernels.rotation(Rotation((stretch(0, 8, 9),))))
    with pytest.raises(ValueError, match=r"tokens 0..8 have tables of shape \(3, 4\)"):
        kernels.rotation(Rotation((stretch(0, 8, 4, rows=3),)))
    with pytest.raises(ValueError, match="of several widths"):
        kernels.rotation(Rotation((stretch(0, 8, 4), stretch(8, 9, 3))))
    with pytest.raises(ValueError, match="pairs 'thirds'"):
        kernels.rotation(Rotation((stretch(0, 8, 4),), "thirds"))
