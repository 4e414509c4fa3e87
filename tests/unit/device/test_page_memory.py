"""Where a client says that its pages are: checked against its layout and the true sizes of its allocations."""

from __future__ import annotations

import pytest

from kvservice.device.page_memory import (
    ArrayPlace,
    FencePlace,
    LayerArrays,
    MemoryPlaces,
    check_places,
    opened_fence,
    opened_pages,
)
from kvservice_api.errors import InvalidRequest
from kvservice_api.layout import LayerGroup, Layout, Shard

LAYOUT = Layout("pages", "bfloat16", 2, kv_heads=4, k_head_dim=8, v_head_dim=8, block_tokens=32)
WHOLE = Shard.whole(LAYOUT)
PAGE = 4 * 16 * 16 * 2  # Bytes of a page: 4 heads, 16 tokens, 8 + 8 dims.
SIZE = 10 * PAGE
OPENED = [(0x7000_0000, SIZE), (0x8000_0000, 4096)]
FENCE = FencePlace(1, 0, 16)


def array(offset: int, **changed: int) -> ArrayPlace:
    strides = {"page": PAGE, "head": 16 * 16 * 2, "token": 16 * 2, "dim": 2} | changed
    return ArrayPlace(0, offset, (strides["page"], strides["head"], strides["token"], strides["dim"]))


def layer(keys: ArrayPlace, values: ArrayPlace | None, pages: int = 10) -> LayerArrays:
    return LayerArrays(keys, values, pages, 16, 0)


def places(*layers: LayerArrays) -> MemoryPlaces:
    return MemoryPlaces("0000:00:00.0", [bytes(64), bytes([1] * 64)], layers, FENCE)


def test_arrays_that_end_with_their_allocation_are_accepted_and_one_byte_more_is_not() -> None:
    fitting = layer(array(0), array(16))

    (pages, _) = opened_pages(places(fitting, fitting), LAYOUT, WHOLE, OPENED)

    assert pages.span(pages.values) == (0x7000_0000 + 16, 0x7000_0000 + SIZE)
    assert (pages.heads, pages.token_bytes, pages.keys.pages) == (4, 4 * 16 * 2, 10)
    with pytest.raises(InvalidRequest, match=f"byte {SIZE + 2} of an allocation of {SIZE}"):
        opened_pages(places(fitting, layer(array(0), array(18))), LAYOUT, WHOLE, OPENED)
    with pytest.raises(InvalidRequest):
        opened_pages(places(fitting, layer(array(0), array(16), pages=11)), LAYOUT, WHOLE, OPENED)


@pytest.mark.parametrize("stride", ["page", "head", "token", "dim"])
def test_strides_whose_products_pass_64_bits_are_refused(stride: str) -> None:
    wrong = layer(array(0, **{stride: 2**64 - 2}), array(16))

    with pytest.raises(InvalidRequest, match="of an allocation of"):
        opened_pages(places(wrong, wrong), LAYOUT, WHOLE, OPENED)


def test_a_stride_that_is_never_used_may_be_any_number() -> None:
    layout = Layout("one", "bfloat16", 1, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=32)
    one = LayerArrays(array(0, page=2**64 - 1, head=3), array(16, page=1), 1, 16, 0)

    (pages,) = opened_pages(places(one), layout, Shard.whole(layout), OPENED)

    assert pages.keys.strides == (0, 0, 32, 2)


@pytest.mark.parametrize("wrong", [array(1), array(0, token=33), array(0, dim=1)])
def test_elements_must_be_aligned(wrong: ArrayPlace) -> None:
    with pytest.raises(InvalidRequest, match="aligned"):
        opened_pages(places(layer(wrong, array(16)), layer(array(0), array(16))), LAYOUT, WHOLE, OPENED)


def test_a_layer_without_values_has_none() -> None:
    latent = Layout("latent", groups=[LayerGroup(1, 1, 16, 0, "bfloat16")], block_tokens=32)
    shard = Shard.whole(latent)

    (pages,) = opened_pages(places(layer(array(0), None)), latent, shard, OPENED)

    assert (pages.values.dim, pages.v_row_bytes) == (0, 0)
    with pytest.raises(InvalidRequest, match="0 dims"):
        opened_pages(places(layer(array(0), array(0))), latent, shard, OPENED)


def test_the_fence_is_within_its_allocation() -> None:
    assert opened_fence(FencePlace(1, 4096 - 8, 2), OPENED) == 0x8000_0000 + 4096 - 8
    with pytest.raises(InvalidRequest):
        opened_fence(FencePlace(1, 4096 - 8, 3), OPENED)
    with pytest.raises(InvalidRequest):
        opened_fence(FencePlace(1, 2**64 - 4, 2), OPENED)


GOOD = layer(array(0), array(16))


@pytest.mark.parametrize(
    "wrong",
    [
        places(GOOD),
        places(GOOD, GOOD)._replace(bus_id="0" * 100_000),
        places(GOOD, GOOD)._replace(handles=[]),
        places(GOOD, GOOD)._replace(handles=[bytes(63), bytes(64)]),
        places(GOOD, GOOD)._replace(handles=[bytes(64), bytes(64)]),
        places(GOOD, GOOD._replace(group=2)),
        places(GOOD, GOOD._replace(group=2**32 - 1)),
        places(GOOD._replace(group=1), GOOD._replace(group=1)),
        places(GOOD, GOOD._replace(page_tokens=32)),
        places(GOOD, GOOD._replace(pages=0)),
        places(GOOD, GOOD._replace(pages=2**31)),
        places(GOOD, GOOD._replace(page_tokens=0)),
        places(GOOD, GOOD._replace(page_tokens=2**32 - 1)),
        places(GOOD, GOOD._replace(keys=ArrayPlace(2, 0, (0, 0, 0, 0)))),
        places(GOOD, GOOD)._replace(fence=FencePlace(9, 0, 1)),
        places(GOOD, GOOD)._replace(fence=FencePlace(1, 0, 0)),
        places(GOOD, GOOD)._replace(fence=FencePlace(1, 2, 1)),
    ],
)
def test_what_is_wrong_in_itself_is_refused(wrong: MemoryPlaces) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_places(wrong, WHOLE)
    assert len(str(refused.value)) < 200
    check_places(places(GOOD, GOOD), WHOLE)
