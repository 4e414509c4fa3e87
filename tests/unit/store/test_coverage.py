"""Which stored shards give a requested one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvservice.store.transfers.coverage import HeadRun, cover
from kvservice_api.layout import Shard

LAYERS, HEADS = 4, 5


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    layer_begin, head_begin = draw(st.integers(0, LAYERS - 1)), draw(st.integers(0, HEADS - 1))
    layer_end, head_end = draw(st.integers(layer_begin + 1, LAYERS)), draw(st.integers(head_begin + 1, HEADS))
    return Shard(layer_begin, layer_end, head_begin, head_end)


def cells(shard: Shard) -> set[tuple[int, int]]:
    layers, heads = range(shard.layer_begin, shard.layer_end), range(shard.head_begin, shard.head_end)
    return {(layer, head) for layer in layers for head in heads}


def test_one_shard_with_everything_gives_one_run_per_layer() -> None:
    assert cover([Shard(0, 4, 0, 4)], Shard(1, 3, 1, 3)) == [[HeadRun(0, 1, 3)]] * 2


def test_ranks_that_each_hold_some_heads_follow_one_another() -> None:
    assert (
        cover([Shard(0, 2, 2, 4), Shard(0, 2, 0, 2)], Shard(0, 2, 0, 4)) == [[HeadRun(1, 0, 2), HeadRun(0, 2, 4)]] * 2
    )


def test_ranks_that_each_hold_some_layers_give_each_layer_its_own_source() -> None:
    assert cover([Shard(0, 1, 0, 2), Shard(1, 2, 0, 2)], Shard(0, 2, 0, 2)) == [[HeadRun(0, 0, 2)], [HeadRun(1, 0, 2)]]


def test_one_missing_head_in_one_layer_is_a_miss() -> None:
    assert cover([Shard(0, 2, 0, 3), Shard(0, 1, 3, 4)], Shard(0, 2, 0, 4)) is None
    assert cover([], Shard(0, 1, 0, 1)) is None


@given(st.lists(shards(), max_size=5), shards())
def test_a_cover_exists_where_every_cell_is_stored_and_names_each_cell_once(stored: list[Shard], wanted: Shard) -> None:
    plan = cover(stored, wanted)
    there = set().union(*map(cells, stored))
    assert (plan is not None) == (cells(wanted) <= there)
    for layer, runs in enumerate(plan or [], wanted.layer_begin):
        heads = [head for run in runs for head in range(run.begin, run.end)]
        assert heads == list(range(wanted.head_begin, wanted.head_end)), "in order, none twice"
        for run in runs:
            assert {(layer, head) for head in range(run.begin, run.end)} <= cells(stored[run.source])
