"""The trailers of many blocks, read at once."""

from __future__ import annotations

import numpy as np
import pytest

from kvservice_api.image import Trailer, checksums_of_trailers
from kvservice_api.layout import Shard

SHARD = Shard(2, 5, 0, 4)


def trailers(shard: Shard = SHARD) -> list[Trailer]:
    generator = np.random.default_rng(1)
    return [
        Trailer(generator.bytes(32), shard, generator.integers(0, 2**64, shard.layers, np.uint64)) for _ in range(4)
    ]


def test_the_checksums_of_all_are_those_of_each() -> None:
    encoded = np.stack([np.frombuffer(each.encode(), np.uint8) for each in trailers()])
    sums, are_right = checksums_of_trailers(encoded, SHARD)
    assert are_right.all()
    assert (sums == np.stack([each.checksums for each in trailers()])).all()


@pytest.mark.parametrize("at", [0, 4, 6, 40, 47])
def test_one_with_another_head_is_no_trailer_of_the_shard(at: int) -> None:
    encoded = np.stack([np.frombuffer(each.encode(), np.uint8) for each in trailers()])
    encoded[2, at] ^= 1
    _, are_right = checksums_of_trailers(encoded, SHARD)
    assert are_right.tolist() == [True, True, False, True]


def test_those_of_another_shard_with_as_many_layers_are_not_of_this_one() -> None:
    encoded = np.stack([np.frombuffer(each.encode(), np.uint8) for each in trailers(Shard(3, 6, 0, 4))])
    assert not checksums_of_trailers(encoded, SHARD)[1].any()
