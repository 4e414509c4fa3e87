"""The order in which the pieces of promotions are read."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

from kvservice.store.image_check import ImagePiece
from kvservice.store.mover.pending_promotion import PendingPromotion
from kvservice.store.mover.read_order import ReadOrder

KIB = 1024
PIECES = (ImagePiece(0, 1, 0, 64 * KIB), ImagePiece(1, 2, 64 * KIB, 320 * KIB))


def promotions(count: int, *, due_s: float = 1.0) -> list[PendingPromotion]:
    """What `ReadOrder` uses of so many promotions of two pieces."""
    some = [SimpleNamespace(due_s=due_s, pieces=PIECES, next_piece=0, order=None) for _ in range(count)]
    return cast("list[PendingPromotion]", some)


def order_of(*some: list[PendingPromotion], job_bytes: int = 1024 * KIB, jobs_at_once: int = 8) -> ReadOrder:
    order = ReadOrder(job_bytes=job_bytes, jobs_at_once=jobs_at_once)
    for each in some:
        order.add(each)
    return order


def jobs(order: ReadOrder) -> Iterator[list[tuple[PendingPromotion, ImagePiece]]]:
    while job := order.next():
        yield job


def test_the_first_pieces_of_all_blocks_come_before_the_second_ones() -> None:
    some = promotions(3)

    assert list(jobs(order_of(some))) == [[(each, piece) for each in some] for piece in PIECES]


def test_blocks_that_are_added_later_have_their_first_pieces_read_before_the_second_ones_of_others() -> None:
    """A load reserves space for its blocks in several steps, and reads begin after the first one."""
    some, more = promotions(2), promotions(2)
    order = order_of(some, job_bytes=64 * KIB)
    assert order.next() == [(some[0], PIECES[0])]

    order.add(more)

    found = [pending for job in jobs(order) for pending, piece in job if piece is PIECES[0]]
    assert found == [some[1], *more]
    assert order.priority is None


def test_the_blocks_of_a_load_are_read_before_those_of_a_later_one_also_their_last_layers() -> None:
    soon, later = promotions(2), promotions(2, due_s=2.0)

    found = [pending for job in jobs(order_of(later, soon)) for pending, _ in job]

    assert found == [*soon, *soon, *later, *later]


def test_small_pieces_share_jobs_of_a_mib() -> None:
    order = order_of(promotions(40), promotions(1000, due_s=600.0))

    sizes = [len(job) for job in jobs(order) if job[0][1] is PIECES[0]]

    assert sizes[:3] == [16, 16, 8]


def test_larger_jobs_become_smaller_towards_the_end_of_a_layer() -> None:
    order = order_of(promotions(100), job_bytes=4096 * KIB)

    sizes = [len(job) for job in jobs(order) if job[0][1] is PIECES[1]]

    assert sizes[:6] == [12, 11, 9, 8, 7, 6]
    assert set(sizes[9:-1]) == {4}, "1 MiB"


def test_a_job_of_several_pieces_has_no_more_bytes_than_it_may_have() -> None:
    order = order_of(promotions(100))

    second = [job for job in jobs(order) if job[0][1] is PIECES[1]]

    assert len(second[0]) == 4, "1 MiB"


def test_a_job_has_few_pieces_because_each_takes_time_of_the_interpreter() -> None:
    order = order_of(promotions(1000), job_bytes=1 << 30, jobs_at_once=1)

    assert max(len(job) for job in jobs(order)) == 16


def test_a_block_that_becomes_urgent_is_read_before_those_with_which_it_began() -> None:
    some = promotions(5)
    order = order_of(some, job_bytes=64 * KIB)
    assert order.next() == [(some[0], PIECES[0])]

    order.hurry([some[3]], 0.0)

    assert order.priority == 0.0
    assert [order.next(), order.next()] == [[(some[3], piece)] for piece in PIECES]
    assert order.next() == [(some[1], PIECES[0])]
    assert sum(len(job) for job in jobs(order)) == 6, "no piece is read twice"


def test_a_block_whose_pieces_are_all_being_read_cannot_become_more_urgent() -> None:
    [only] = promotions(1)
    order = order_of([only])
    assert len(list(jobs(order))) == 2

    order.hurry([only], 0.0)

    assert order.priority is None
