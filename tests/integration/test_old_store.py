"""A store written by the code of commit b052b6d opens, with its blocks, their bytes, sessions and pins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from kvservice_api.keys import BlockChain, block_chain
from kvservice_api.layout import Shard
from kvservice_client import BlockCache, Client, Durability
from tests import old_store
from tests.daemon import DaemonProcess
from tests.old_store import layout_named, slice_content


class OldStore:
    """The unpacked store, the daemon that runs on it, and what was saved in it."""

    def __init__(self, folder: Path) -> None:
        self.daemon = DaemonProcess(folder)
        self.contents: dict[str, Any] = old_store.unpack(folder, self.daemon.shared_memory)
        drives = [self.daemon.store / f"drive-{number}" for number in range(2)]
        self.daemon.settings |= {
            **old_store.SIZES,
            "ssd.paths": ":".join(map(str, drives)),
            "pins.ttl_max_s": 3660 * 86400,
            "session.ttl_s": 365 * 86400,
        }

    @property
    def chains(self) -> list[tuple[str, Shard, BlockChain]]:
        return [
            (
                each["layout"],
                Shard.decode(bytes.fromhex(each["shard"])),
                BlockChain(b"", tuple(map(bytes.fromhex, each["keys"])), tuple(each["token_counts"])),
            )
            for each in self.contents["chains"]
        ]

    def caches(self, client: Client) -> Iterator[tuple[BlockCache, BlockChain]]:
        """Each saved chain, and a reader of it."""
        for name, shard, chain in self.chains:
            yield client.open_layout(layout_named(name), shard), chain


def expected(cache: BlockCache, chain: BlockChain, layer: int) -> list[np.ndarray[Any, Any]]:
    """The saved bytes of this layer of the shard, one array per block."""
    return [
        slice_content(key, cache.shard, cache.shard.layer_begin + layer, cache.slice_bytes(count))
        for key, count in zip(chain.keys, chain.token_counts, strict=True)
    ]


@pytest.fixture
def old(tmp_path: Path) -> Iterator[OldStore]:
    store = OldStore(tmp_path)
    try:
        yield store
    finally:
        store.daemon.remove()


@pytest.fixture(params=["with its arena", "after the host restarted"])
def started(old: OldStore, request: pytest.FixtureRequest) -> OldStore:
    """The store as the daemon left it, and as a restart of the host would have left it."""
    if request.param == "after the host restarted":
        shutil.rmtree(old.daemon.arena_folder)
    old.daemon.start()
    return old


def stored(old: OldStore) -> set[tuple[str, str, bool, bool]]:
    return {(each["key"], each["shard"], each["dram"], each["ssd"]) for each in old.contents["blocks"]}


def found(client: Client) -> set[tuple[str, str, bool, bool]]:
    return {
        (block.key.hex(), Shard.from_proto(block.shard).encode().hex(), block.in_dram, block.on_ssd)
        for block in client.admin.list_blocks()
    }


def test_every_block_of_it_is_found_in_the_tiers_where_it_was(old: OldStore) -> None:
    old.daemon.start()
    assert not old.daemon.logged("the DRAM tier starts empty")
    with old.daemon.client() as client:
        here = {(key, shard): tiers for key, shard, *tiers in found(client)}
        assert here.keys() == {(key, shard) for key, shard, *_ in stored(old)}
        for key, shard, *tiers in stored(old):  # A block that was in DRAM alone is written to SSD again.
            assert all(now or not before for now, before in zip(here[key, shard], tiers, strict=True))


def test_every_block_on_ssd_is_found_without_the_arena(old: OldStore) -> None:
    shutil.rmtree(old.daemon.arena_folder)
    old.daemon.start()
    with old.daemon.client() as client:
        here = {(key, shard, on_ssd) for key, shard, _, on_ssd in found(client)}  # The policy may read some ahead.
    assert here == {(key, shard, True) for key, shard, _, on_ssd in stored(old) if on_ssd}


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_every_block_of_it_is_loaded_with_its_bytes(started: OldStore, transport: Literal["grpc", "shm"]) -> None:
    with started.daemon.client(transport=transport) as client:
        on_ssd = {(each["key"], each["shard"]): each["ssd"] for each in started.contents["blocks"]}
        has_arena = not started.daemon.logged("the DRAM tier starts empty")
        loaded = 0
        for cache, chain in started.caches(client):
            shard = cache.shard.encode().hex()
            first = next(n for n, key in enumerate(chain.keys) if has_arena or on_ssd[key.hex(), shard])
            chain = chain[first:]  # Of one chain the first block was in DRAM only.
            with cache.lookup(chain) as lease:
                assert lease.hit_blocks == len(chain)
                for layer in lease.load():
                    assert np.array_equal(layer.data, np.concatenate(expected(cache, chain, layer.index)))
                loaded += lease.hit_blocks
        assert loaded == len(stored(started)) - (not has_arena)


@pytest.mark.parametrize("name", old_store.LAYOUTS)
def test_the_fingerprints_of_its_layouts_are_the_same_today(old: OldStore, name: str) -> None:
    assert layout_named(name).fingerprint.hex() == old.contents["layouts"][name]


def test_its_sessions_are_as_they_were_with_cuts_tails_and_bytes(started: OldStore) -> None:
    with started.daemon.client() as client:
        for told in started.contents["sessions"]:
            layout = layout_named(told["layout"])
            session = client.session(layout, told["session_id"])
            assert old_store.described(session.get()) | {"layout": told["layout"]} == told
            cache = client.open_layout(layout)
            with session.lookup() as history:
                assert history.tokens == told["token_count"]
                layers = list(history.load())
            assert len(layers) == layout.layers
            for layer in layers:
                parts = []
                for key, first, count, block_tokens in told["slices"]:
                    whole = slice_content(bytes.fromhex(key), cache.shard, layer.index, cache.slice_bytes(block_tokens))
                    arrays = cache.layer_arrays(whole, [block_tokens])[0]
                    parts += [np.ascontiguousarray(each[:, first : first + count]).reshape(-1) for each in arrays]
                assert np.array_equal(layer.data, np.concatenate([each.view(np.uint8) for each in parts]))


def test_a_session_of_it_continues(started: OldStore) -> None:
    with started.daemon.client() as client:
        layout = layout_named("latent")
        session, cache = client.session(layout, "latent"), client.open_layout(layout)
        before = session.get()
        parent = before.slices[-2].key  # The open tail is replaced by a fuller block.
        turn = block_chain(layout, range(layout.block_tokens + 3), parent=parent, with_partial=True)
        layers = [expected(cache, turn, layer) for layer in range(layout.layers)]
        assert cache.save(turn, layers, durability=Durability.SSD).is_complete
        after = session.append(turn, before.revision)
        assert after.token_count == before.token_count - before.tail_tokens + turn.token_count
        with session.lookup() as history:
            assert history.tokens == after.token_count


def test_its_pins_hold(started: OldStore) -> None:
    with started.daemon.client() as client:
        pinned = {block.key.hex() for block in client.admin.list_blocks() if block.HasField("pinned_until")}
        assert pinned == set(started.contents["pinned"])


def test_a_check_finds_it_sound_before_and_after_a_daemon_of_today_ran_on_it(old: OldStore) -> None:
    before = old.daemon.check()
    old.daemon.start()
    with old.daemon.client() as client:
        for cache, chain in old.caches(client):
            cache.lookup(chain).release()
    assert old.daemon.stop() == 0
    after = old.daemon.check()
    assert (before.returncode, after.returncode) == (0, 0), before.stdout + after.stdout + after.stderr
    assert "not checked" not in after.stdout


def test_its_archive_has_slices_of_every_size_shards_and_partial_blocks(old: OldStore) -> None:
    """So that the tests above compare the right things."""
    sizes, shards, partial = set(), set(), 0
    for name, shard, chain in old.chains:
        layout = layout_named(name)
        sizes |= {layout.slice_bytes(shard.heads, count) for count in chain.token_counts}
        shards.add(shard == Shard.whole(layout))
        partial += chain.token_counts[-1] < layout.block_tokens
    assert min(sizes) < 4096 and max(sizes) >= 64 * 1024 and shards == {True, False} and partial >= 3
    assert {(each["dram"], each["ssd"]) for each in old.contents["blocks"]} == {
        (True, True), (True, False), (False, True)
    }  # fmt: skip
