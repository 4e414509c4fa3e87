"""Saves during the forward pass, to a real daemon: the engine does not wait, and each save is counted."""

from __future__ import annotations

import gc
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice, CpuStream
from kvservice_adapter.save import LayerSaver, SaveJob, SaverStats
from kvservice_api.errors import DaemonUnavailable, KVError
from kvservice_client import BlockCache, BlockChain, Layout, SaveResult
from tests.contracts.device import WAIT_S, holding
from tests.daemon import MIB, DaemonProcess, until
from tests.integration import conversations

LAYOUT = Layout("saved", "bfloat16", layers=4, kv_heads=2, k_head_dim=16, v_head_dim=8, block_tokens=16)
TOKENS = 40  # Two blocks and a half.
SAVE_BYTES = TOKENS * LAYOUT.bytes_per_token
States = list[tuple[torch.Tensor, torch.Tensor]]


class HeldDevice(CpuDevice):
    """A CPU device whose streams can be paused by name."""

    def __init__(self) -> None:
        self.streams: dict[str, CpuStream] = {}

    def stream(self, name: str) -> CpuStream:
        self.streams[name] = super().stream(name)
        return self.streams[name]

    def hold(self, name: str) -> threading.Event:
        gate = threading.Event()
        self.streams[name].submit(holding(gate))
        return gate


@pytest.fixture
def blocks(daemon: DaemonProcess) -> Iterator[BlockCache]:
    with daemon.client("saver", timeout_s=10) as client:
        yield client.open_layout(LAYOUT)


def new_chain() -> BlockChain:
    return conversations.new_chain(LAYOUT, TOKENS)


def new_states() -> States:
    """A model's output: keys and values of each layer, ``[batch, head, token, dim]``."""
    return [
        (torch.randn(1, 2, TOKENS, 16).bfloat16(), torch.randn(1, 2, TOKENS, 8).bfloat16())
        for _ in range(LAYOUT.layers)
    ]


def give(job: SaveJob | None, states: States) -> SaveJob:
    assert job is not None
    for index, (keys, values) in enumerate(states):
        job.layer(index, Pages(keys, values, [0]))
    return job


def room_for(saves: int, blocks: BlockCache) -> LayerSaver:
    staged = -(-SAVE_BYTES // 4096) * 4096  # Staging reserves whole pages.
    return LayerSaver(CpuDevice(), blocks, staging_bytes=saves * staged)


def is_stored(blocks: BlockCache, chain: BlockChain, states: States) -> bool:
    """Whether the daemon has all of it, to the bit."""
    with blocks.lookup(chain) as lease:
        if lease.hit_blocks < len(chain):
            return False
        for loaded, (keys, values) in zip(lease.load(), states, strict=True):
            first = 0
            for key_part, value_part in blocks.layer_arrays(loaded.data, chain.token_counts):
                end = first + key_part.shape[1]
                assert np.array_equal(key_part, keys[0, :, first:end].view(torch.int16).numpy())
                assert np.array_equal(value_part, values[0, :, first:end].view(torch.int16).numpy())
                first = end
    return True


def test_what_was_computed_is_stored_to_the_bit(blocks: BlockCache) -> None:
    saver, chain, states, told = (
        LayerSaver(CpuDevice(), blocks, staging_bytes=MIB),
        new_chain(),
        new_states(),
        list[Any](),
    )

    give(saver.begin(chain), states).commit(on_done=told.append)

    assert saver.flush(WAIT_S)
    assert is_stored(blocks, chain, states)
    assert told == [SaveResult(3, 0, [])]
    assert saver.stats == SaverStats(saved=1, stored_blocks=3, sent_bytes=SAVE_BYTES)
    give(saver.begin(chain), states).commit()
    assert saver.flush(WAIT_S)
    assert (saver.stats.stored_blocks, saver.stats.already_stored_blocks) == (3, 3)
    assert saver.staged_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16, torch.float32], ids=str)
def test_pages_of_another_element_type_are_refused_at_once(blocks: BlockCache, dtype: torch.dtype) -> None:
    job = LayerSaver(CpuDevice(), blocks, staging_bytes=MIB).begin(new_chain())
    assert job is not None
    keys, values = ((states.to(dtype)) for states in new_states()[0])

    with pytest.raises(ValueError, match="the layer has bfloat16 with 16 and 8"):
        job.layer(0, Pages(keys, values, [0]))


def test_the_engine_waits_neither_for_copies_nor_for_the_daemon(blocks: BlockCache) -> None:
    device = HeldDevice()
    saver, chain, states = LayerSaver(device, blocks, staging_bytes=MIB), new_chain(), new_states()
    gate = device.hold("kvservice-gather")

    job = give(saver.begin(chain), states)
    job.commit()

    assert not saver.flush(0.0)
    gate.set()
    assert saver.flush(WAIT_S)
    assert is_stored(blocks, chain, states)


