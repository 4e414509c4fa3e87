"""The order in which a promotion's pieces are read."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from kvservice.blocks import TierName
from kvservice.store.image_check import ImagePiece
from kvservice.store.mover.promoter import PendingPromotion
from kvservice.store.mover.read_order import ReadOrder

KIB = 1024
PIECES = (ImagePiece(0, 1, 0, 64 * KIB), ImagePiece(1, 2, 64 * KIB, 320 * KIB))


def promotions(count: int, *, due_s: float = 1.0, tier: TierName = TierName.SSD) -> list[PendingPromotion]:
    """What `ReadOrder` looks at of so many promotions of two pieces."""
    some = [SimpleNamespace(due_s=due_s, tier=tier, pieces=PIECES) for _ in range(count)]
    return cast("list[PendingPromotion]", some)


def jobs(order: ReadOrder) -> Iterator[list[tuple[PendingPromotion, ImagePiece]]]:
    while job := order.next():
        yield job


def test_the_first_pieces_of_all_blocks_come_before_the_second_ones() -> None:
    some = promotions(3)

    order = ReadOrder(some, job_bytes=1024 * KIB, jobs_at_once=8)

    assert list(jobs(order)) == [[(each, piece)] for piece in PIECES for each in some]


def test_small_pieces_share_a_job_and_the_jobs_that_run_share_a_layer() -> None:
    order = ReadOrder(promotions(40), job_bytes=1024 * KIB, jobs_at_once=8)

    assert [len(job) for job in jobs(order)] == [5] * 8 + [4] * 10, "1 MiB is four of the second pieces"


@pytest.mark.parametrize("tier", [TierName.SSD, TierName("slow")])
def test_a_job_reads_one_tier(tier: TierName) -> None:
    order = ReadOrder([*promotions(6), *promotions(6, tier=tier)], job_bytes=1 << 30, jobs_at_once=1)

    assert [len(job) for job in jobs(order)] == ([12, 12] if tier == TierName.SSD else [6, 6, 6, 6])


def test_a_job_has_few_pieces_because_each_takes_time_of_the_event_loop() -> None:
    order = ReadOrder(promotions(1000), job_bytes=1 << 30, jobs_at_once=1)

    assert max(len(job) for job in jobs(order)) == 16


def test_a_block_that_becomes_urgent_is_read_before_those_with_which_it_began() -> None:
    some = promotions(5)
    order = ReadOrder(some, job_bytes=1024 * KIB, jobs_at_once=8)
    assert order.next() == [(some[0], PIECES[0])]

    some[3].due_s = 0.0
    order.reorder()

    assert [order.next(), order.next()] == [[(some[3], piece)] for piece in PIECES]
    assert order.next() == [(some[1], PIECES[0])]
