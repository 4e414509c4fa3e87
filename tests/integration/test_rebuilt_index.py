"""The durable index is lost, and made again from the blocks in the SSD files: ``kvservice check --rebuild``."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvservice import check
from kvservice.index import pages
from kvservice.index.descriptor_secret import SECRET_NAME, read_secret
from kvservice.store.repair.rebuild import Progress
from kvservice_api.image import DESCRIPTOR_BYTES
from kvservice_client import Durability, Layout, block_chain
from tests.clock import FakeClock
from tests.daemon import MIB, DaemonProcess
from tests.integration.conversations import layers_of, small_layout
from tests.integration.conversations import new_chain as new_talk
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save, slice_bytes, verify
from tests.integration.media import flip_bit_of, flip_data, ssd_file
from tests.integration.test_old_store import OldStore, expected
from tests.old_store import LAYOUTS, layout_named


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, dram__capacity_bytes=24 * MIB, ssd__capacity_bytes=64 * MIB) as process:
        yield process


def lose_index(daemon: DaemonProcess) -> None:
    """Also the contents of shared memory."""
    shutil.rmtree(daemon.store / "index")
    shutil.rmtree(daemon.arena_folder)


def rebuild(daemon: DaemonProcess) -> dict[str, Any]:
    done = daemon.check("--rebuild", "--json")
    assert done.returncode == 1, done.stderr  # A new index was made.
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def be_of_an_earlier_version(daemon: DaemonProcess) -> int:
    """Change store and blocks to the form of versions without descriptors. Returns how many had a descriptor."""
    path = daemon.store / "ssd-000.kv"
    data = bytearray(path.read_bytes())
    count, place = 0, 0
    while (place := data.find(b"KVTR", place)) >= 0:
        if data[place - DESCRIPTOR_BYTES :].startswith(b"KVBD"):
            data[place - DESCRIPTOR_BYTES : place] = bytes(DESCRIPTOR_BYTES)
            count += 1
        place += 1
    path.write_bytes(data)
    mark_of_earlier_version(daemon)
    return count


def mark_of_earlier_version(daemon: DaemonProcess) -> None:
    secret = read_secret(daemon.store)
    assert secret is not None and secret.every_block
    (daemon.store / SECRET_NAME).write_bytes(replace(secret, every_block=False).encode())


def test_every_block_on_ssd_is_found_again(daemon: DaemonProcess) -> None:
    chains = [(layout, new_chain(layout, blocks)) for layout in (LARGE, SMALL) for blocks in (1, 3, 8)]
    with daemon.client() as client:
        for layout, chain in chains:
            assert save(client, layout, chain, Durability.SSD).is_complete
        before = {key: client.admin.inspect(key) for _, chain in chains for key in chain.keys}
    daemon.stop()
    lose_index(daemon)
    daemon.launch()
    assert daemon.wait_for_end() == 1
    assert "--rebuild" in "".join(daemon.lines)

    report = rebuild(daemon)
    assert (report["problems"], report["tiers"]["ssd"]["blocks"]) == ([], 24)
    assert any("sessions that are not among these are lost" in line for line in report["notes"])
    assert daemon.check().returncode == 0
    daemon.start()
    with daemon.client() as client:
        for layout, chain in chains:
            verify(client, layout, chain)
        for key, was in before.items():
            [then], [now] = was.shards, client.admin.inspect(key).shards
            for name in ("parent_key", "token_count", "layout_fingerprint", "stored_at"):
                assert getattr(then, name) == getattr(now, name), name


def test_blocks_of_earlier_versions_are_found_by_their_checksums(daemon: DaemonProcess) -> None:
    """They have no descriptor. A block of a few tokens is found too; its parent is not known."""
    chain, short = new_chain(LARGE, 4), block_chain(LARGE, range(37), with_partial=True)
    layers = [random.Random(layer).randbytes(37 * slice_bytes(LARGE) // 64) for layer in range(LARGE.layers)]
    with daemon.client() as client:
        assert save(client, LARGE, chain, Durability.SSD).is_complete
        assert client.open_layout(LARGE).save(short, layers, Durability.SSD).is_complete
    daemon.stop()
    assert be_of_an_earlier_version(daemon) == 5
    lose_index(daemon)
    report = rebuild(daemon)
    assert (report["problems"], report["tiers"]["ssd"]["blocks"]) == ([], 5)
    daemon.start()
    with daemon.client() as client:
        verify(client, LARGE, chain)
        with client.open_layout(LARGE).lookup(short) as lease:
            assert [layer.data.tobytes() for layer in lease.load()] == layers
        [shard] = client.admin.inspect(chain.keys[1]).shards
        assert shard.parent_key == bytes(32)


def test_layouts_that_fit_the_same_bytes_are_not_guessed_between(daemon: DaemonProcess) -> None:
    twin = Layout("known/twin", "float16", layers=3, kv_heads=4, k_head_dim=64, v_head_dim=64, block_tokens=64)
    chain = new_chain(LARGE, 2)
    with daemon.client() as client:
        assert save(client, LARGE, chain, Durability.SSD).is_complete
        assert save(client, twin, new_chain(twin), Durability.SSD).is_complete
    daemon.stop()
    be_of_an_earlier_version(daemon)
    lose_index(daemon)
    report = rebuild(daemon)
    assert report["tiers"]["ssd"]["blocks"] == 0
    assert "no record for 3 trailers that fit several layouts" in report["notes"]


def test_what_was_removed_and_overwritten_or_damaged_is_not_found(daemon: DaemonProcess) -> None:
    kept, removed, damaged = new_chain(LARGE, 3), new_chain(LARGE, 4), new_chain(LARGE, 1)
    with daemon.client() as client:
        for chain in (removed, kept, damaged):
            assert save(client, LARGE, chain, Durability.SSD).is_complete
        client.admin.discard(removed)
        newer = new_chain(SMALL, 8)
        assert save(client, SMALL, newer, Durability.SSD).is_complete  # They use the space of some of them.
    daemon.stop()
    flip_data(ssd_file(daemon), LARGE, damaged.keys[0], random.Random(1))
    lose_index(daemon)
    report = rebuild(daemon)
    assert report["problems"] == []
    assert any("damaged, or were partly overwritten" in line for line in report["notes"])
    daemon.start()
    with daemon.client() as client:
        verify(client, LARGE, kept)
        verify(client, SMALL, newer)
        assert client.open_layout(LARGE).contains(damaged) == 0


def test_the_old_index_is_kept_and_its_sessions_are_saved(daemon: DaemonProcess) -> None:
    chain = new_chain(LARGE, 4)
    with daemon.client() as client:
        assert save(client, LARGE, chain, Durability.SSD).is_complete
        client.admin.pin(chain, ttl_s=3600)
        layout = small_layout("sessions")
        blocks, talk = client.open_layout(layout), new_talk(layout, 20)
        assert blocks.save(talk, layers_of(blocks, talk), Durability.SSD).is_complete
        client.session(layout, "talk").append(talk)
    daemon.stop()
    before = (daemon.store / "index" / "data.mdb").read_bytes()
    report = rebuild(daemon)
    assert (report["problems"], report["tiers"]["ssd"]["blocks"], report["sessions"]) == ([], 7, 1)
    assert f"the old one is {daemon.store}/index.damaged-1" in report["made_anew"][0]
    assert (daemon.store / "index.damaged-1" / "data.mdb").read_bytes() == before
    daemon.start()
    with daemon.client() as client:
        verify(client, LARGE, chain)
        assert client.admin.status().sessions == 1
        assert client.admin.inspect(chain.keys[0]).shards[0].HasField("pinned_until")


@pytest.mark.parametrize("moment", ["search", "fill", "exchange"])
def test_a_rebuild_that_was_killed_changes_nothing_and_can_be_run_again(daemon: DaemonProcess, moment: str) -> None:
    chain = new_chain(LARGE, 4)
    with daemon.client() as client:
        assert save(client, LARGE, chain, Durability.SSD).is_complete
    daemon.stop()
    shutil.rmtree(daemon.arena_folder)
    index = daemon.store / "index" / "data.mdb"
    before = index.read_bytes()
    die = "lambda *a, **k: os.kill(os.getpid(), 9)"
    where = {
        "search": f"kvservice.check.Search = {die}",
        "fill": f"kvservice.store.repair.salvage.overlaps = {die}",
        "exchange": f"kvservice.index.replacement._exchange = {die}",
    }[moment]
    program = f"import os, kvservice.check, kvservice.index.replacement, kvservice.store.repair.salvage; {where}; "
    program += f"kvservice.check.main(['{daemon.store}', '--rebuild'])"
    killed = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert index.read_bytes() == before
    assert pages.examine(index) == ""

    report = rebuild(daemon)
    assert (report["problems"], report["tiers"]["ssd"]["blocks"]) == ([], 4)
    assert not (daemon.store / "index.new").exists()
    daemon.start()
    with daemon.client() as client:
        verify(client, LARGE, chain)


def test_a_rebuild_needs_all_ssd_files_and_takes_those_that_lie_elsewhere(tmp_path: Path) -> None:
    drives = [tmp_path / "one", tmp_path / "two"]
    for drive in drives:
        drive.mkdir()
    with DaemonProcess(
        tmp_path / "store",
        dram__capacity_bytes=24 * MIB,
        ssd__capacity_bytes=64 * MIB,
        ssd__paths=":".join(map(str, drives)),
    ) as daemon:
        chain = new_chain(LARGE, 8)
        with daemon.client() as client:
            assert save(client, LARGE, chain, Durability.SSD).is_complete
        daemon.stop()
        lose_index(daemon)
        files = [drive / f"ssd-{number:03}.kv" for number, drive in enumerate(drives)]
        refused = daemon.check("--rebuild", "--ssd-file", str(files[0]))
        assert (refused.returncode, "--ssd-file" in refused.stderr) == (2, True), refused.stderr
        assert not (daemon.store / "index").exists()

        done = daemon.check("--rebuild", *(word for file in files for word in ("--ssd-file", str(file))))
        assert "8 blocks" in done.stdout, done.stdout + done.stderr
        daemon.start()
        with daemon.client() as client:
            verify(client, LARGE, chain)


def test_a_store_of_an_earlier_version_loses_its_index_and_keeps_what_its_checksums_tell(tmp_path: Path) -> None:
    """Its layouts are known from the folder that this version makes when it opens the store."""
    store = OldStore(tmp_path)
    daemon = store.daemon
    try:
        daemon.start()
        layout = layout_named(next(iter(LAYOUTS)))
        new = new_chain(layout, 2)
        with daemon.client() as client:
            assert save(client, layout, new, Durability.SSD).is_complete
        daemon.stop()
        before = json.loads(daemon.check("--json").stdout)
        lose_index(daemon)
        files = [daemon.store / f"drive-{number}" / f"ssd-{number:03}.kv" for number in range(2)]
        done = daemon.check("--rebuild", "--json", *(word for file in files for word in ("--ssd-file", str(file))))
        report = json.loads(done.stdout)
        assert (report["problems"], report["layouts"]) == ([], before["layouts"])
        assert "no record for 3 trailers that fit several layouts" in report["notes"]
        assert report["tiers"]["ssd"]["blocks"] + 3 >= before["tiers"]["ssd"]["blocks"]
        secret = read_secret(daemon.store)
        assert secret is not None and not secret.every_block
        daemon.start()
        with daemon.client() as client:
            verify(client, layout, new)
            [shard] = client.admin.inspect(new.keys[1]).shards
            assert shard.parent_key == new.keys[0], "blocks of today have a descriptor there too"
            hits = 0
            for cache, chain in store.caches(client):
                with cache.lookup(chain) as lease:
                    hits += lease.hit_blocks
                    for layer in lease.load() if lease.hit_blocks else ():
                        slices = expected(cache, chain[: lease.hit_blocks], layer.index)
                        assert layer.data.tobytes() == b"".join(each.tobytes() for each in slices)
            assert hits
    finally:
        daemon.remove()


def test_without_any_layout_no_index_is_made(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        assert save(client, LARGE, new_chain(LARGE, 2), Durability.SSD).is_complete
    daemon.stop()
    lose_index(daemon)
    shutil.rmtree(daemon.store / "layouts")
    result = daemon.check("--rebuild")
    assert result.returncode == 1
    assert "from a copy" in result.stdout
    assert not (daemon.store / "index").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for another user")
def test_an_index_that_root_makes_belongs_to_the_owner_of_the_store(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        assert save(client, LARGE, new_chain(LARGE, 2), Durability.SSD).is_complete
    daemon.stop()
    lose_index(daemon)
    os.chown(daemon.store, 12345, 12345)
    rebuild(daemon)
    files = [daemon.store / "index", *(daemon.store / "index").iterdir(), *(daemon.store / "layouts").iterdir()]
    assert {(file.stat().st_uid, file.stat().st_gid) for file in files} == {(12345, 12345)}


class SecondByLook(FakeClock):
    """A clock that advances by a second with each read."""

    def monotonic_s(self) -> float:
        self.advance(seconds=1)
        return super().monotonic_s()


@pytest.mark.parametrize("time_goes_on", [True, False])
async def test_a_rebuild_says_every_few_seconds_how_far_it_is(daemon: DaemonProcess, time_goes_on: bool) -> None:
    with daemon.client() as client:
        assert save(client, LARGE, new_chain(LARGE, 20), Durability.SSD).is_complete
    daemon.stop()
    lines: list[str] = []
    clock = SecondByLook() if time_goes_on else FakeClock()
    await check.check(daemon.store, repair=True, rebuild=True, progress=Progress(clock, lines.append, every_s=3))
    assert bool(lines) == time_goes_on
    if time_goes_on:
        size = (daemon.store / "ssd-000.kv").stat().st_size / MIB
        pattern = rf"(\d+) of {size:.0f} MiB of the SSD files read, (\d+) blocks found, 0 trailers without a block"
        search = [(int(found[1]), int(found[2])) for line in lines if (found := re.fullmatch(pattern, line))]
        assert search == sorted(search), "both only grow"
        assert 0 < search[0][0] < search[-1][0] <= size and 0 < search[-1][1] <= 20
        assert any(
            re.fullmatch(r"\d+ of the 20 blocks of (the old index|the tier ssd) verified", line) for line in lines
        )


async def test_a_rebuild_says_how_far_it_is_while_it_tries_token_counts(daemon: DaemonProcess) -> None:
    """For a trailer without a descriptor every token count of every layout may be tried."""
    chain = new_chain(LARGE)
    with daemon.client() as client:
        assert save(client, LARGE, chain, Durability.SSD).is_complete
    daemon.stop()
    be_of_an_earlier_version(daemon)
    flip_bit_of(ssd_file(daemon), LARGE, chain.keys[0], 0)
    lose_index(daemon)
    lines: list[str] = []
    await check.check(daemon.store, repair=True, rebuild=True, progress=Progress(SecondByLook(), lines.append))
    at_one_place = max(Counter(lines).values())
    assert LARGE.block_tokens // 5 - 1 <= at_one_place <= LARGE.block_tokens // 5 + 2, lines