def test_tensors_that_the_engine_replaces_are_saved_as_they_were(blocks: BlockCache) -> None:
    device = HeldDevice()
    saver, chain, states = LayerSaver(device, blocks, staging_bytes=MIB), new_chain(), new_states()
    gate = device.hold("kvservice-gather")
    grown = [(keys.clone(), values.clone()) for keys, values in states]

    give(saver.begin(chain), grown).commit()
    for layer, (keys, values) in enumerate(grown):  # As a decode step does; nothing refers to the old tensors any more.
        grown[layer] = (torch.cat([keys, keys[:, :, :1]], 2), torch.cat([values, values[:, :, :1]], 2))
    gate.set()

    assert saver.flush(WAIT_S)
    assert is_stored(blocks, chain, states)


def test_an_event_tells_when_a_layers_pages_may_be_written_again(blocks: BlockCache) -> None:
    saver, chain, states = LayerSaver(CpuDevice(), blocks, staging_bytes=MIB), new_chain(), new_states()
    keys, values = torch.empty(3, 2, 16, 16).bfloat16(), torch.empty(3, 2, 16, 8).bfloat16()  # The engine's only pages.
    pages, job = Pages(keys, values, [2, 0, 1]), saver.begin(chain)
    assert job is not None

    for layer, (new_keys, new_values) in enumerate(states):
        for page, first in ((2, 0), (0, 16), (1, 32)):
            end = min(first + 16, TOKENS)
            keys[page, :, : end - first] = new_keys[0, :, first:end]
            values[page, :, : end - first] = new_values[0, :, first:end]
        assert job.layer(layer, pages).wait(WAIT_S)
    job.commit()

    assert saver.flush(WAIT_S)
    assert is_stored(blocks, chain, states)


