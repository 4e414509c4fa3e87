"""The file of key generations."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvservice.index.key_generations import KEY_GENERATIONS_NAME, KeyGenerations


async def test_generations_that_begin_at_the_same_time_differ_and_the_last_one_stays(tmp_path: Path) -> None:
    generations = KeyGenerations.open(tmp_path, had_file=False)
    begun = await asyncio.gather(*(generations.begin(0, bytes(32)) for _ in range(20)))
    assert len({0, *begun}) == 21
    assert KeyGenerations.open(tmp_path, had_file=True).of(0, bytes(32)) == generations.of(0, bytes(32)) == begun[-1]


async def test_tenants_have_generations_of_their_own(tmp_path: Path) -> None:
    generations = KeyGenerations.open(tmp_path, had_file=False)
    begun = await generations.begin(1, bytes(32))
    assert (generations.of(0, bytes(32)), generations.of(1, bytes(32))) == (0, begun)


async def test_the_file_is_bounded_and_what_it_forgets_gets_a_new_generation(tmp_path: Path) -> None:
    generations = KeyGenerations.open(tmp_path, had_file=False)
    used = {await generations.begin(0, number.to_bytes(32)) for number in range(1024)}
    largest = (tmp_path / KEY_GENERATIONS_NAME).stat().st_size
    last = await generations.begin(0, b"x" * 32)
    now = {generations.of(0, number.to_bytes(32)) for number in range(1024)}
    assert (tmp_path / KEY_GENERATIONS_NAME).stat().st_size < largest
    assert len(now) == 1 and not now & {0, last, *used}
