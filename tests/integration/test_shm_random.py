"""Random operations of several clients over both transports, with a DRAM tier that is much too small for them.

Every loaded byte is compared. Reproduce a failure with the seed in the test's name.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvservice_api.errors import BlockNotFound, KVError, LeaseExpired, NotShared, Overloaded, TierFull
from kvservice_client import BlockChain, Client, Durability, Layout, Shard
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, layers_of, new_chain

_CLIENTS = 3
_CHAINS = 24  # A layout. Together 24 MiB of blocks.
_PERMITTED = (BlockNotFound, LeaseExpired, Overloaded, TierFull, NotShared)  # A cache may forget, but not be wrong.


class Actor:
    """One client that does one random thing after another."""

    def __init__(self, daemon: DaemonProcess, seed: int, chains: Sequence[tuple[Layout, BlockChain]]) -> None:
        self.random = random.Random(seed)
        self.transports = ("shm", "grpc", "auto")
        self.clients = [daemon.client(f"actor {seed}", transport=name, timeout_s=20) for name in self.transports]
        self.chains = chains
        self.done: Counter[str] = Counter()

    def run(self, count: int) -> Counter[str]:
        choices: list[Callable[[Client, Layout, BlockChain], None]]
        choices = [self.save, self.save, self.load, self.load, self.load, self.view, self.view, self.drop, self.rank]
        for _ in range(count):
            layout, chain = self.random.choice(self.chains)
            action = self.random.choice(choices)
            try:
                action(self.random.choice(self.clients), layout, chain)
                self.done[action.__name__] += 1
            except _PERMITTED as error:
                self.done[type(error).__name__] += 1
        return self.done

    def save(self, client: Client, layout: Layout, chain: BlockChain) -> None:
        part = chain[: self.random.randint(1, len(chain))]
        durability = self.random.choice([Durability.DRAM, Durability.DRAM, Durability.SSD])
        result = client.open_layout(layout).save(part, layers_of(layout, part), durability)
        for _, error in result.refused:
            assert isinstance(error, KVError)
            raise error

    def load(self, client: Client, layout: Layout, chain: BlockChain) -> None:
        with client.open_layout(layout).lookup(chain, lease_ttl_s=10) as lease:
            if not lease.hit_blocks:
                return
            first = self.random.randrange(lease.hit_blocks)
            count = self.random.randint(1, lease.hit_blocks - first)
            expected = layers_of(layout, chain[first : first + count])
            stop_at = self.random.choice([None, 1])  # Some leave early.
            for layer in lease.load(first_block=first, block_count=count):
                assert layer.data.tobytes() == np.concatenate(expected[layer.index]).tobytes()
                if layer.index == stop_at:
                    break

    def view(self, client: Client, layout: Layout, chain: BlockChain) -> None:
        with client.open_layout(layout).lookup(chain, lease_ttl_s=10) as lease:
            if not lease.hit_blocks:
                return
            with lease.view() as view:
                found = [[each.copy() for (each,) in view.slices(layer)] for layer in range(layout.layers)]
            assert np.array_equal(found, layers_of(layout, chain[: lease.hit_blocks]))

    def rank(self, client: Client, layout: Layout, chain: BlockChain) -> None:
        whole, shard = client.open_layout(layout), Shard(1, 3, 1, 2)
        with client.open_layout(layout, shard).lookup(chain, lease_ttl_s=10) as lease:
            if not lease.hit_blocks:
                return
            part = chain[: lease.hit_blocks]
            for layer, expected in zip(lease.load(), layers_of(layout, part)[1:3], strict=True):
                arrays = whole.layer_arrays(np.concatenate(expected), part.token_counts)
                assert layer.data.tobytes() == b"".join(each[1:2].tobytes() for pair in arrays for each in pair)

    def drop(self, client: Client, layout: Layout, chain: BlockChain) -> None:
        part = chain[self.random.randrange(len(chain)) :]
        if self.random.random() < 0.7:
            client.evict(part, self.random.choice(["dram", "dram", "ssd"]))
        else:
            client.admin.discard(part)

    def close(self) -> None:
        for client in self.clients:
            client.close()


def run(daemon: DaemonProcess, seed: int, count: int) -> Counter[str]:
    """What was done, by name."""
    shapes = random.Random(seed)
    chains = [
        (layout, new_chain(layout, shapes.randint(1, longest), f"random {seed} {number}"))
        for layout, longest in ((SMALL, 40), (LARGE, 9))
        for number in range(_CHAINS)
    ]
    actors = [Actor(daemon, seed * _CLIENTS + number, chains) for number in range(_CLIENTS)]
    total: Counter[str] = Counter()
    try:
        with ThreadPoolExecutor(_CLIENTS) as threads:
            for done in threads.map(lambda actor: actor.run(count // _CLIENTS), actors):
                total += done
        loaded = Counter[str]()
        for actor in actors:
            for client in actor.clients:
                loaded.update(client.stats().loaded_bytes)
        assert loaded["shm"] and loaded["grpc"], "one of the transports was never used"
    finally:
        for actor in actors:
            actor.close()
    with daemon.client() as client:
        status = client.admin.status()
        assert status.counters["quarantined_blocks"] == 0
        assert status.counters["evicted_dram_blocks"] > 0, "there was no pressure"
        client.admin.discard_all()
        until(lambda: client.admin.status().dram.used_bytes == 0)  # What is being read ahead ends first.
    assert not daemon.logged("a handler failed: ReserveBlocks")
    assert not [line for line in daemon.log if line["level"] == "error"]
    return total


@pytest.fixture
def daemon(new_daemon: Callable[..., DaemonProcess]) -> DaemonProcess:
    return new_daemon(dram__capacity_bytes=12 * MIB, index__volatile_map_bytes=4 * MIB, ssd__capacity_bytes=40 * MIB)


@pytest.mark.parametrize("seed", [1])
def test_random_operations_give_no_wrong_byte(daemon: DaemonProcess, seed: int) -> None:
    done = run(daemon, seed, 450)
    assert min(done[name] for name in ("save", "load", "view", "rank", "drop")) > 5, done


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 108))
def test_an_hours_worth_of_random_operations_gives_no_wrong_byte(daemon: DaemonProcess, seed: int) -> None:
    done = run(daemon, seed, 30_000)
    assert min(done[name] for name in ("save", "load", "view", "rank", "drop")) > 1000, done
