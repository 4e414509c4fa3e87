"""Blocks go from an engine's pages to a daemon, and back into other pages: what every paged engine's connector uses."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice_adapter.breaker import Breaker, probe_of
from kvservice_adapter.device.arrays import view_of
from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.engine.page_loads import AnswerWait, PagedLayers, PrefixLoad, Waits, release_on
from kvservice_adapter.engine.page_saves import PageSave, PageSaver
from kvservice_adapter.load import LayerLoader, LoadFailed
from kvservice_api.errors import ChecksumMismatch, DeadlineExceeded, TicketForged
from kvservice_client import BlockCache, BlockChain, Client, Layout, Tier, block_chain
from kvservice_client.retry import SYSTEM_CLOCK
from tests.clock import ClientClock
from tests.daemon import MIB, NEVER_S, SOON_S, DaemonProcess, until
from tests.integration.known_blocks import tiers_of
from tests.integration.media import arena, flip_trailer, ssd_file

LAYOUT = Layout("pages", "float32", layers=3, kv_heads=2, k_head_dim=8, v_head_dim=4, block_tokens=32)
PAGE_TOKENS = 12  # No divisor of a block's: blocks begin and end inside pages.
PAGES = 200
IDLE_S = 2.0  # For a daemon that is stopped. One that runs sends something in that time on a busy machine too.

_numbers = count(1)


@pytest.fixture(params=["shm", "grpc"])
def client(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Client]:
    with daemon.client(transport=request.param) as client:
        yield client


@pytest.fixture
def daemon(tmp_path: Any) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path) as daemon:
        yield daemon


class Engine:
    """The pages of an engine, and one sequence in them."""

    def __init__(self, blocks: BlockCache, page_ids: Sequence[int], seed: int = 0) -> None:
        chooser = np.random.default_rng(seed)
        self.keys, self.values = (
            [chooser.random((PAGES, LAYOUT.kv_heads, PAGE_TOKENS, dim), np.float32) for _ in range(LAYOUT.layers)]
            for dim in (LAYOUT.k_head_dim, LAYOUT.v_head_dim)
        )
        self.page_ids = page_ids
        self.device = CpuDevice()
        self.layers = PagedLayers(
            [view_of(each) for each in self.keys],
            [view_of(each) for each in self.values],
            ["float32"] * LAYOUT.layers,
            [0] * LAYOUT.layers,
        )
        self.blocks = blocks
        self.breaker = Breaker(probe_of(blocks))

    def saver(self) -> PageSaver:
        return PageSaver(self.device, self.blocks, self.layers, self.breaker, SYSTEM_CLOCK, staging_bytes=8 * MIB)

    def prefix_load(self, ticket: bytes, begin: int, end: int, waits: Waits | None = None) -> PrefixLoad:
        stream = self.device.stream("test")
        waits = waits or Waits(AnswerWait(SOON_S, SYSTEM_CLOCK), SOON_S, SOON_S)
        return PrefixLoad(stream, self.blocks, ticket, (begin, end), waits, release_on(stream))

    def load(self, ticket: bytes, begin: int, end: int, waits: Waits | None = None) -> None:
        load = self.prefix_load(ticket, begin, end, waits)
        for _ in load.begin(load.pages_of_layer(self.layers, [self.page_ids])):
            pass

    def tokens(self, begin: int, end: int) -> np.ndarray[Any, Any]:
        """All layers' keys and values of tokens of the sequence, ``[layer, head, token, dim of both]``."""
        places = [(self.page_ids[token // PAGE_TOKENS], token % PAGE_TOKENS) for token in range(begin, end)]
        pages, offsets = np.array(places).T
        both = [np.concatenate(each, axis=-1) for each in zip(self.keys, self.values, strict=True)]
        return np.stack([layer[pages, :, offsets].transpose(1, 0, 2) for layer in both])


def save(engine: Engine, chain: BlockChain) -> None:
    saver = engine.saver()
    assert saver.gather([PageSave(chain, 0, [engine.page_ids])], SOON_S).wait(SOON_S)
    until(lambda: engine.blocks.contains(chain) == len(chain))
    saver.close(SOON_S)


def save_in_both_tiers(client: Client, engine: Engine, chain: BlockChain) -> None:
    """So that a load is what finds damage of either: writing to SSD would find that in DRAM before."""
    save(engine, chain)
    until(lambda: tiers_of(client, LAYOUT, chain) == ["dram+ssd"] * len(chain))


@pytest.mark.parametrize(("begin", "end"), [(0, 100), (0, 101), (40, 100), (37, 90)])
def test_tokens_come_back_into_other_pages_and_no_other_token_changes(client: Client, begin: int, end: int) -> None:
    blocks = client.open_layout(LAYOUT)
    chain = block_chain(LAYOUT, range(101), with_partial=True)
    saved = Engine(blocks, [7, 3, 11, 2, 19, 5, 23, 29, 31])
    save(saved, chain)
    loaded = Engine(blocks, [4, 9, 1, 8, 30, 12, 14, 6, 20], seed=1)
    expected = loaded.tokens(0, 101)
    expected[:, :, begin:end] = saved.tokens(begin, end)
    loaded.load(blocks.lookup(chain).export(), begin, end)
    assert np.array_equal(loaded.tokens(0, 101), expected)


def test_more_blocks_than_one_reservation_has_are_saved_with_those_of_other_sequences(client: Client) -> None:
    blocks = client.open_layout(LAYOUT)
    engine = Engine(blocks, list(range(199, 0, -1)))
    long, short = block_chain(LAYOUT, range(40 * 32)), block_chain(LAYOUT, range(5000, 5064))
    saver = engine.saver()
    gathering = saver.gather([PageSave(long, 0, [engine.page_ids]), PageSave(short, 32, [engine.page_ids])], SOON_S)
    assert gathering.wait(SOON_S)
    until(lambda: blocks.contains(long) == len(long) and blocks.contains(short) == len(short))
    other = Engine(blocks, list(range(1, 200)), seed=1)
    other.load(blocks.lookup(long).export(), 0, 40 * 32)
    assert np.array_equal(other.tokens(0, 40 * 32), engine.tokens(0, 40 * 32))
    other.load(blocks.lookup(short).export(), 0, 64)
    assert np.array_equal(other.tokens(0, 64), engine.tokens(32, 96))
    saver.close(SOON_S)


def test_a_reservation_without_an_answer_in_time_is_followed_by_no_other_one(daemon: DaemonProcess) -> None:
    """A step waits once, however many blocks it saves. They are staged, and stored when the daemon answers."""
    with daemon.client(transport="shm") as client:
        blocks = client.open_layout(LAYOUT)
        engine = Engine(blocks, list(range(1, 200)))
        save(engine, block_chain(LAYOUT, range(9000, 9032)))  # The client is attached.
        asked: list[int] = []
        reserve = blocks.reserve

        def counted(chains: Sequence[BlockChain], **options: Any) -> Any:
            asked.append(len(chains))
            return reserve(chains, **options)

        blocks.reserve = counted  # type: ignore[method-assign, assignment]  # It counts the calls of the real one.
        saver = engine.saver()
        chain = block_chain(LAYOUT, range(64 * 32))
        with daemon.stopped():
            gathering = saver.gather([PageSave(chain, 0, [engine.page_ids])], 0.05)
            assert gathering.wait(SOON_S)
            assert saver.is_silent
        assert asked == [1]
        assert gathering.unanswered_s >= 0.05
        until(lambda: blocks.contains(chain) == len(chain))
        saver.close(SOON_S)


def test_a_load_waits_only_as_long_as_its_step_may_for_a_daemon_that_is_stopped(
    client: Client, daemon: DaemonProcess
) -> None:
    blocks = client.open_layout(LAYOUT)
    engine = Engine(blocks, [7, 3, 11, 2, 19, 5, 23, 29, 31])
    chain = block_chain(LAYOUT, range(64))
    save(engine, chain)
    ticket = blocks.lookup(chain).export()
    with daemon.stopped():
        wait = AnswerWait(0.1, SYSTEM_CLOCK)
        with pytest.raises(DeadlineExceeded):
            engine.load(ticket, 0, 64, Waits(wait, NEVER_S, NEVER_S))
        assert wait.remaining_s == 0
        with pytest.raises(DeadlineExceeded):  # Not asked: the step has waited.
            engine.load(ticket, 0, 64, Waits(wait, NEVER_S, NEVER_S))


def test_a_load_ends_when_the_daemon_is_stopped_in_the_middle_of_it(tmp_path: Path) -> None:
    """By gRPC, which sends only a few MiB ahead."""
    layout = Layout("long", "float32", layers=24, kv_heads=1, k_head_dim=512, v_head_dim=512, block_tokens=512)
    with (
        DaemonProcess(tmp_path, dram__capacity_bytes=128 * MIB) as daemon,
        daemon.client(transport="grpc") as client,
    ):
        blocks, chain = client.open_layout(layout), block_chain(layout, range(512))
        keys, values = (np.zeros((1, 1, 512, 512), np.float32) for _ in range(2))
        assert blocks.save(chain, [np.ones(blocks.slice_bytes(512), np.uint8)] * layout.layers).is_complete
        stream = CpuDevice().stream("test")
        waits = Waits(AnswerWait(SOON_S, SYSTEM_CLOCK), NEVER_S, IDLE_S)
        load = PrefixLoad(stream, blocks, blocks.lookup(chain).export(), (0, 512), waits, release_on(stream))
        layers = load.begin(lambda layer: Pages(keys, values, [0]))
        next(layers)
        with daemon.stopped(), pytest.raises(DeadlineExceeded, match="sent nothing"):
            for _ in layers:
                pass


def test_a_load_that_finds_damage_while_the_daemon_is_stopped_ends_too(client: Client, daemon: DaemonProcess) -> None:
    """The client of `daemon.client` waits for `SOON_S` where a call has no other time. In shared memory the client
    finds the damage itself, and the blocks before it need no daemon.
    """
    blocks, chain = client.open_layout(LAYOUT), block_chain(LAYOUT, range(96))
    saved = Engine(blocks, [7, 3, 11, 2, 19, 5, 23, 29])
    save_in_both_tiers(client, saved, chain)
    first_head = saved.tokens(64, 96)[1, 0, :, : LAYOUT.k_head_dim]
    medium = arena(daemon)
    medium.flip(medium.find(first_head.tobytes()) + 5, 0)
    waits = Waits(AnswerWait(SOON_S, SYSTEM_CLOCK), NEVER_S, IDLE_S)
    load = saved.prefix_load(blocks.lookup(chain).export(), 0, 96, waits)
    layers = load.begin(load.pages_of_layer(saved.layers, [saved.page_ids]))
    next(layers)
    waits.answer.allowed_s = 0.1  # For the blocks before the damaged one.
    begin_s = time.monotonic()
    with daemon.stopped(), pytest.raises((DeadlineExceeded, ChecksumMismatch)) as found:
        list(layers)
    assert time.monotonic() - begin_s < SOON_S
    assert load.valid_tokens == (64 if isinstance(found.value, ChecksumMismatch) else 0)
    assert isinstance(found.value, ChecksumMismatch) == (load.transport == "shm")


def test_the_wait_for_answers_begins_again_with_each_of_them() -> None:
    clock = ClientClock()
    wait = AnswerWait(0.5, clock, used_s=0.25)
    assert wait.remaining_s == 0.25
    clock.advance(seconds=1)
    assert wait.remaining_s == 0
    wait.restart()
    assert wait.remaining_s == 0.5


def test_a_load_by_a_ticket_that_no_daemon_made_fails_and_writes_nothing(client: Client) -> None:
    blocks = client.open_layout(LAYOUT)
    engine = Engine(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    before = engine.tokens(0, 101)
    with pytest.raises(TicketForged):
        engine.load(b"no ticket", 0, 64)
    assert np.array_equal(engine.tokens(0, 101), before)


@pytest.fixture(scope="module")
def lasting_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """With `lru`, which reads nothing ahead: the load finds the damage."""
    with DaemonProcess(tmp_path_factory.mktemp("lasting"), mover__policy="lru") as daemon:
        yield daemon


@pytest.fixture(params=["shm", "grpc"])
def lasting_client(lasting_daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Client]:
    with lasting_daemon.client(transport=request.param) as client:
        yield client


@pytest.mark.parametrize("layer", [0, 1, LAYOUT.layers - 1, "trailer"])
@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
@pytest.mark.parametrize(("damaged", "first", "valid"), [(2, 0, 64), (2, 37, 64), (1, 37, 0), (0, 0, 0)])
def test_what_is_before_a_damaged_block_is_loaded(
    lasting_daemon: DaemonProcess,
    lasting_client: Client,
    tier: Tier,
    layer: int | str,
    damaged: int,
    first: int,
    valid: int,
) -> None:
    daemon, client, number = lasting_daemon, lasting_client, next(_numbers)
    blocks = client.open_layout(LAYOUT)
    chain = block_chain(LAYOUT, range(1000 * number, 1000 * number + 101), with_partial=True)
    saved = Engine(blocks, [7, 3, 11, 2, 19, 5, 23, 29, 31], seed=1000 + number)  # Bytes that the store has once.
    save_in_both_tiers(client, saved, chain)
    if tier is Tier.SSD:
        client.evict(chain, Tier.DRAM)
    medium = (arena if tier is Tier.DRAM else ssd_file)(daemon)
    if isinstance(layer, str):
        flip_trailer(medium, LAYOUT, chain.keys[damaged], random.Random(1))
    else:
        first_head = saved.tokens(damaged * 32, damaged * 32 + 32)[layer, 0, :, : LAYOUT.k_head_dim]
        medium.flip(medium.find(first_head.tobytes()) + 5, 0)
    engine = Engine(blocks, [4, 9, 1, 8, 30, 12, 14, 6, 20], seed=1)
    expected = engine.tokens(0, 101)
    load = engine.prefix_load(blocks.lookup(chain).export(), first, 101)
    layers = load.begin(load.pages_of_layer(engine.layers, [engine.page_ids]))
    with pytest.raises(ChecksumMismatch):  # Before the last layer: the engine would take the load as whole.
        list(islice(layers, LAYOUT.layers))
    assert load.valid_tokens == valid
    if valid:
        expected[:, :, first:valid] = saved.tokens(first, valid)
        assert np.array_equal(engine.tokens(0, valid), expected[:, :, :valid])
    assert blocks.contains(chain) == damaged


@pytest.mark.parametrize("layer", range(LAYOUT.layers))
def test_a_damaged_block_is_dropped_before_an_engine_that_loads_by_layers_gets_the_error(
    lasting_daemon: DaemonProcess, lasting_client: Client, layer: int
) -> None:
    blocks, number = lasting_client.open_layout(LAYOUT), next(_numbers)
    chain = block_chain(LAYOUT, range(1000 * number, 1000 * number + 96))
    saved = Engine(blocks, [7, 3, 11, 2, 19, 5, 23, 29], seed=1000 + number)
    save_in_both_tiers(lasting_client, saved, chain)
    medium, first_head = arena(lasting_daemon), saved.tokens(64, 96)[layer, 0, :, : LAYOUT.k_head_dim]
    medium.flip(medium.find(first_head.tobytes()) + 5, 0)
    load = saved.prefix_load(blocks.lookup(chain).export(), 0, 96)
    pages = load.pages_of_layer(saved.layers, [saved.page_ids])
    loading = saved.device.stream("test-loading")
    loader = LayerLoader(saved.device, loading, load, pages, layer_count=LAYOUT.layers, wait_s=SOON_S)
    loader.start()
    with pytest.raises(LoadFailed):
        list(map(loader.wait, range(LAYOUT.layers)))
    load.stop()
    assert blocks.contains(chain) == 2
    until(lambda: loader.is_done)
    assert isinstance(loader.report.error, ChecksumMismatch)
