"""A third tier below SSD, from one class and the configuration: a real daemon moves blocks through all three tiers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvservice.index.pages import leaf_pages_in_use
from kvservice_api.errors import InvalidRequest, KVError
from kvservice_client import BlockChain, Client, Durability
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, new_chain, save, verify

CHAINS = 60  # Three times as many blocks as DRAM or SSD has space for.


def below_ssd(path: Path, kind: str = "tests.slow_directory:SlowDirectory", size: str = "64MiB") -> str:
    return json.dumps([{"name": "archive", "kind": kind, "path": str(path), "capacity_bytes": size}])


@pytest.fixture
def daemon(new_daemon: Callable[..., DaemonProcess], tmp_path: Path) -> DaemonProcess:
    """Room for about 20 large blocks in DRAM and on SSD each, and for all in the third tier."""
    return new_daemon(
        dram__capacity_bytes=8 * MIB, ssd__capacity_bytes=8 * MIB, tiers__below_ssd=below_ssd(tmp_path / "archive")
    )


def tiers_of(client: Client, chain: BlockChain) -> tuple[str, ...]:
    return tuple(client.admin.inspect(chain.keys[0]).shards[0].tiers)


def counts(client: Client) -> dict[str, int]:
    return {tier.name: tier.blocks for tier in client.admin.status().tiers}


def fill(client: Client) -> list[BlockChain]:
    """Save more than two tiers hold, and each block once the third has the one before: SSD may evict others first."""
    chains = [new_chain(LARGE) for _ in range(CHAINS)]
    for chain in chains:
        save(client, LARGE, chain, Durability.SSD)
        wait_for_archive(client, chain)
    return chains


def wait_for_archive(client: Client, chain: BlockChain) -> None:
    until(lambda: "archive" in tiers_of(client, chain))


def test_blocks_move_through_all_three_tiers_and_survive_sigkill(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        chains = fill(client)
        held = counts(client)
        assert 0 < held["dram"] < CHAINS and 0 < held["ssd"] < CHAINS, "the faster tiers hold a part"
        daemon.kill()
        assert daemon.check().returncode == 0
        daemon.start()

        found = counts(client)
        assert found["archive"] == CHAINS and found["ssd"] > 0 and found["dram"] > 0
        only_below = [chain for chain in chains if tiers_of(client, chain) == ("archive",)]
        assert only_below, "some block is in the third tier alone"
        for chain in chains:
            verify(client, LARGE, chain)
        assert client.admin.status().counters["promoted_blocks"] >= len(only_below)


def test_a_block_lost_by_the_faster_tiers_is_read_from_the_third(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        chain = new_chain(LARGE, 3)
        save(client, LARGE, chain)
        until(lambda: counts(client)["archive"] == 3)
        for tier in ("dram", "ssd"):
            assert client.evict(chain.keys, tier).evicted == 3
        assert tiers_of(client, chain) == ("archive",)
        verify(client, LARGE, chain)
        until(lambda: tiers_of(client, chain) == ("dram", "ssd", "archive"))  # A used block gets its copy on SSD again.
        until(lambda: client.evict(chain.keys, "archive").held == 0)  # Its copies end a moment later.
        assert "archive" not in tiers_of(client, chain)
        verify(client, LARGE, chain)


def test_a_block_that_left_ssd_before_its_copy_was_made_is_copied_from_dram(
    new_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    lower = below_ssd(tmp_path / "archive", "tests.slow_directory:TroubledDirectory")
    daemon = new_daemon(dram__capacity_bytes=8 * MIB, ssd__capacity_bytes=8 * MIB, tiers__below_ssd=lower)
    marker = tmp_path / "archive.trouble"
    with daemon.client() as client:
        marker.write_text("write fails")
        chain = new_chain(LARGE)
        save(client, LARGE, chain, Durability.SSD)
        until(lambda: client.evict(chain.keys, "ssd").evicted == 1)  # A write that fails holds it for a moment.
        assert tiers_of(client, chain) == ("dram",)
        marker.unlink()
        wait_for_archive(client, chain)
        until(lambda: client.evict(chain.keys, "dram").evicted == 1)
        assert tiers_of(client, chain) == ("archive",)
        verify(client, LARGE, chain)


def test_a_damaged_copy_in_the_third_tier_is_a_miss_and_never_wrong_bytes(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    with daemon.client() as client:
        chain = new_chain(LARGE)
        save(client, LARGE, chain)
        until(lambda: counts(client)["archive"] == 1)
        for tier in ("dram", "ssd"):
            client.evict(chain.keys, tier)
        [file] = [each for each in (tmp_path / "archive").iterdir() if each.name != "store_id"]
        data = bytearray(file.read_bytes())
        data[1000] ^= 1
        file.write_bytes(data)

        last = list(client.admin.scrub("archive"))[-1]
        assert (last.blocks_checked, last.damaged) == (1, 1)
        assert client.open_layout(LARGE).lookup(chain).hit_blocks == 0
        [event, *_] = client.admin.explain_block(chain.keys[0]).events
        assert event.tier_name == "archive"


def test_the_built_in_kind_is_one_preallocated_file(new_daemon: Callable[..., DaemonProcess], tmp_path: Path) -> None:
    folder = tmp_path / "drive"
    daemon = new_daemon(
        dram__capacity_bytes=8 * MIB, ssd__capacity_bytes=8 * MIB, tiers__below_ssd=below_ssd(folder, "file")
    )
    with daemon.client() as client:
        chains = fill(client)
        daemon.kill()
        daemon.start()
        for chain in chains:
            verify(client, LARGE, chain)
    assert daemon.stop() == 0
    (folder / "tier-archive.kv").rename(folder / "elsewhere")
    daemon.launch()
    assert daemon.wait_for_end() != 0
    assert any("tier-archive.kv is missing" in line for line in daemon.lines)


def test_a_tier_that_a_start_did_not_have_starts_empty_so_that_no_discarded_block_is_found_again(
    new_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    sizes = {"dram__capacity_bytes": 8 * MIB, "ssd__capacity_bytes": 8 * MIB}
    daemon = new_daemon(**sizes, tiers__below_ssd=below_ssd(tmp_path / "archive"))
    with daemon.client() as client:
        fill(client)
        discarded = new_chain(LARGE)
        save(client, LARGE, discarded, Durability.SSD)
        wait_for_archive(client, discarded)
    assert daemon.stop() == 0
    lower = daemon.settings.pop("tiers.below_ssd")
    daemon.start()
    with daemon.client() as client:
        assert set(counts(client)) == {"dram", "ssd"}
        client.admin.discard(discarded.keys)
    assert daemon.stop() == 0
    daemon.settings["tiers.below_ssd"] = lower
    daemon.start()
    daemon.wait_for_log("the tier archive starts empty: the daemon ran without this tier, or it is new")
    with daemon.client() as client:
        assert client.open_layout(LARGE).lookup(discarded).hit_blocks == 0
        until(lambda: counts(client)["archive"] >= counts(client)["ssd"] > 0)  # What SSD has is copied again.


def test_a_damaged_index_of_the_third_tier_costs_that_tier_alone(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        chains = fill(client)
        on_ssd = [chain for chain in chains if "ssd" in tiers_of(client, chain)]
        assert daemon.stop() == 0
        (daemon.store / "index-archive" / "data.mdb").write_bytes(b"no index")
        daemon.start()
        for chain in on_ssd:
            verify(client, LARGE, chain)
        until(lambda: counts(client)["archive"] >= len(on_ssd))


@pytest.mark.parametrize(
    ("trouble", "archive"),
    [
        ("write hangs", "64MiB"),
        ("sync hangs", "4MiB"),
        ("write fails", "4MiB"),
        ("sync fails", "64MiB"),
        ("sync fails once and hangs", "4MiB"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("write hangs", "4MiB"),
                ("sync hangs", "64MiB"),
                ("write fails", "64MiB"),
                ("sync fails", "4MiB"),
                ("sync fails once and hangs", "64MiB"),
            )
        ),
    ],
)
def test_a_third_tier_in_trouble_stops_neither_saves_nor_evictions_from_ssd(
    new_daemon: Callable[..., DaemonProcess], tmp_path: Path, trouble: str, archive: str
) -> None:
    """With ample space, and with so little that the tier itself must evict."""
    lower = below_ssd(tmp_path / "archive", "tests.slow_directory:TroubledDirectory", archive)
    daemon = new_daemon(dram__capacity_bytes=8 * MIB, ssd__capacity_bytes=8 * MIB, tiers__below_ssd=lower)
    marker = tmp_path / "archive.trouble"
    with daemon.client() as client:
        for _ in range(CHAINS):
            first = new_chain(LARGE)
            save(client, LARGE, first, Durability.SSD)
        until(lambda: "archive" in tiers_of(client, first))
        before = client.admin.status().counters["evicted_ssd_blocks"]
        marker.write_text(trouble)
        for _ in range(CHAINS):  # More than SSD has space for: blocks leave it, though nothing comes below.
            assert save(client, LARGE, new_chain(LARGE), Durability.SSD).is_complete
        last = new_chain(LARGE)
        save(client, LARGE, last, Durability.SSD)
        assert client.admin.status().counters["evicted_ssd_blocks"] - before >= CHAINS // 2
        assert client.evict(last.keys, "dram").evicted == 1
        if trouble.endswith("fails"):
            until(lambda: client.admin.status().tiers[2].refusing_because != "")
        marker.unlink()
        until(lambda: "archive" in tiers_of(client, last))  # It is tried again.
        verify(client, LARGE, last)


def test_a_read_of_the_third_tier_that_fails_costs_that_load_alone(
    new_daemon: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    lower = below_ssd(tmp_path / "archive", "tests.slow_directory:TroubledDirectory")
    daemon = new_daemon(dram__capacity_bytes=8 * MIB, ssd__capacity_bytes=8 * MIB, tiers__below_ssd=lower)
    with daemon.client() as client:
        chain = new_chain(LARGE)
        save(client, LARGE, chain)
        until(lambda: "archive" in tiers_of(client, chain))
        for tier in ("dram", "ssd"):
            client.evict(chain.keys, tier)
        (tmp_path / "archive.trouble").touch()
        with client.open_layout(LARGE).lookup(chain) as lease, pytest.raises(KVError):
            list(lease.load())
        (tmp_path / "archive.trouble").unlink()
        verify(client, LARGE, chain)


def test_a_repaired_index_has_the_blocks_on_ssd_and_the_third_tier_starts_empty(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        chains = fill(client)
        on_ssd = [chain for chain in chains if "ssd" in tiers_of(client, chain)]
        assert daemon.stop() == 0
        index = daemon.store / "index" / "data.mdb"
        with index.open("r+b") as file:  # A page of records is cut off; its records are in older pages, too.
            file.truncate(max(leaf_pages_in_use(index)) * 4096)
        assert daemon.check().returncode == 1
        assert "made new the index" in daemon.check("--repair").stdout
        daemon.start()

        found = counts(client)
        assert found["ssd"] == len(on_ssd)
        for chain in on_ssd:
            verify(client, LARGE, chain)
        until(lambda: counts(client)["archive"] >= len(on_ssd))  # Every block on SSD is copied again.


def test_a_tier_that_the_store_does_not_have_is_refused_with_those_it_has(daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        for ask in (
            lambda: client.evict(new_chain(LARGE).keys, "tape"),
            lambda: list(client.admin.list_blocks("tape")),
            lambda: list(client.admin.scrub("tape")),
        ):
            with pytest.raises(InvalidRequest, match="dram, ssd, archive"):
                ask()


def test_operators_see_the_third_tier(
    daemon: DaemonProcess, kvctl_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    def kvctl(*arguments: str) -> str:
        done = kvctl_here(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with daemon.client() as client:
        chain = new_chain(LARGE)
        save(client, LARGE, chain)
        until(lambda: counts(client)["archive"] == 1)
    assert "archive" in kvctl("status")
    listed = json.loads(kvctl("ls", "--tier", "archive", "--json"))
    assert listed["blocks"][0]["tiers"] == ["dram", "ssd", "archive"]
    assert "in archive since" in kvctl("explain", chain.keys[0].hex())
    assert "evicted 1 from archive" in kvctl("evict", chain.keys[0].hex(), "--tier", "archive")


@pytest.mark.parametrize(
    ("below", "what"),
    [
        ("not json", "this is not JSON"),
        ("{}", "give a list of tiers"),
        ('[{"name": "a", "path": "/x", "capacity_bytes": "1GiB", "kind": "pathlib:Path"}]', "'pathlib:Path'"),
        ('[{"name": "Archive", "path": "/x", "capacity_bytes": "1GiB"}]', "pattern"),
        ('[{"name": "ssd", "path": "/x", "capacity_bytes": "1GiB"}]', "its own name"),
        ('[{"name": "a", "path": "/x"}]', "capacity_bytes"),
        ('[{"name": "a", "path": "/x", "capacity_bytes": "1GiB", "kind": "tape"}]', "not a kind of tier"),
        ('[{"name": "a", "path": "/x", "capacity_bytes": "1GiB", "kind": "no.module:Class"}]', "not a kind of tier"),
        ('[{"name": "a", "path": "/x", "capacity_bytes": "1GiB", "size": 3}]', "size"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_reason(tmp_path: Path, below: str, what: str) -> None:
    done = DaemonProcess.command("serve", "--tiers.below_ssd", below, "--store.path", str(tmp_path))
    assert done.returncode != 0 and what in done.stderr and "Traceback" not in done.stderr, done.stderr
