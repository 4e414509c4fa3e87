"""The pieces of an image for I/O, and the verification of its bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.store import image_check
from kvservice_api.image import PAGE_BYTES, BlockGeometry, Trailer, block_geometry, checksum
from kvservice_api.layout import Layout, Shard

KEY = bytes(range(32))


def geometry_of(layers: int, heads: int, dim: int, tokens: int) -> BlockGeometry:
    layout = Layout(
        model_id="test", dtype="float32", layers=layers, kv_heads=heads, k_head_dim=dim, v_head_dim=dim,
        block_tokens=tokens,
    )  # fmt: skip
    return block_geometry(layout, Shard.whole(layout), tokens)


geometries = st.builds(
    geometry_of, st.integers(1, 40), st.integers(1, 8), st.sampled_from([1, 16, 128]), st.integers(1, 64)
)


@given(geometries, st.sampled_from([1, 4096, 1 << 20, 4 << 20]))
def test_pieces_have_every_layer_once_in_order_and_lie_on_whole_pages(geometry: BlockGeometry, size: int) -> None:
    cut = image_check.cut(geometry, size)
    assert [layer for piece in cut for layer in range(piece.layer_begin, piece.layer_end)] == list(
        range(geometry.slice_count)
    )
    for piece in cut:
        assert piece.start % PAGE_BYTES == piece.end % PAGE_BYTES == 0
        assert 0 <= piece.start < piece.end <= geometry.image_bytes
        assert piece.start <= geometry.slice_range(piece.layer_begin)[0]
        assert geometry.slice_range(piece.layer_end - 1)[1] <= piece.end
    assert image_check.trailer_start(geometry) % PAGE_BYTES == 0
    assert image_check.trailer_start(geometry) <= geometry.trailer_offset


@given(geometries, st.sampled_from([4096, 1 << 20]))
def test_pieces_and_the_trailers_pages_are_all_of_an_image_that_holds_data(geometry: BlockGeometry, size: int) -> None:
    covered = np.zeros(geometry.image_bytes // PAGE_BYTES, np.bool_)
    for piece in image_check.cut(geometry, size):
        covered[piece.start // PAGE_BYTES : piece.end // PAGE_BYTES] = True
    covered[image_check.trailer_start(geometry) // PAGE_BYTES :] = True
    assert covered.all()


@pytest.mark.parametrize(
    ("heads", "first", "sizes"),
    [
        (8, 1, [1, 4, 8, 8, 8, 3]),
        (8, 3, [3, 8, 8, 8, 5]),
        (8, 0, [8, 8, 8, 8]),
        (256, 1, [1, 4, 8, 8, 8, 3]),
        (512, 1, [1, 2, 4, 8, 8, 8, 1]),
    ],
)
def test_each_piece_is_four_times_the_one_before_or_twice_if_that_is_large(
    heads: int, first: int, sizes: list[int]
) -> None:
    """Also where a layer is larger than was asked for."""
    geometry = geometry_of(32, heads, 16, 16)
    layer = geometry.slice_range(0)[1]
    assert layer == heads * 2048
    cut = image_check.cut(geometry, 8 * layer, max(0, first * layer - 100))
    assert [piece.layer_end - piece.layer_begin for piece in cut] == sizes


@pytest.fixture
def image() -> tuple[bytearray, BlockGeometry, int]:
    """A sound image of three small slices, and its trailer's checksum."""
    geometry = geometry_of(3, 2, 16, 16)
    data = bytearray(np.random.default_rng(1).bytes(geometry.image_bytes))
    sums = [checksum(bytes(data[slice(*geometry.slice_range(layer))])) for layer in range(3)]
    trailer = Trailer(KEY, Shard(0, 3, 0, 2), np.array(sums, np.uint64)).encode()
    data[geometry.trailer_offset :] = trailer
    return data, geometry, checksum(trailer)


def test_a_sound_trailer_is_read_from_the_images_end(image: tuple[bytearray, BlockGeometry, int]) -> None:
    data, geometry, expected = image
    view = memoryview(data)
    for end in (view, view[image_check.trailer_start(geometry) :]):
        trailer = image_check.read_trailer(end, geometry, KEY, expected)
        assert trailer is not None
        assert image_check.damaged_layers(view, 0, geometry, range(3), trailer.checksums) == []


def test_a_trailer_with_a_flipped_bit_or_of_another_block_is_not_accepted(
    image: tuple[bytearray, BlockGeometry, int],
) -> None:
    data, geometry, expected = image
    assert image_check.read_trailer(memoryview(data), geometry, bytes(32), expected) is None
    assert image_check.read_trailer(memoryview(data), geometry, KEY, expected ^ 1) is None
    for at in range(geometry.trailer_offset, geometry.image_bytes):
        data[at] ^= 0x10
        assert image_check.read_trailer(memoryview(data), geometry, KEY, expected) is None
        data[at] ^= 0x10


@pytest.mark.parametrize("layer", range(3))
def test_a_flipped_bit_damages_its_layer_and_no_other(image: tuple[bytearray, BlockGeometry, int], layer: int) -> None:
    data, geometry, expected = image
    trailer = image_check.read_trailer(memoryview(data), geometry, KEY, expected)
    assert trailer is not None
    begin, end = geometry.slice_range(layer)
    for at in (begin, (begin + end) // 2, end - 1):
        data[at] ^= 1
        assert image_check.damaged_layers(memoryview(data), 0, geometry, range(3), trailer.checksums) == [layer]
        data[at] ^= 1


def test_each_damaged_image_of_many_is_named_by_its_part() -> None:
    shard = Shard(5, 8, 0, 2)
    images = []
    for number, tokens in enumerate([16, 3, 16, 16, 16]):  # One of another size.
        geometry = geometry_of(3, 2, 16, tokens)
        data = bytearray(np.random.default_rng(number).bytes(geometry.image_bytes))
        sums = [checksum(bytes(data[slice(*geometry.slice_range(layer))])) for layer in range(3)]
        key = bytes([number]) * 32
        trailer = Trailer(key, shard, np.array(sums, np.uint64)).encode()
        data[geometry.trailer_offset :] = trailer
        images.append(image_check.StoredImage(memoryview(data), geometry, key, shard, checksum(trailer)))
    assert image_check.damages(images) == ["", "", "", "", ""]
    images[1].image[images[1].geometry.slice_range(2)[1] - 1] ^= 1
    images[2].image[images[2].geometry.trailer_offset] ^= 1
    images[4] = images[4]._replace(shard=Shard(4, 7, 0, 2))
    assert image_check.damages(images) == ["", "layer 7", "the trailer", "", "the trailer"]


def test_layers_are_verified_in_pages_that_begin_inside_the_image(image: tuple[bytearray, BlockGeometry, int]) -> None:
    data, geometry, expected = image
    trailer = image_check.read_trailer(memoryview(data), geometry, KEY, expected)
    assert trailer is not None
    start, end = image_check.page_range(geometry, 1, 3)
    pages = memoryview(data)[start:end]
    assert image_check.damaged_layers(pages, start, geometry, range(1, 3), trailer.checksums) == []
    data[geometry.slice_range(2)[0]] ^= 1
    assert image_check.damaged_layers(pages, start, geometry, range(1, 3), trailer.checksums) == [2]
