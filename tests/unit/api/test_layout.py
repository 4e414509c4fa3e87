"""Layouts, shards, and the places of a block's bytes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_api.errors import InvalidLayout, InvalidRequest, LayoutMismatch
from kvservice_api.image import PAGE_BYTES, Trailer, block_geometry, checksum
from kvservice_api.layout import DTYPE_BYTES, Layout, Rotary, Shard
from kvservice_api.v1 import types_pb2 as pb
from tests.layouts import changed

LAYOUT = Layout("model", "float16", layers=4, kv_heads=8, k_head_dim=64, v_head_dim=32)
WHOLE = Shard.whole(LAYOUT)

WRONG_FIELDS: list[tuple[str, Any]] = [
    ("layers", 0),
    ("kv_heads", 0),
    ("k_head_dim", 0),
    ("block_tokens", 0),
    ("v_head_dim", -1),
    ("layers", -1),
    ("layers", 2**32 - 1),
    ("kv_heads", 2**32 - 1),
    ("k_head_dim", 2**32 - 1),
    ("v_head_dim", 2**32 - 1),
    ("block_tokens", 2**32 - 1),
    ("layers", 1.0),
    ("model_id", ""),
    ("model_id", "m" * 1025),
    ("model_revision", "r" * 1025),
    ("dtype", "float64"),
    ("dtype", ""),
    ("rotary", Rotary(dims=65)),
    ("rotary", Rotary(pairing="thirds")),
    ("rotary", Rotary(base=math.inf)),
    ("rotary", Rotary(parameters=(("factor", math.nan),))),
    ("rotary", Rotary(parameters=tuple((str(number), 1.0) for number in range(65)))),
]


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS)
def test_a_dimension_or_name_out_of_range_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidLayout) as refusal:
        changed(LAYOUT, **{field: value})
    assert refusal.value.details == {"field": field}


def test_dimensions_whose_product_overflows_are_refused() -> None:
    largest: dict[str, Any] = {"kv_heads": 4096, "k_head_dim": 65536, "v_head_dim": 65536, "block_tokens": 65536}

    with pytest.raises(InvalidLayout, match="one layer of one block"):
        changed(LAYOUT, **largest)


@given(st.tuples(*[st.integers(0, 2**32 - 1)] * 5))
def test_any_dimensions_from_the_wire_are_refused_or_stay_far_inside_64_bits(dims: tuple[int, ...]) -> None:
    layers, kv_heads, k_head_dim, v_head_dim, block_tokens = dims
    message = pb.Layout(
        model_id="m", dtype="float32", layers=layers, kv_heads=kv_heads, k_head_dim=k_head_dim, v_head_dim=v_head_dim,
        block_tokens=block_tokens, rotary=pb.Rotary(kind="none", pairing="half"),
    )  # fmt: skip
    try:
        layout = Layout.from_proto(message)
    except InvalidLayout:
        return
    assert block_geometry(layout, Shard.whole(layout), block_tokens).image_bytes < 2**48


def test_another_fingerprint_is_a_mismatch() -> None:
    with pytest.raises(LayoutMismatch) as refusal:
        Layout.from_proto(LAYOUT.to_proto(), bytes(32))
    assert refusal.value.details == {"expected": LAYOUT.fingerprint.hex()}


def test_the_order_of_rotary_parameters_does_not_matter() -> None:
    one = Rotary(parameters=(("a", 1), ("b", 2)))
    other = Rotary(parameters=(("b", 2.0), ("a", 1.0)))

    assert changed(LAYOUT, rotary=one).fingerprint == changed(LAYOUT, rotary=other).fingerprint


@pytest.mark.parametrize(
    "shard",
    [(0, 0, 0, 8), (2, 1, 0, 8), (0, 5, 0, 8), (0, 4, 3, 3), (0, 4, 0, 9), (2**32 - 1, 2**32 - 1, 0, 8), (-1, 4, 0, 8)],
)
def test_a_shard_that_is_empty_or_outside_its_layout_is_refused(shard: tuple[int, int, int, int]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        Shard(*shard).check(LAYOUT)
    assert refusal.value.details == {"field": "shard"}


def test_a_shard_survives_its_encoding_and_the_wire() -> None:
    shard = Shard(1, 3, 2, 8).check(LAYOUT)

    assert Shard.decode(shard.encode()) == Shard.from_proto(shard.to_proto()) == shard
    assert len(shard.encode()) == 8


def test_a_shard_covers_what_lies_inside_it() -> None:
    shard = Shard(1, 3, 2, 8)

    assert WHOLE.covers(shard)
    assert shard.covers(shard)
    assert shard.covers(Shard(2, 3, 4, 5))
    assert not shard.covers(WHOLE)
    assert not shard.covers(Shard(0, 3, 2, 8))
    assert not shard.covers(Shard(1, 3, 1, 8))


layouts = st.builds(
    Layout,
    model_id=st.just("m"),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    layers=st.integers(1, 40),
    kv_heads=st.integers(1, 9),
    k_head_dim=st.integers(1, 200),
    v_head_dim=st.integers(0, 200),
    block_tokens=st.integers(1, 300),
)


@given(layouts, st.data())
def test_slices_follow_one_another_and_the_trailer_ends_the_image(layout: Layout, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, layout.block_tokens))
    geometry = block_geometry(layout, Shard.whole(layout), tokens)
    ranges = [geometry.slice_range(layer) for layer in range(layout.layers)]
    elements = layout.kv_heads * tokens * (layout.k_head_dim + layout.v_head_dim)

    assert all(end - start == elements * DTYPE_BYTES[layout.dtype] for start, end in ranges)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert ranges[-1][1] <= geometry.trailer_offset
    assert geometry.trailer_offset + Trailer.size_bytes(layout.layers) == geometry.image_bytes
    assert geometry.image_bytes % PAGE_BYTES == 0
    is_large = geometry.slice_bytes_max >= 64 * 1024
    assert not is_large or all(start % PAGE_BYTES == 0 for start, _ in ranges)
    assert is_large or all(end == start for (_, end), (start, _) in pairwise(ranges))
    assert geometry.image_bytes - geometry.payload_bytes < PAGE_BYTES * (layout.layers + 2)


def test_head_ranges_of_all_ranks_add_up_to_the_whole_block() -> None:
    parts = [block_geometry(LAYOUT, Shard(0, 4, head, head + 2), 256) for head in range(0, 8, 2)]
    whole = block_geometry(LAYOUT, WHOLE, 256)

    assert sum(part.payload_bytes for part in parts) == whole.payload_bytes == 256 * LAYOUT.bytes_per_token
    assert sum(part.slices[0].k_bytes for part in parts) == whole.slices[0].k_bytes


@pytest.mark.parametrize("tokens", [0, -1, 257])
def test_a_block_has_one_token_at_least_and_block_tokens_at_most(tokens: int) -> None:
    with pytest.raises(InvalidRequest):
        block_geometry(LAYOUT, WHOLE, tokens)


@pytest.mark.parametrize("kind", [bytes, memoryview, np.frombuffer])
def test_a_checksum_does_not_depend_on_what_holds_the_bytes(kind: Any) -> None:
    data = np.arange(256, dtype=np.uint8).tobytes()
    held = np.frombuffer(data, np.uint8) if kind is np.frombuffer else kind(data)

    assert checksum(held) == checksum(data)
