from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.simulate.traces.prefix import Contradiction, Segments, segments

Chains = list[list[int]]


@st.composite
def chains(draw: st.DrawFn) -> Chains:
    """Paths from the root of a tree of blocks; ids do not depend on the place in the tree."""
    parents = draw(st.lists(st.integers(-1, 30), min_size=1, max_size=30))
    names = draw(st.permutations(range(len(parents))))
    paths: dict[int, list[int]] = {-1: []}
    for block, parent in enumerate(parents):
        # A low parent gives many branches; the previous block as parent gives a long run.
        paths[block] = [*paths[parent if parent < block else block - 1], names[block]]
    ends = draw(st.lists(st.integers(0, len(parents) - 1), min_size=1, max_size=12))
    return [paths[end] for end in ends]


def segmented(paths: Chains) -> Segments:
    begins = np.cumsum([0, *map(len, paths)])
    return segments(begins, np.array([block for path in paths for block in path], np.int64))


def cut_naively(paths: Chains) -> list[list[tuple[int, ...]]]:
    """Each chain as runs: a block continues the run before it if the same requests have both."""
    users = {block: {n for n, path in enumerate(paths) if block in path} for path in paths for block in path}
    cut: list[list[tuple[int, ...]]] = []
    for path in paths:
        runs: list[list[int]] = []
        for before, block in pairwise([None, *path]):
            assert block is not None
            if before is not None and users[before] == users[block]:
                runs[-1].append(block)
            else:
                runs.append([block])
        cut.append([tuple(run) for run in runs])
    return cut


@given(chains())
def test_an_item_is_a_longest_run_of_blocks_that_the_same_requests_use(paths: Chains) -> None:
    begins, items, lengths = segmented(paths)

    number: dict[tuple[int, ...], int] = {}
    expected = [[number.setdefault(run, len(number)) for run in runs] for runs in cut_naively(paths)]
    assert [items[begin:end].tolist() for begin, end in pairwise(begins)] == expected
    assert lengths.tolist() == [len(run) for run in number]


@given(chains(), st.data())
def test_an_id_with_two_prefixes_is_a_contradiction(paths: Chains, data: st.DataObject) -> None:
    wrong = data.draw(st.sampled_from(paths))
    block = data.draw(st.sampled_from(wrong))

    with pytest.raises(Contradiction) as caught:
        segmented([*paths, [1000, *wrong]])
    assert (caught.value.second, caught.value.hash_id) == (len(paths), wrong[0])
    with pytest.raises(Contradiction) as caught:
        segmented([*paths, [*wrong, block]])
    assert (caught.value.second, caught.value.hash_id) == (len(paths), block)
