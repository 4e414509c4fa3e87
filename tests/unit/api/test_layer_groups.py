"""Layouts whose layers differ: groups, their geometry in an image, and how a shard's heads divide them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_api.errors import InvalidLayout
from kvservice_api.image import PAGE_BYTES, Trailer, block_geometry, layer_starts
from kvservice_api.layout import DTYPE_BYTES, LayerGroup, Layout, Rotary, Shard
from kvservice_api.v1 import types_pb2 as pb

SLIDING = LayerGroup(5, 8, 64, 64, "bfloat16", window=512, rotary=Rotary("default", dims=64, base=1e4))
FULL = LayerGroup(1, 2, 128, 128, "bfloat16", rotary=Rotary("default", dims=128, base=1e6))
LATENT = LayerGroup(2, 1, 576, 0, "float8_e4m3fn")
LAYOUT = Layout("mixed", groups=[SLIDING, FULL, LATENT])


def test_each_layer_has_the_geometry_of_its_group() -> None:
    assert LAYOUT.layers == 8
    assert [LAYOUT.group_of(layer) for layer in range(8)] == [SLIDING] * 5 + [FULL] + [LATENT] * 2
    assert [group.attention for group in LAYOUT.groups] == ["sliding(512)", "full", "latent"]
    assert LAYOUT.bytes_per_token == 5 * 8 * 128 * 2 + 2 * 256 * 2 + 2 * 576


def test_equal_neighbours_are_one_group() -> None:
    split = Layout("mixed", groups=[replace(SLIDING, layers=2), replace(SLIDING, layers=3), FULL, LATENT])

    assert split.groups == LAYOUT.groups
    assert split == LAYOUT
    assert split.fingerprint == LAYOUT.fingerprint


def test_one_group_without_a_window_is_the_layout_that_always_was() -> None:
    by_group = Layout("m", groups=[LayerGroup(4, 2, 16, 16, "float16", rotary=Rotary("yarn", dims=16))])
    by_fields = Layout(
        "m", "float16", layers=4, kv_heads=2, k_head_dim=16, v_head_dim=16, rotary=Rotary("yarn", dims=16)
    )

    assert by_group == by_fields
    assert by_group.encode().startswith(b"kvservice/layout/1")
    assert not by_group.to_proto().groups


def test_what_groups_have_in_common_can_be_asked_of_the_layout_and_what_differs_cannot() -> None:
    alternating = Layout(
        "m", groups=[LayerGroup(1, 2, 16, 16, "float16", window=8), LayerGroup(1, 2, 16, 16, "float16")]
    )

    assert (alternating.dtype, alternating.k_head_dim, alternating.v_head_dim) == ("float16", 16, 16)
    assert alternating.slice_bytes(2, 4) == 2 * 4 * 32 * 2
    for name in ("dtype", "k_head_dim", "v_head_dim", "rotary"):
        with pytest.raises(InvalidLayout, match=f"differ in {name}"):
            getattr(LAYOUT, name)
    with pytest.raises(InvalidLayout, match="differ in size"):
        LAYOUT.slice_bytes(1, 1)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "dtype"),
        ({"dtype": "float16", "layers": 1, "kv_heads": 1, "k_head_dim": 8}, "v_head_dim"),
        ({"groups": [SLIDING, FULL], "dtype": "float16"}, "dtype"),
        ({"groups": [SLIDING, FULL], "rotary": Rotary()}, "rotary"),
        ({"groups": [LayerGroup(1, 1, 8, 8, "float64"), FULL]}, "dtype"),
        ({"groups": [FULL, LayerGroup(1, 1, 8, 8, "float16", window=-1)]}, "window"),
        ({"groups": [FULL, LayerGroup(1, 1, 8, 8, "float16", window=2**31)]}, "window"),
        ({"groups": [FULL, LayerGroup(0, 1, 8, 8, "float16")]}, "layers"),
        ({"groups": [LayerGroup(4096, 1, 8, 8, "float16"), FULL]}, "layers"),
        ({"groups": [FULL, LayerGroup(1, 1, 8, 8, "float16", rotary=Rotary(dims=9))]}, "rotary"),
    ],
)
def test_a_wrong_group_is_refused_by_the_name_of_its_field(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidLayout) as refusal:
        Layout("m", **arguments)
    assert refusal.value.details == {"field": field}


def test_more_groups_than_layers_allowed_are_refused_from_the_wire() -> None:
    message = pb.Layout(model_id="m", block_tokens=1, groups=[pb.LayerGroup()] * 4097)

    with pytest.raises(InvalidLayout, match="4097 groups"):
        Layout.from_proto(message)


def test_a_layout_is_the_same_after_pickling() -> None:
    assert {LAYOUT: 1}[pickle.loads(pickle.dumps(LAYOUT))] == 1


groups = st.builds(
    LayerGroup,
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 16),
    k_head_dim=st.integers(1, 200),
    v_head_dim=st.integers(0, 200),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    window=st.sampled_from([0, 128]),
)
layouts = st.builds(
    Layout, st.just("m"), groups=st.lists(groups, min_size=1, max_size=5), block_tokens=st.integers(1, 300)
)


@st.composite
def shards(draw: st.DrawFn, layout: Layout) -> Shard:
    layer, head = draw(st.integers(0, layout.layers - 1)), draw(st.integers(0, layout.kv_heads - 1))
    return Shard(
        layer, draw(st.integers(layer + 1, layout.layers)), head, draw(st.integers(head + 1, layout.kv_heads))
    ).check(layout)


@given(st.data())
def test_slices_follow_one_another_and_large_ones_have_pages_of_their_own(data: st.DataObject) -> None:
    layout = data.draw(layouts)
    shard, tokens = data.draw(shards(layout)), data.draw(st.integers(1, layout.block_tokens))
    geometry = block_geometry(layout, shard, tokens)
    ranges = [geometry.slice_range(layer) for layer in range(shard.layers)]
    pages = [set(range(start // PAGE_BYTES, -(-end // PAGE_BYTES))) for start, end in ranges]

    assert ranges[0][0] == 0
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert ranges[-1][1] <= geometry.trailer_offset == geometry.image_bytes - Trailer.size_bytes(shard.layers)
    assert geometry.image_bytes % PAGE_BYTES == 0
    for layer, own in enumerate(pages):
        size = layout.shard_slice_bytes(shard, shard.layer_begin + layer, tokens)
        assert geometry.slice_bytes(layer) == size
        is_shared = any(own & other for number, other in enumerate(pages) if number != layer)
        assert not (is_shared and size >= 64 * 1024)
        # `shares_pages` may be true for a slice that only starts within a page.
        assert geometry.shares_pages(layer) or not is_shared
    starts = layer_starts(layout, shard, [tokens, tokens])
    assert [each[1:] for each in starts] == [[end - start, 2 * (end - start)] for start, end in ranges]


@given(st.data())
def test_ranks_together_hold_every_head_of_every_layer(data: st.DataObject) -> None:
    layout = data.draw(layouts)
    cuts = sorted({0, layout.kv_heads, *data.draw(st.lists(st.integers(0, layout.kv_heads)))})
    ranks = [Shard(0, layout.layers, begin, end) for begin, end in pairwise(cuts)]

    for layer in range(layout.layers):
        held = [range(*layout.heads_of(rank, layer)) for rank in ranks]
        assert all(held)  # An engine gives each rank a head, and replicates where there are fewer.
        assert {head for heads in held for head in heads} == set(range(layout.group_of(layer).kv_heads))


@given(st.data())
def test_head_runs_cut_the_bytes_of_just_these_heads_out_of_a_slice(data: st.DataObject) -> None:
    layout = data.draw(layouts)
    shard, tokens = data.draw(shards(layout)), data.draw(st.integers(1, min(9, layout.block_tokens)))
    geometry = block_geometry(layout, shard, tokens)
    layer = data.draw(st.integers(0, shard.layers - 1))
    each, group = geometry.slices[layer], layout.group_of(shard.layer_begin + layer)
    begin = data.draw(st.integers(each.head_begin, each.head_end - 1))
    end = data.draw(st.integers(begin + 1, each.head_end))
    k_head, v_head = (tokens * dim * DTYPE_BYTES[group.dtype] for dim in (group.k_head_dim, group.v_head_dim))

    keys, values = each.head_runs(begin, end)

    first, count = begin - each.head_begin, end - begin
    assert keys == (first * k_head, (first + count) * k_head)
    k_end = (each.head_end - each.head_begin) * k_head
    assert values == (k_end + first * v_head, k_end + (first + count) * v_head)
