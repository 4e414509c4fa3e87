"""What a policy has learned survives the end of its process, in one small file."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvservice.policy.lru import LruPolicy
from kvservice.store.mover.learned_counts import LearnedCounts, packed, unpacked
from tests.clock import HandClock
from tests.stores import CALLER, LAYOUT, StoreFiles, some_chain, some_images, until

# Never changes: disks have it.
GOLDEN = bytes.fromhex("4b564c4541524e4401000000010000000500000003000000") + b"learn" + bytes((1, 2, 3))
GOLDEN += hashlib.sha256(GOLDEN).digest()


class Learner(LruPolicy):
    """Counts what was stored."""

    name: ClassVar[str] = "learner"

    def __init__(self) -> None:
        self.count = 0

    def stored(self, *of: Any) -> None:
        self.count += 1

    def state(self) -> bytes:
        return struct.pack("<Q", self.count)

    def restore(self, state: bytes) -> bool:
        if len(state) != 8:
            return False
        (self.count,) = struct.unpack("<Q", state)
        return True


def test_the_file_is_the_golden_one() -> None:
    assert packed({"learn": bytes((1, 2, 3))}) == GOLDEN
    assert unpacked(GOLDEN) == {"learn": bytes((1, 2, 3))}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not a file of this kind"),
        (b"something else, " * 10, "not a file of this kind"),
        (GOLDEN[:-1], "damaged"),
        (GOLDEN[:20] + b"\x01" + GOLDEN[21:], "damaged"),
        (GOLDEN[:8] + b"\x02" + GOLDEN[9:], "newer version 2"),
    ],
)
def test_a_damaged_foreign_or_newer_file_is_ignored_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes, why: str
) -> None:
    path = tmp_path / "learned"
    path.write_bytes(data)
    learned = LearnedCounts(path)
    assert [why in record.getMessage() for record in caplog.records] == [True]
    assert learned.of("learn") == b""
    new = learned.keep("learn", b"4")
    assert new is not None
    learned.write(new)
    assert LearnedCounts(path).of("learn") == b"4"


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    for place in range(len(GOLDEN)):
        with pytest.raises(ValueError, match=r"damaged|kind|newer"):
            unpacked(GOLDEN[:place] + bytes([GOLDEN[place] ^ 0x10]) + GOLDEN[place + 1 :])


def test_states_of_other_policies_stay(tmp_path: Path) -> None:
    learned = LearnedCounts(tmp_path / "learned")
    for name in ("one", "other"):
        data = learned.keep(name, name.encode())
        assert data is not None
        learned.write(data)
    assert learned.keep("one", b"one") is None, "nothing new, nothing to write"
    again = LearnedCounts(tmp_path / "learned")
    assert (again.of("one"), again.of("other")) == (b"one", b"other")


async def test_counts_survive_a_kill_and_a_stop(store_files: Callable[..., StoreFiles], tmp_path: Path) -> None:
    clock, path = HandClock(), tmp_path / "learned"
    files = store_files(clock=clock, policy=Learner(), learned=path)
    opened = files.open()
    await opened.store.layouts.open(CALLER, LAYOUT)
    client = opened.store.leases.attach(CALLER, "engine")
    chain = some_chain(2)
    await opened.save(client, chain, some_images(chain), on_ssd=True)
    assert not path.exists()
    clock.advance(seconds=300)
    await until(path.exists)
    written = unpacked(path.read_bytes())
    assert written["learner"] == struct.pack("<Q", 1)
    await opened.kill()

    files.policy = second = Learner()
    opened = files.open()
    assert second.count >= 1, "it began with what the killed process had written"
    ranking = opened.store._policy.items
    assert ranking is not None
    await until(lambda: second.count > 1)  # It has heard of the stored blocks, too.
    await opened.close()
    assert unpacked(path.read_bytes())["learner"] == struct.pack("<Q", second.count)


async def test_what_an_other_version_has_learned_is_not_used(
    store_files: Callable[..., StoreFiles], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "learned"
    path.write_bytes(packed({"learner": b"of another length"}))
    policy = Learner()
    with caplog.at_level(logging.WARNING):
        opened = store_files(policy=policy, learned=path).open()
    await opened.close()
    assert sum("another version" in record.getMessage() for record in caplog.records) == 1


async def test_a_policy_that_returns_begins_with_what_it_knew(open_store: Callable[..., Any]) -> None:
    opened = await open_store(policy=Learner())
    client, chain, policy = opened.store.leases.attach(CALLER, "engine"), some_chain(2), opened.store._policy
    await opened.save(client, chain, some_images(chain))
    await policy.switch(None)
    back = Learner()
    await policy.switch(back)
    assert back.count >= 1