def test_full_staging_drops_a_save_and_counts_it_and_takes_the_next_once_there_is_room(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon = new_daemon()
    with daemon.client(timeout_s=WAIT_S) as client:
        blocks = client.open_layout(LAYOUT)
        assert blocks.contains(new_chain()) == 0  # Attached.
        saver, chains, states = room_for(3, blocks), [new_chain() for _ in range(5)], new_states()
        daemon.process.send_signal(signal.SIGSTOP)

        jobs = [saver.begin(chain) for chain in chains]
        for job in jobs[:2]:
            give(job, states).commit()

        assert [job is None for job in jobs] == [False, False, False, True, True]
        assert (saver.stats.dropped, saver.stats.dropped_blocks) == (2, 6)
        daemon.process.send_signal(signal.SIGCONT)
        assert saver.flush(WAIT_S)
        give(saver.begin(chains[3]), states).commit()
        give(jobs[2], states).commit()
        assert saver.flush(WAIT_S)
        assert [is_stored(blocks, chain, states) for chain in chains] == [True, True, True, True, False]
        assert (saver.stats.saved, saver.stats.dropped, saver.staged_bytes) == (4, 2, 0)


def test_a_save_larger_than_all_staging_is_dropped(blocks: BlockCache) -> None:
    saver = LayerSaver(CpuDevice(), blocks, staging_bytes=SAVE_BYTES - 1)

    assert saver.begin(new_chain()) is None
    assert saver.stats == SaverStats(dropped=1, dropped_blocks=3)


def test_a_daemon_that_is_away_is_counted_and_the_saver_continues_once_it_is_back(
    new_daemon: Callable[..., DaemonProcess],
) -> None:
    daemon, told = new_daemon(), list[Any]()
    with daemon.client(timeout_s=WAIT_S, reconnect_wait_s=0.05) as client:
        blocks = client.open_layout(LAYOUT)
        saver, chain, states = LayerSaver(CpuDevice(), blocks, staging_bytes=MIB), new_chain(), new_states()
        give(saver.begin(chain), states).commit()
        assert saver.flush(WAIT_S)

        daemon.kill()
        give(saver.begin(new_chain()), states).commit(on_done=told.append)
        assert saver.flush(WAIT_S)
        assert saver.stats == SaverStats(saved=1, stored_blocks=3, sent_bytes=SAVE_BYTES, failed=1, failed_blocks=3)
        assert isinstance(told[0], DaemonUnavailable)
        assert saver.staged_bytes == 0

        daemon.start()
        later = new_chain()
        until(lambda: _saved(saver, later, states))
        assert is_stored(blocks, later, states)


def _saved(saver: LayerSaver, chain: BlockChain, states: States) -> bool:
    told = list[Any]()
    give(saver.begin(chain), states).commit(on_done=told.append)
    assert saver.flush(WAIT_S)
    assert isinstance(told[0], SaveResult | KVError)
    return isinstance(told[0], SaveResult)


@pytest.mark.parametrize("way", ["abandoned", "dropped"])
def test_a_job_that_comes_to_nothing_gives_its_staging_back_after_its_last_copy(blocks: BlockCache, way: str) -> None:
    device = HeldDevice()
    saver, chain, states = LayerSaver(device, blocks, staging_bytes=MIB), new_chain(), new_states()
    gate = device.hold("kvservice-gather")
    job = saver.begin(chain)
    assert job is not None
    job.layer(0, Pages(*states[0], [0]))

    if way == "abandoned":
        job.abandon()
        job.abandon()
        with pytest.raises(ValueError, match="ended"):
            job.commit()
    del job
    gc.collect()

    assert saver.staged_bytes  # The copy still writes there.
    assert not saver.flush(0.0)
    gate.set()
    assert saver.flush(WAIT_S)
    assert saver.staged_bytes == 0
    assert saver.stats == SaverStats(abandoned=1)
    assert not is_stored(blocks, chain, states)


def test_a_commit_without_all_layers_is_refused_and_nothing_is_sent(blocks: BlockCache) -> None:
    saver, chain, states = LayerSaver(CpuDevice(), blocks, staging_bytes=MIB), new_chain(), new_states()
    job = saver.begin(chain)
    assert job is not None
    job.layer(0, Pages(*states[0], [0]))

    with pytest.raises(ValueError, match="layer 0 was given before"):
        job.layer(0, Pages(*states[0], [0]))
    with pytest.raises(ValueError, match="1 of 4 layers"):
        job.commit()

    assert saver.flush(WAIT_S)
    assert (saver.stats, saver.staged_bytes) == (SaverStats(abandoned=1), 0)
    assert not is_stored(blocks, chain, states)


def test_a_layer_that_cannot_be_copied_keeps_the_save_from_being_sent(blocks: BlockCache) -> None:
    saver, chain, states, told = (
        LayerSaver(CpuDevice(), blocks, staging_bytes=MIB),
        new_chain(),
        new_states(),
        list[Any](),
    )
    states[2] = (states[2][0][:, :, :-1], states[2][1][:, :, :-1])  # A token is missing.

    give(saver.begin(chain), states).commit(on_done=told.append)

    assert saver.flush(WAIT_S)
    assert isinstance(told[0], ValueError)
    assert (saver.stats, saver.staged_bytes) == (SaverStats(failed=1, failed_blocks=3), 0)
    assert blocks.contains(chain) == 0


def test_the_step_after_a_save_may_fail_and_the_saver_continues(blocks: BlockCache) -> None:
    saver, chain, states = LayerSaver(CpuDevice(), blocks, staging_bytes=MIB), new_chain(), new_states()

    def fail(outcome: SaveResult | Exception) -> None:
        raise KeyError("a caller's mistake")

    give(saver.begin(new_chain()), states).commit(on_done=fail)
    give(saver.begin(chain), states).commit()

    assert saver.flush(WAIT_S)
    assert is_stored(blocks, chain, states)
    assert (saver.stats.saved, saver.staged_bytes) == (2, 0)


def test_a_closed_saver_sends_what_was_begun_and_takes_no_more(blocks: BlockCache) -> None:
    device = HeldDevice()
    saver, states = LayerSaver(device, blocks, staging_bytes=MIB), new_states()
    chains = [new_chain(), new_chain()]
    open_job, committed = saver.begin(chains[0]), give(saver.begin(chains[1]), states)
    committed.commit()

    saver.close()

    assert saver.begin(new_chain()) is None
    give(open_job, states).commit()
    assert saver.flush(WAIT_S)
    assert [is_stored(blocks, chain, states) for chain in chains] == [True, True]
    for stream in device.streams.values():
        assert stream.join(WAIT_S)


def test_no_save_and_no_byte_of_staging_is_lost_count_of_among_many_engines(blocks: BlockCache) -> None:
    saver = room_for(4, blocks)
    outcomes: list[Any] = []
    committed: list[tuple[BlockChain, States]] = []
    begun = threading.Barrier(4)

    def engine(seed: int) -> None:
        chance = random.Random(seed)
        begun.wait()
        for _ in range(20):
            chain, states = new_chain(), new_states()
            job = saver.begin(chain)
            if job is None:
                continue
            given = chance.randrange(LAYOUT.layers)
            for index in range(given):
                job.layer(index, Pages(*states[index], [0]))
            way = chance.randrange(3)
            if way == 0:
                job.abandon()
            elif way == 1:
                del job
            else:
                for index in range(given, LAYOUT.layers):
                    job.layer(index, Pages(*states[index], [0]))
                job.commit(on_done=outcomes.append)
                committed.append((chain, states))

    engines = [threading.Thread(target=engine, args=(seed,)) for seed in range(4)]
    for each in engines:
        each.start()
    for each in engines:
        each.join(60)

    gc.collect()
    assert saver.flush(WAIT_S)
    stats = saver.stats
    assert stats.saved == len(committed) == len(outcomes)
    assert stats.saved + stats.abandoned + stats.dropped == 80
    assert (stats.failed, saver.staged_bytes) == (0, 0)
    assert all(is_stored(blocks, chain, states) for chain, states in committed)
