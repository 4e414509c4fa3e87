"""Which blocks with correct bytes a rebuild keeps."""

from kvservice.blocks import Extent, object_key
from kvservice.store.repair.rebuild import _Block, _one_of_each_key, _without_doubtful, _without_overlaps
from kvservice_api.layout import Shard

_PAGE = 4096


def _block(
    name: bytes, first: int, pages: int, stored_at_ms: int = 1, checksum: int = 1, *, is_tagged: bool = True
) -> _Block:
    return _Block(name, Extent(0, first * _PAGE, pages * _PAGE), 1, 4, checksum, bytes(32), stored_at_ms, is_tagged)


def test_a_block_inside_another_is_not_kept_with_any_time_in_its_descriptor() -> None:
    outer, planted = _block(b"outer", 0, 8), _block(b"victim", 1, 2, stored_at_ms=2**62)
    assert _without_overlaps([planted, outer]) == [outer]


def test_a_block_that_ends_inside_another_is_not_kept_and_costs_no_neighbour() -> None:
    before, outer = _block(b"before", 0, 4), _block(b"outer", 4, 8)
    planted = _block(b"victim", 2, 4, stored_at_ms=2**62)
    assert sorted(_without_overlaps([planted, before, outer])) == sorted([before, outer])


def test_copies_of_a_key_that_differ_are_all_left_out() -> None:
    own, other, sound = _block(b"key", 0, 2), _block(b"key", 4, 2, 2**62, checksum=2), _block(b"sound", 8, 2)
    assert _one_of_each_key([own, other, sound]) == ([sound], 2)


def test_of_copies_that_are_alike_one_is_kept() -> None:
    kept, differing = _one_of_each_key([_block(b"key", 0, 2), _block(b"key", 4, 2)])
    assert (len(kept), differing) == (1, 0)


def _of_shard(heads: tuple[int, int], first: int, *, is_tagged: bool) -> _Block:
    shard = Shard(0, 2, *heads)
    return _block(object_key(b"k" * 32, shard), first, 2, checksum=first, is_tagged=is_tagged)


def test_what_this_store_did_not_tag_is_dropped_beside_what_it_did_of_the_same_layers_and_heads() -> None:
    own = _of_shard((0, 4), 0, is_tagged=True)
    same, part, more = (_of_shard(heads, 4, is_tagged=False) for heads in ((0, 4), (3, 4), (2, 6)))
    assert _without_doubtful([same, part, own, more]) == [own]
    beside = _of_shard((4, 8), 4, is_tagged=False)
    assert _without_doubtful([beside, own]) == [beside, own]
    assert _without_doubtful([same, part]) == [same, part]
