"""The contract of every transport: the same bytes for the same keys, and the same errors.

Subclass it, provide `transport`, inherit the specification. Each transport loads what the others saved: a test has a
client with its own transport, and `other`, which uses frames on a stream.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import GeneratorType
from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import (
    Cancelled,
    ChecksumMismatch,
    DeadlineExceeded,
    InvalidRequest,
    LeaseExpired,
    TierFull,
    UnknownClient,
)
from kvservice_client import BlockCache, BlockChain, Client, Durability, Layout, Shard
from tests.clock import ClientClock
from tests.daemon import MIB, NEVER_S, SOON_S, DaemonProcess, until
from tests.integration.conversations import large_layout, layers_of, new_chain, same, small_layout

# Slices that begin on pages, that follow one another, that take several pieces, and of a single byte.
TINY = Layout("tiny", "uint8", layers=3, kv_heads=1, k_head_dim=1, v_head_dim=0, block_tokens=4)
ODD = Layout("odd", "float32", layers=5, kv_heads=3, k_head_dim=33, v_head_dim=17, block_tokens=96)
LAYOUTS = [TINY, small_layout(), ODD, large_layout()]


def heads_of(whole: BlockCache, chain: BlockChain, layer: Any, shard: Shard) -> bytes:
    """A shard's part of one layer of whole blocks."""
    begin, end = shard.head_begin, shard.head_end
    parts = whole.layer_arrays(layer, chain.token_counts)
    return b"".join(array[begin:end].tobytes() for pair in parts for array in pair)


def leave_memory(client: Client, chain: BlockChain) -> None:
    """Blocks that are on SSD leave DRAM: every transport then needs the daemon for a load."""
    until(lambda: client.evict(chain, "dram").held == 0)


