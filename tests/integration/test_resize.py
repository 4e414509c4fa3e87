"""A start with other sizes or drives: tiers grow, shrink and move, and keep what fits, also if it is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvservice.tiers.extents import extent_size
from kvservice.tiers.ssd_files import read_header
from kvservice_api.image import block_geometry
from kvservice_api.layout import Shard
from kvservice_client import BlockChain, Client, Durability
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.by_hand import InPlaceWriter
from tests.integration.known_blocks import LARGE, SMALL, compare, new_chain, save, verify
from tests.integration.test_third_tier import counts
from tests.integration.wire import Wire
from tests.killed_starts import deaths
from tests.mounts import fill, read_only, tmpfs

BLOCK = extent_size(block_geometry(LARGE, Shard.whole(LARGE), LARGE.block_tokens).image_bytes)
BLOCKS = 12
SMALL_BLOCK = extent_size(block_geometry(SMALL, Shard.whole(SMALL), SMALL.block_tokens).image_bytes)

NewDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def new_daemon(tmp_path: Path) -> Iterator[NewDaemon]:
    made: list[DaemonProcess] = []

    def make(**settings: Any) -> DaemonProcess:
        daemon = DaemonProcess(tmp_path, program=("-m", "tests.dying_daemon"), **settings)
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.remove()


def start(daemon: DaemonProcess, **settings: Any) -> None:
    daemon.settings |= {name.replace("__", "."): value for name, value in settings.items()}
    daemon.start(environment={"TEST_DIES_AT": "-1"})


def restart(daemon: DaemonProcess, **settings: Any) -> None:
    assert daemon.stop() == 0
    start(daemon, **settings)


def refuses(daemon: DaemonProcess, *, code: int = 1) -> str:
    """The daemon ends by itself, with this exit code. Returns its log."""
    daemon.launch(environment={"TEST_DIES_AT": "-1"})
    assert daemon.wait_for_end() == code
    assert "Traceback" not in "".join(daemon.lines)
    return "".join(daemon.lines)


def start_killed_often(daemon: DaemonProcess, *, step: int, **settings: Any) -> int:
    """Start with these settings, each time with a kill a little later, until the daemon serves. Returns the kills."""
    daemon.settings |= {name.replace("__", "."): value for name, value in settings.items()}
    died = deaths(daemon, first=1, step=step)
    start(daemon)
    return died


def filled(daemon: DaemonProcess, durability: Durability = Durability.SSD, blocks: int = BLOCKS) -> list[BlockChain]:
    """Chains of one block each, in the order of their saves: the first is the oldest."""
    chains = [new_chain(LARGE) for _ in range(blocks)]
    with daemon.client() as client:
        for chain in chains:
            assert save(client, LARGE, chain, durability).is_complete
    return chains


def stored(client: Client, chains: Sequence[BlockChain]) -> list[int]:
    """The numbers of the chains that are stored. Every byte of them is compared."""
    found = []
    for number, chain in enumerate(chains):
        with client.open_layout(LARGE).lookup(chain) as lease:
            if lease.hit_blocks:
                compare(lease, LARGE, chain)
                found.append(number)
    return found


def on_ssd_alone(daemon: DaemonProcess, chains: Sequence[BlockChain]) -> list[int]:
    """The numbers of the chains whose copy on SSD is right. Drops the copies in DRAM."""
    with daemon.client() as client:
        client.evict([key for chain in chains for key in chain], tier="dram")
        return stored(client, chains)


def drives_in(tmp_path: Path, *names: str) -> str:
    for name in names:
        (tmp_path / name).mkdir(exist_ok=True)
    return os.pathsep.join(str(tmp_path / name) for name in names)


def ssd_bytes(blocks: int) -> int:
    """`ssd.capacity_bytes` with space for so many blocks, beside the index of 4 MiB and the headers of two files."""
    return 4 * MIB + 8192 + blocks * BLOCK


class TestTheSsdTier:
    @pytest.mark.parametrize("kill_every", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_grows_and_keeps_every_block(self, new_daemon: NewDaemon, kill_every: int) -> None:
        daemon = new_daemon(ssd__capacity_bytes=ssd_bytes(16), mover__ssd_free_low=0, mover__ssd_free_high=0)
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        if kill_every:
            size = ssd_bytes(32)
            assert start_killed_often(daemon, step=kill_every, ssd__capacity_bytes=size) >= 10 // kill_every
        else:
            start(daemon, ssd__capacity_bytes=ssd_bytes(32))
        assert (daemon.store / "ssd-000.kv").stat().st_size > 32 * BLOCK
        more = filled(daemon, blocks=16)
        assert on_ssd_alone(daemon, chains + more) == list(range(BLOCKS + 16))
        assert daemon.stop() == 0
        assert daemon.check().returncode == 0

    def test_that_is_killed_while_it_grows_keeps_every_block_and_takes_either_size(
        self, new_daemon: NewDaemon, tmp_path: Path
    ) -> None:
        before, after = ssd_bytes(BLOCKS), ssd_bytes(2 * BLOCKS)
        daemon = new_daemon(ssd__capacity_bytes=before, mover__ssd_free_low=0, mover__ssd_free_high=0)
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        file, faults = daemon.store / "ssd-000.kv", tmp_path / "faults"
        header, size = read_header(file), file.stat().st_size
        faults.mkdir()
        (faults / "fdatasync").write_text("HOLD")
        for next_size in (before, after):
            daemon.program = ("-m", "tests.faulty_daemon")
            daemon.settings["ssd.capacity_bytes"] = after
            daemon.launch(environment={"TEST_FAULTS": str(faults)})
            until(lambda: file.stat().st_size > size)
            daemon.kill()
            assert read_header(file) == header  # Of the old size: the file is allocated first.
            daemon.program = ("-m", "tests.dying_daemon")
            start(daemon, ssd__capacity_bytes=next_size)
            assert (file.stat().st_size > size) == (next_size == after)
            assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))
            assert daemon.stop() == 0
            assert daemon.check().returncode == 0

    @pytest.mark.parametrize("kill_every", [0, 9, pytest.param(1, marks=pytest.mark.slow)])
    def test_shrinks_and_keeps_the_blocks_that_were_used_last(self, new_daemon: NewDaemon, kill_every: int) -> None:
        daemon = new_daemon(ssd__capacity_bytes=ssd_bytes(BLOCKS), mover__ssd_free_low=0, mover__ssd_free_high=0)
        start(daemon)
        chains = filled(daemon)
        with daemon.client() as client:
            used = stored(client, chains[:3])  # The oldest ones are the last that were used.
            client.evict([key for chain in chains for key in chain], tier="dram")
        assert daemon.stop() == 0
        size = ssd_bytes(8)
        if kill_every:
            assert start_killed_often(daemon, step=kill_every, ssd__capacity_bytes=size) >= 10 // kill_every
        else:
            start(daemon, ssd__capacity_bytes=size)
        assert (daemon.store / "ssd-000.kv").stat().st_size <= size - 4 * MIB
        found = on_ssd_alone(daemon, chains)
        assert found == sorted([*used, *range(BLOCKS - 5, BLOCKS)])
        assert daemon.stop() == 0
        assert daemon.check().returncode == 0

    def test_that_cannot_grow_for_lack_of_space_is_left_as_it_is(self, new_daemon: NewDaemon) -> None:
        daemon = new_daemon(ssd__capacity_bytes=ssd_bytes(16))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        daemon.settings["ssd.capacity_bytes"] = "100TiB"
        assert "ssd.capacity_bytes: the SSD tier needs 102399." in refuses(daemon)
        start(daemon, ssd__capacity_bytes=ssd_bytes(16))
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))

    def test_keeps_a_pinned_block_also_where_the_free_space_is_in_small_pieces(self, new_daemon: NewDaemon) -> None:
        daemon = new_daemon(ssd__capacity_bytes=16 * MIB, mover__ssd_free_low=0, mover__ssd_free_high=0)
        start(daemon)
        small, large = [new_chain(SMALL) for _ in range(100)], new_chain(LARGE)
        with daemon.client() as client:
            for chain in (*small, large):
                layout = LARGE if chain is large else SMALL
                assert save(client, layout, chain, Durability.SSD).is_complete
            client.admin.pin(large.keys, 3600)
            client.admin.discard([key for chain in small[::2] for key in chain])
            client.evict([key for chain in (*small, large) for key in chain], tier="dram")
        restart(daemon, ssd__capacity_bytes=4 * MIB + 4096 + 100 * SMALL_BLOCK)
        with daemon.client() as client:
            verify(client, LARGE, large)
            assert sum(client.open_layout(SMALL).contains(chain) for chain in small) > 0

    def test_cannot_be_switched_off_while_it_has_blocks(self, new_daemon: NewDaemon) -> None:
        """Otherwise blocks that are discarded meanwhile would be found again once the tier is back."""
        daemon = new_daemon(ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        daemon.settings["ssd.capacity_bytes"] = 0
        assert f"ssd.capacity_bytes is 0, and {BLOCKS} blocks are on SSD in {daemon.store}" in refuses(daemon)
        start(daemon, ssd__drained_paths=daemon.store)
        assert not list(daemon.store.glob("ssd-*.kv"))
        with daemon.client() as client:
            client.evict([key for chain in chains for key in chain], tier="dram")
        restart(daemon, ssd__capacity_bytes=ssd_bytes(20), ssd__drained_paths="")
        with daemon.client() as client:
            assert stored(client, chains) == []

    def test_whose_shrinking_was_interrupted_may_have_its_old_size_again(self, new_daemon: NewDaemon) -> None:
        before = ssd_bytes(BLOCKS)
        daemon = new_daemon(ssd__capacity_bytes=before, mover__ssd_free_low=0, mover__ssd_free_high=0)
        start(daemon)
        chains = filled(daemon)
        for event in (40, 60, 80):
            assert daemon.stop() == 0
            daemon.settings["ssd.capacity_bytes"] = ssd_bytes(8)
            daemon.launch(environment={"TEST_DIES_AT": str(event)})
            if daemon.serves():
                break
            daemon.wait_for_end()
            start(daemon, ssd__capacity_bytes=before)
            assert set(on_ssd_alone(daemon, chains)) >= set(range(BLOCKS - 8, BLOCKS))


class TestADrive:
    def test_is_added_and_takes_blocks(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one"), ssd__capacity_bytes=ssd_bytes(16))
        start(daemon)
        chains = filled(daemon)
        restart(daemon, ssd__paths=drives_in(tmp_path, "one", "two"), ssd__capacity_bytes=ssd_bytes(40))
        more = filled(daemon, blocks=8)
        assert (tmp_path / "two" / "ssd-001.kv").exists()
        assert on_ssd_alone(daemon, chains + more) == list(range(BLOCKS + 8))

    @pytest.mark.parametrize("kill_every", [0, 9, pytest.param(1, marks=pytest.mark.slow)])
    def test_is_replaced_by_another(self, new_daemon: NewDaemon, tmp_path: Path, kill_every: int) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one", "two"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        settings = {"ssd__paths": drives_in(tmp_path, "two", "three"), "ssd__drained_paths": tmp_path / "one"}
        if kill_every:
            assert start_killed_often(daemon, step=kill_every, **settings) >= 10 // kill_every
        else:
            start(daemon, **settings)
        assert not list((tmp_path / "one").iterdir())
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))
        restart(daemon)  # The setting may stay.
        restart(daemon, ssd__drained_paths="")
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))
        assert daemon.stop() == 0
        assert daemon.check().returncode == 0
        assert {path.name for path in tmp_path.glob("*/ssd-*.kv")} >= {"ssd-001.kv"}

    def test_that_is_drained_without_space_elsewhere_costs_the_blocks_that_were_not_used_for_longest(
        self, new_daemon: NewDaemon, tmp_path: Path
    ) -> None:
        daemon = new_daemon(
            ssd__paths=drives_in(tmp_path, "one", "two"), ssd__capacity_bytes=ssd_bytes(BLOCKS),
            mover__ssd_free_low=0, mover__ssd_free_high=0,
        )  # fmt: skip
        start(daemon)
        chains = filled(daemon)
        with daemon.client() as client:
            client.evict([key for chain in chains for key in chain], tier="dram")
        restart(
            daemon,
            ssd__paths=drives_in(tmp_path, "two"),
            ssd__drained_paths=tmp_path / "one",
            ssd__capacity_bytes=ssd_bytes(6),
        )
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS - 6, BLOCKS))

    def test_that_the_settings_do_not_name_any_more_is_asked_for_while_it_has_blocks(
        self, new_daemon: NewDaemon, tmp_path: Path
    ) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one", "two"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        daemon.settings["ssd.paths"] = drives_in(tmp_path, "two")
        message = refuses(daemon)
        assert f"{tmp_path / 'one' / 'ssd-000.kv'} has " in message
        assert "ssd.drained_paths" in message
        start(daemon, ssd__paths=drives_in(tmp_path, "two", "one"))  # In another order.
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))

    def test_may_be_mounted_elsewhere(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one", "two"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        (tmp_path / "one").rename(tmp_path / "moved")
        start(daemon, ssd__paths=drives_in(tmp_path, "two", "moved"))
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))

    def test_without_blocks_leaves_once_no_setting_names_it(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        daemon = new_daemon(ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        restart(daemon, ssd__paths=drives_in(tmp_path, "one"))
        assert not list(daemon.store.glob("ssd-*.kv"))
        chains = filled(daemon)
        restart(daemon)
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))

    def test_swapped_with_another_is_recognized(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one", "two"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        for name, other in (("one", "aside"), ("two", "one"), ("aside", "two")):
            (tmp_path / name).rename(tmp_path / other)
        start(daemon)
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))

    def test_whose_new_folder_is_missing_is_refused_and_not_made(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        assert daemon.stop() == 0
        daemon.settings["ssd.paths"] = f"{tmp_path / 'one'}:{tmp_path / 'mnt' / 'nvme1'}"
        assert f"ssd.paths: there is no folder {tmp_path / 'mnt' / 'nvme1'}" in refuses(daemon)
        assert not (tmp_path / "mnt").exists()

    def test_whose_addition_was_killed_and_taken_back_leaves_nothing(
        self, new_daemon: NewDaemon, tmp_path: Path
    ) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        file = tmp_path / "two" / "ssd-001.kv"
        seen = set()
        for event in range(20, 90, 7):
            daemon.settings |= {"ssd.paths": drives_in(tmp_path, "one", "two"), "ssd.capacity_bytes": ssd_bytes(40)}
            daemon.launch(environment={"TEST_DIES_AT": str(event)})
            if daemon.serves():
                daemon.kill()
                break
            daemon.wait_for_end()
            seen |= {path.name for path in (tmp_path / "two").iterdir()}
            start(daemon, ssd__paths=drives_in(tmp_path, "one"), ssd__capacity_bytes=ssd_bytes(20))
            assert not list((tmp_path / "two").iterdir())
            assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))
            daemon.kill()
        assert file.name in seen

    @pytest.mark.parametrize("kill_every", [9, pytest.param(1, marks=pytest.mark.slow)])
    def test_whose_drain_was_killed_may_be_taken_back(
        self, new_daemon: NewDaemon, tmp_path: Path, kill_every: int
    ) -> None:
        both = drives_in(tmp_path, "one", "two")
        daemon = new_daemon(ssd__paths=both, ssd__capacity_bytes=ssd_bytes(40))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        for event in range(20, 200, kill_every):
            daemon.settings |= {"ssd.paths": tmp_path / "one", "ssd.drained_paths": tmp_path / "two"}
            daemon.launch(environment={"TEST_DIES_AT": str(event)})
            if daemon.serves():
                daemon.kill()
                break
            daemon.wait_for_end()
            start(daemon, ssd__paths=both, ssd__drained_paths="")
            daemon.kill()
        start(daemon, ssd__paths=both, ssd__drained_paths="")
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))

    def test_that_is_away_after_a_drain_was_interrupted_is_not_made_again(
        self, new_daemon: NewDaemon, tmp_path: Path
    ) -> None:
        both = drives_in(tmp_path, "one", "two")
        daemon = new_daemon(ssd__paths=both, ssd__capacity_bytes=ssd_bytes(40))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        faults = tmp_path / "faults"
        faults.mkdir()
        (faults / "pwritev").write_text("EIO")
        daemon.program = ("-m", "tests.faulty_daemon")
        daemon.settings |= {"ssd.paths": tmp_path / "one", "ssd.drained_paths": tmp_path / "two"}
        daemon.launch(environment={"TEST_FAULTS": str(faults)})
        assert daemon.wait_for_end() == 1
        (tmp_path / "two").rename(tmp_path / "unmounted")
        (tmp_path / "two").mkdir()
        daemon.program = ("-m", "tests.dying_daemon")
        daemon.settings |= {"ssd.paths": both, "ssd.drained_paths": ""}
        assert f"{tmp_path / 'two' / 'ssd-001.kv'} is missing, and the store has blocks in it" in refuses(daemon)
        (tmp_path / "two").rmdir()
        (tmp_path / "unmounted").rename(tmp_path / "two")
        start(daemon)
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))

    @pytest.mark.parametrize("fault", ["pwritev", "fdatasync", "preadv"])
    def test_whose_replacement_fails_keeps_its_blocks(self, new_daemon: NewDaemon, tmp_path: Path, fault: str) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        faults = tmp_path / "faults"
        faults.mkdir()
        daemon.program = ("-m", "tests.faulty_daemon")
        daemon.settings |= {"ssd.paths": drives_in(tmp_path, "two"), "ssd.drained_paths": tmp_path / "one"}
        (faults / fault).write_text("EIO")
        daemon.launch(environment={"TEST_FAULTS": str(faults)})
        assert daemon.wait_for_end() == 1
        assert "Traceback" not in "".join(daemon.lines)
        assert (tmp_path / "one" / "ssd-000.kv").exists()
        (faults / fault).unlink()
        daemon.start(environment={"TEST_FAULTS": str(faults)})
        assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))

    def test_with_an_unreadable_block_loses_this_one(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one"), ssd__capacity_bytes=ssd_bytes(20), ssd__direct="off")
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        shutil.rmtree(daemon.arena_folder)
        faults = tmp_path / "faults"
        faults.mkdir()
        (faults / "preadv").write_text(f"EIO {4096 + 3 * BLOCK}")
        daemon.program = ("-m", "tests.faulty_daemon")
        daemon.settings |= {"ssd.paths": drives_in(tmp_path, "two"), "ssd.drained_paths": tmp_path / "one"}
        daemon.start(environment={"TEST_FAULTS": str(faults)})
        (faults / "preadv").unlink()
        with daemon.client() as client:
            assert len(stored(client, chains)) == BLOCKS - 1

    def test_that_is_read_only_is_drained(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        chains = filled(daemon)
        assert daemon.stop() == 0
        with read_only(tmp_path / "one"):
            start(daemon, ssd__paths=drives_in(tmp_path, "two"), ssd__drained_paths=tmp_path / "one")
            assert "cannot be deleted" in "".join(daemon.lines)
            assert on_ssd_alone(daemon, chains) == list(range(BLOCKS))
            restart(daemon)
            daemon.kill()

        # Its file is stale now. It must not pass for the one of a drive that was added later, and is away.
        start(daemon, ssd__paths=drives_in(tmp_path, "two", "three"), ssd__drained_paths="")
        filled(daemon)
        assert daemon.stop() == 0
        shutil.rmtree(tmp_path / "three")
        daemon.settings["ssd.paths"] = drives_in(tmp_path, "two", "one")
        assert f"{tmp_path / 'three' / 'ssd-002.kv'} has" in refuses(daemon)

    def test_that_is_named_twice_through_a_link_is_refused(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        paths = f"{drives_in(tmp_path, 'one')}:{tmp_path / 'link'}"
        (tmp_path / "link").symlink_to(tmp_path / "one")
        daemon = new_daemon(ssd__paths=paths)
        assert f"{tmp_path / 'one'} and {tmp_path / 'link'} are the same folder: name it once" in refuses(daemon)
        assert not list((tmp_path / "one").iterdir())

    def test_loses_the_unfinished_files_of_killed_starts_of_its_store_only(
        self, new_daemon: NewDaemon, tmp_path: Path
    ) -> None:
        daemon = new_daemon(ssd__paths=drives_in(tmp_path, "one"), ssd__capacity_bytes=ssd_bytes(20))
        start(daemon)
        file = tmp_path / "one" / "ssd-000.kv"
        shutil.copy(file, ours := file.with_name("ssd-000.kv.partial"))
        (theirs := file.with_name("ssd-007.kv.partial")).touch()
        restart(daemon)
        assert not ours.exists()
        assert theirs.exists()

    def test_in_both_lists_is_wrong_usage(self, new_daemon: NewDaemon, tmp_path: Path) -> None:
        drives = drives_in(tmp_path, "one")
        daemon = new_daemon(ssd__paths=drives, ssd__drained_paths=drives)
        assert "is in ssd.paths and in ssd.drained_paths" in refuses(daemon, code=2)


def test_a_tier_below_ssd_shrinks_and_keeps_what_fits(new_daemon: NewDaemon, tmp_path: Path) -> None:
    def tiers(blocks: int) -> str:
        size = 8192 + blocks * BLOCK
        tier = {"name": "archive", "path": drives_in(tmp_path, "archive"), "capacity_bytes": size, "free_low": 0}
        return json.dumps([{**tier, "free_high": 0}])

    daemon = new_daemon(ssd__capacity_bytes=ssd_bytes(20), tiers__below_ssd=tiers(BLOCKS))
    start(daemon)
    chains = filled(daemon)
    keys = [key for chain in chains for key in chain]
    with daemon.client() as client:
        until(lambda: counts(client)["archive"] == BLOCKS)
        for tier in ("dram", "ssd"):
            client.evict(keys, tier=tier)
    restart(daemon, tiers__below_ssd=tiers(8))
    with daemon.client() as client:
        assert stored(client, chains) == list(range(BLOCKS - 8, BLOCKS))


class TestTheDramTier:
    @pytest.mark.parametrize("kill_every", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_grows_and_keeps_every_block(self, new_daemon: NewDaemon, kill_every: int) -> None:
        daemon = new_daemon(dram__capacity_bytes=16 * MIB, ssd__capacity_bytes=0)
        start(daemon)
        chains = filled(daemon, Durability.DRAM)
        with daemon.client() as client:  # It has the old arena mapped.
            assert stored(client, chains) == list(range(BLOCKS))
            assert daemon.stop() == 0
            if kill_every:
                assert start_killed_often(daemon, step=kill_every, dram__capacity_bytes=32 * MIB) >= 10
            else:
                start(daemon, dram__capacity_bytes=32 * MIB)
            more = filled(daemon, Durability.DRAM, blocks=30)
            assert stored(client, chains + more) == list(range(BLOCKS + 30))

    def test_is_safe_from_a_client_of_the_larger_tier_that_still_writes(self, new_daemon: NewDaemon) -> None:
        daemon = new_daemon(
            dram__capacity_bytes=48 * MIB, ssd__capacity_bytes=0, mover__dram_free_low=0, mover__dram_free_high=0,
            mover__policy="lru",
        )  # fmt: skip
        start(daemon)
        with Wire(daemon.address) as wire:
            wire.attach()
            wire.open_layout(LARGE)
            writer = InPlaceWriter(wire, LARGE)
            before, kept = writer.reserve(new_chain(LARGE, 120)), writer.reserve(new_chain(LARGE, 8))
            before.abandon()
            kept.scribble()  # It has the larger arena mapped, and holds the lock of a writer.
            for size in (16 * MIB, 48 * MIB):
                daemon.kill()
                start(daemon, dram__capacity_bytes=size)
            with daemon.client() as client:
                until(lambda: client.admin.status().dram.capacity_bytes > 40 * MIB)
                assert client.admin.status().set_aside_extents == 0
                chains = filled(daemon, Durability.DRAM, blocks=200)
                kept.scribble()
                assert len(stored(client, chains)) == 200

    def test_leaves_the_bytes_of_views_readable_when_the_memory_is_full(
        self, new_daemon: NewDaemon, tmp_path: Path
    ) -> None:
        with tmpfs(tmp_path / "memory", 80 * MIB) as memory:
            daemon = new_daemon(dram__capacity_bytes=48 * MIB, ssd__capacity_bytes=0, dram__path=memory)
            start(daemon)
            chains = filled(daemon, Durability.DRAM, blocks=150)
            client = daemon.client()
            views = [client.open_layout(LARGE).lookup(chain).view() for chain in chains]
            arrays = [array for view in views for slices in view.slices(0) for array in slices]
            daemon.kill()
            start(daemon, dram__capacity_bytes=16 * MIB)
            fill(memory)
            reader = os.fork()
            if not reader:
                try:
                    sum(array.sum() for array in arrays)
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(reader, 0)[1] == 0
            with daemon.client() as other:
                assert len(stored(other, chains)) >= 60
            del arrays, views
            daemon.kill()

    @pytest.mark.parametrize("kill_every", [0, 9, pytest.param(1, marks=pytest.mark.slow)])
    def test_shrinks_and_keeps_what_fits(self, new_daemon: NewDaemon, kill_every: int) -> None:
        daemon = new_daemon(
            dram__capacity_bytes=48 * MIB, ssd__capacity_bytes=0, mover__dram_free_low=0, mover__dram_free_high=0,
            mover__policy="lru",
        )  # fmt: skip
        start(daemon)
        chains = filled(daemon, Durability.DRAM, blocks=150)
        with daemon.client() as client:
            assert stored(client, chains) == list(range(150))
            allocated = (daemon.arena_folder / "arena").stat().st_blocks * 512
            assert daemon.stop() == 0
            if kill_every:
                size = 20 * MIB
                assert start_killed_often(daemon, step=kill_every, dram__capacity_bytes=size) >= 10 // kill_every
            else:
                start(daemon, dram__capacity_bytes=20 * MIB)
            found = stored(client, chains)
            assert found == list(range(150 - len(found), 150))
            assert len(found) >= 80  # 16 MiB less 1 %, of 196 KiB each.
        assert (daemon.arena_folder / "arena").stat().st_blocks * 512 < allocated - 12 * MIB
        more = filled(daemon, Durability.DRAM, blocks=30)
        with daemon.client() as client:
            assert len(stored(client, more)) == 30
        restart(daemon, dram__capacity_bytes=48 * MIB)
        with daemon.client() as client:
            assert len(stored(client, more)) == 30
        assert daemon.stop() == 0
        assert daemon.check().returncode == 0