class TransportContract:
    transport: str

    @pytest.fixture
    def client(self, daemon: DaemonProcess) -> Iterator[Client]:
        with daemon.client("contract", transport=self.transport, timeout_s=15) as client:
            yield client

    @pytest.fixture
    def other(self, daemon: DaemonProcess) -> Iterator[Client]:
        with daemon.client("other", transport="grpc", timeout_s=15) as client:
            yield client

    def check_stats(self, client: Client) -> None:
        """Whether this transport moved all bytes."""
        stats = client.stats()
        assert set(stats.loaded_bytes) | set(stats.saved_bytes) == {self.transport}, stats

    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.model_id)
    def test_what_either_side_saved_both_load_bit_for_bit(self, client: Client, other: Client, layout: Layout) -> None:
        for saver, loader in ((client, client), (client, other), (other, client)):
            blocks, chain = (
                saver.open_layout(layout),
                new_chain(layout, 2 * layout.block_tokens + layout.block_tokens // 2),
            )
            layers = layers_of(blocks, chain)
            assert blocks.save(chain, layers).stored == 3
            with loader.open_layout(layout).lookup(chain) as lease:
                assert lease.hit_tokens == chain.token_count
                loaded = list(lease.load())
            assert [layer.index for layer in loaded] == list(range(layout.layers))
            assert same([layer.data for layer in loaded], layers)
        self.check_stats(client)

    def test_any_range_of_the_hits_is_loaded_into_the_buffers_that_are_given(self, client: Client) -> None:
        blocks, chain = client.open_layout(ODD), new_chain(ODD, 6 * ODD.block_tokens + 7)
        layers, size = layers_of(blocks, chain), blocks.slice_bytes(ODD.block_tokens)
        blocks.save(chain, layers)
        with blocks.lookup(chain) as lease:
            for first, count in ((0, 1), (1, 3), (2, None), (6, 1), (0, None)):
                into = [np.zeros(lease.layer_bytes(first, count), np.uint8) for _ in range(ODD.layers)]
                for layer in lease.load(into, first, count):
                    end = None if count is None or first + count > 6 else (first + count) * size
                    assert np.array_equal(into[layer.index], layers[layer.index][first * size : end])
        self.check_stats(client)

    def test_a_rank_loads_its_layers_and_heads_of_whole_blocks(self, client: Client) -> None:
        for layout in (small_layout(), ODD, large_layout()):
            whole, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens + 3)
            layers = layers_of(whole, chain)
            whole.save(chain, layers)
            for shard in (Shard(1, 3, 1, 2), Shard(0, 2, 0, 1), Shard(3, 4, 0, layout.kv_heads)):
                with client.open_layout(layout, shard).lookup(chain) as lease:
                    loaded = [layer.data.tobytes() for layer in lease.load()]
                wanted = range(shard.layer_begin, shard.layer_end)
                assert loaded == [heads_of(whole, chain, layers[layer], shard) for layer in wanted]
        self.check_stats(client)

    def test_blocks_that_several_ranks_saved_are_loaded_whole(self, client: Client) -> None:
        layout = small_layout()
        whole, chain = client.open_layout(layout), new_chain(layout, 2 * layout.block_tokens)
        layers = layers_of(whole, chain)
        for shard in (Shard(0, 4, 0, 1), Shard(0, 4, 1, 2)):
            rank = client.open_layout(layout, shard)
            assert rank.save(chain, [heads_of(whole, chain, layer, shard) for layer in layers]).stored == 2
        with whole.lookup(chain) as lease:
            assert same([layer.data for layer in lease.load()], layers)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.model_id)
    def test_blocks_are_promoted_from_ssd(self, client: Client, layout: Layout) -> None:
        blocks, chain = client.open_layout(layout), new_chain(layout, 2 * layout.block_tokens + 1)
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers, Durability.SSD)
        assert client.evict(chain.keys[1:], "dram").evicted == 2
        with blocks.lookup(chain) as lease:
            assert [run.dram for run in lease.residency] == [True, False]
            assert same([layer.data for layer in lease.load()], layers)
        self.check_stats(client)

    def test_what_is_stored_is_not_stored_again(self, client: Client, other: Client) -> None:
        layout = small_layout()
        blocks, chain = client.open_layout(layout), new_chain(layout, 4 * layout.block_tokens)
        layers = layers_of(blocks, chain)
        size = blocks.slice_bytes(layout.block_tokens)
        other.open_layout(layout).save(chain[1:2], [layer[size : 2 * size] for layer in layers])

        saved, again = blocks.save(chain, layers), blocks.save(chain, layers)

        assert (saved.stored, saved.already_stored, again.stored, again.already_stored) == (3, 1, 0, 4)
        with other.open_layout(layout).lookup(chain) as lease:
            assert same([layer.data for layer in lease.load()], layers)

    def test_many_chains_are_saved_in_one_call_with_a_result_for_each(self, client: Client, other: Client) -> None:
        layout = small_layout()
        blocks, tokens = client.open_layout(layout), layout.block_tokens
        one = new_chain(layout, 3 * tokens + 2)
        chains = [one[:2], new_chain(layout, tokens), one[1:], new_chain(layout, 2 * tokens)[1:], one[:0]]
        layers = [layers_of(blocks, chain) if len(chain) else [] for chain in chains]
        size = blocks.slice_bytes(tokens)
        for first, third in zip(layers[0], layers[2], strict=True):
            third[:size] = first[size:]  # The block that both chains have.
        other.open_layout(layout).save(chains[1], layers[1])

        results = blocks.save_many(list(zip(chains, layers, strict=True)))

        found = [(each.stored, each.already_stored, each.refused) for each in results]
        assert found == [(2, 0, []), (0, 1, []), (2, 1, []), (1, 0, []), (0, 0, [])]
        for chain, saved in zip(chains[:4], layers[:4], strict=True):
            with other.open_layout(layout).lookup(chain) as lease:
                assert same([layer.data for layer in lease.load()], saved)
        shard = other.admin.inspect(chains[3].keys[0]).shards[0]
        assert shard.parent_key == chains[3].parent, "not the last block of the chain before"
        assert client.stats().transports[self.transport].saves == 1

    def test_more_chains_than_one_save_may_have_are_saved_too(self, client: Client) -> None:
        blocks = client.open_layout(TINY)
        chains = [new_chain(TINY, 4 * count + 1) for count in (1, 300, *[5] * 60)]
        layers = [layers_of(blocks, chain) for chain in chains]
        results = blocks.save_many(list(zip(chains, layers, strict=True)), Durability.SSD)
        assert [each.stored for each in results] == [len(chain) for chain in chains]
        for chain, saved in zip(chains, layers, strict=True):
            with blocks.lookup(chain) as lease:
                assert same([layer.data for layer in lease.load()], saved)

    def test_a_durable_save_is_on_ssd_when_it_returns(self, client: Client) -> None:
        layout = small_layout()
        blocks, chain = client.open_layout(layout), new_chain(layout, 3 * layout.block_tokens)
        for _ in range(2):  # At the second save all are stored already.
            assert blocks.save(chain, layers_of(blocks, chain), Durability.SSD).is_complete
            assert all(run.ssd for run in blocks.lookup(chain).residency)

    def test_a_time_for_each_layer_does_not_count_the_callers_time(self, daemon: DaemonProcess) -> None:
        layout, clock = large_layout(), ClientClock()
        chain = new_chain(layout, 2 * layout.block_tokens)
        with daemon.client(transport=self.transport, clock=clock, throttle_bytes_per_s=100e6) as client:
            blocks = client.open_layout(layout)
            layers = layers_of(blocks, chain)
            blocks.save(chain, layers)
            layer_s = layers[0].nbytes / 100e6
            with blocks.lookup(chain, lease_ttl_s=300) as lease:
                for layer in lease.load(layer_timeout_s=2 * layer_s):
                    assert np.array_equal(layer.data, layers[layer.index])
                    clock.advance(seconds=30)
                with pytest.raises(DeadlineExceeded, match="layer"):
                    next(lease.load(layer_timeout_s=layer_s / 2))
                with pytest.raises(InvalidRequest, match="exclude each other"):
                    lease.load(timeout_s=1, layer_timeout_s=1)

    def test_a_layer_that_a_stopped_daemon_does_not_send_ends_the_load_after_its_time(
        self, new_daemon: Callable[..., DaemonProcess]
    ) -> None:
        daemon, layout = new_daemon(), large_layout()
        with daemon.client(transport=self.transport, timeout_s=NEVER_S) as client:
            blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
            blocks.save(chain, layers_of(blocks, chain), Durability.SSD)
            leave_memory(client, chain)
            lease = blocks.lookup(chain, lease_ttl_s=NEVER_S)
            with daemon.stopped():
                begin_s = time.monotonic()
                with pytest.raises(DeadlineExceeded, match="layer"):
                    next(lease.load(layer_timeout_s=0.1))
                assert time.monotonic() - begin_s < SOON_S
                with pytest.raises(DeadlineExceeded, match="sent nothing"):
                    next(lease.load(layer_timeout_s=NEVER_S, idle_timeout_s=0.1))

    def test_cancel_ends_a_load_that_waits_for_a_stopped_daemon(self, new_daemon: Callable[..., DaemonProcess]) -> None:
        daemon, layout = new_daemon(), large_layout()
        with daemon.client(transport=self.transport, timeout_s=NEVER_S) as client, ThreadPoolExecutor() as threads:
            blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
            blocks.save(chain, layers_of(blocks, chain), Durability.SSD)
            for whole_s, layer_s in ((NEVER_S, None), (None, NEVER_S)):
                leave_memory(client, chain)
                lease = blocks.lookup(chain, lease_ttl_s=NEVER_S)
                with daemon.stopped():
                    load = threads.submit(next, lease.load(timeout_s=whole_s, layer_timeout_s=layer_s))
                    with pytest.raises(TimeoutError):
                        load.result(0.2)  # It waits for the daemon by now; if not, `cancel` ends it at its begin.
                    lease.cancel()
                    with pytest.raises(Cancelled):
                        load.result(SOON_S)
                lease.release()

    def test_cancel_ends_a_load_that_waits_for_its_lease_to_be_renewed(
        self, new_daemon: Callable[..., DaemonProcess]
    ) -> None:
        daemon, layout, clock = new_daemon(), large_layout(), ClientClock()
        chain = new_chain(layout, layout.block_tokens)
        with (
            daemon.client(transport=self.transport, timeout_s=NEVER_S, clock=clock) as client,
            ThreadPoolExecutor() as threads,
        ):
            blocks = client.open_layout(layout)
            blocks.save(chain, layers_of(blocks, chain))
            lease = blocks.lookup(chain, lease_ttl_s=300)
            load = lease.load(layer_timeout_s=NEVER_S)
            next(load)
            clock.advance(seconds=200)  # More than half of the lease's time.
            with daemon.stopped():
                waiting = threads.submit(next, load)
                with pytest.raises(TimeoutError):
                    waiting.result(0.2)
                lease.cancel()
                with pytest.raises(Cancelled):
                    waiting.result(SOON_S)

    def test_after_cancel_a_lease_loads_nothing_and_other_leases_do(self, client: Client) -> None:
        layout = large_layout()
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers)
        with blocks.lookup(chain) as lease, blocks.lookup(chain) as other:
            running = lease.load()
            next(running)
            lease.cancel()
            for load in (running, lease.load()):
                with pytest.raises(Cancelled):
                    next(load)
            assert lease.remaining_s > 0
            assert same([layer.data for layer in other.load()], layers)

    def test_a_released_lease_loads_nothing(self, client: Client) -> None:
        layout = small_layout()
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))
        lease = blocks.lookup(chain)
        lease.release()
        with pytest.raises(LeaseExpired):
            list(lease.load())

    def test_a_load_that_is_left_early_gives_the_blocks_free(self, client: Client) -> None:
        layout = large_layout()
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain), Durability.SSD)
        lease = blocks.lookup(chain)
        for _ in lease.load():
            break
        lease.release()
        until(lambda: client.evict(chain, "dram").held == 0)

    def test_a_block_larger_than_dram_is_refused_and_nothing_is_lost(
        self, new_daemon: Callable[..., DaemonProcess]
    ) -> None:
        daemon = new_daemon(dram__capacity_bytes=12 * MIB, index__volatile_map_bytes=4 * MIB)
        with daemon.client(transport=self.transport) as client:
            small, layout = client.open_layout(small_layout()), large_layout()
            chain = new_chain(small_layout(), 3 * 8)
            layers = layers_of(small, chain)
            small.save(chain, layers)
            blocks, large = client.open_layout(layout), new_chain(layout, layout.block_tokens)

            [(position, error)] = blocks.save(large, layers_of(blocks, large)).refused

            assert (position, type(error)) == (0, TierFull)
            assert blocks.contains(large) == 0
            results = blocks.save_many([(large, layers_of(blocks, large)), (large, layers_of(blocks, large))])
            assert [(each.stored, type(each.refused[0][1])) for each in results] == [(0, TierFull)] * 2
            with small.lookup(chain) as lease:
                assert same([layer.data for layer in lease.load()], layers)

    def test_a_damaged_block_is_an_error_and_then_a_miss(self, daemon: DaemonProcess, client: Client) -> None:
        layout = small_layout()
        blocks = client.open_layout(layout)
        for part in ("slice", "trailer"):
            chain = new_chain(layout, 2 * layout.block_tokens)
            layers = layers_of(blocks, chain)
            blocks.save(chain, layers)
            flip(daemon, chain.keys[1] if part == "trailer" else layers[2][-64:].tobytes())
            with blocks.lookup(chain) as lease, pytest.raises(ChecksumMismatch):
                list(lease.load())
            assert blocks.contains(chain) == 1

    def test_many_small_blocks_of_one_chain(self, client: Client, other: Client) -> None:
        blocks, chain = client.open_layout(TINY), new_chain(TINY, 1000 * 4 + 1)
        layers = layers_of(blocks, chain)
        assert blocks.save(chain, layers).stored == 1001
        for loader in (client, other):
            with loader.open_layout(TINY).lookup(chain) as lease:
                assert same([layer.data for layer in lease.load()], layers)

    def test_the_meter_counts_each_transport_alike(self, client: Client) -> None:
        layout = small_layout()
        blocks, chain = client.open_layout(layout), new_chain(layout, 2 * layout.block_tokens)
        layers = layers_of(blocks, chain)
        blocks.save(chain, layers)
        with blocks.lookup(chain) as lease:
            list(lease.load())

        (counted,) = client.stats().transports.values()
        size_bytes = sum(layer.nbytes for layer in layers)
        assert (counted.saves, counted.saved_bytes, counted.loads, counted.loaded_bytes) == (1, size_bytes) * 2
        assert (counted.views, counted.viewed_bytes, counted.fallbacks) == (0, 0, 0)
        assert counted.load_seconds > 0 and counted.save_seconds > 0

    def test_a_suspended_load_holds_at_most_three_generators_and_closing_it_ends_them(self, client: Client) -> None:
        layout = large_layout()
        blocks, chain = client.open_layout(layout), new_chain(layout, 2 * layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))
        with blocks.lookup(chain) as lease:
            before = suspended_generators()
            load = lease.load()
            next(load)
            held = [each for each in suspended_generators() if not any(each is other for other in before)]
            assert 1 <= len(held) <= 3, held
            load.close()
            assert all(each.gi_frame is None for each in held)

    def test_a_closed_client_cannot_be_used(self, daemon: DaemonProcess) -> None:
        layout = small_layout()
        client = daemon.client(transport=self.transport)
        blocks, chain = client.open_layout(layout), new_chain(layout, layout.block_tokens)
        blocks.save(chain, layers_of(blocks, chain))
        client.close()
        with pytest.raises(Exception, match="closed") as caught:
            blocks.save(new_chain(layout, 8), layers_of(blocks, chain))
        assert not isinstance(caught.value, UnknownClient)


def suspended_generators() -> list[GeneratorType[Any, Any, Any]]:
    """Generators of the client's code that run; threads that help with copies have none."""
    return [
        each
        for each in gc.get_objects()
        if type(each) is GeneratorType and each.gi_frame is not None and "kvservice_client" in each.gi_code.co_filename
    ]


def flip(daemon: DaemonProcess, pattern: bytes) -> None:
    """Change the last byte of the arena's only place that has these bytes."""
    from tests.integration.media import arena

    medium = arena(daemon)
    medium.flip(medium.find(pattern) + len(pattern) - 1, 3)
