"""The shared parts are enough for another engine: here with pages of 16 tokens in NumPy, without transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvservice_adapter.breaker import Breaker, probe_of
from kvservice_adapter.device.base import Pages
from kvservice_adapter.device.cpu import CpuDevice
from kvservice_adapter.engine import session_sync
from kvservice_adapter.engine.forward_saves import ForwardSaves
from kvservice_adapter.engine.planning import LoadPlanner
from kvservice_adapter.engine.prefix_lookup import PrefixLookup
from kvservice_adapter.engine.request_report import Request
from kvservice_adapter.engine.turn_saver import Saved, Turn, TurnSaver
from kvservice_adapter.layer_source import HostLayers
from kvservice_adapter.load import LayerLoader, LoadReport
from kvservice_adapter.rates import Rates
from kvservice_adapter.save import LayerSaver
from kvservice_adapter.session import Keys
from kvservice_api.cost import Kind
from kvservice_client import Client, Durability, Layout
from kvservice_client.retry import Deadline
from tests.contracts.device import WAIT_S
from tests.daemon import MIB, DaemonProcess, until

LAYOUT = Layout("paged", "float32", layers=3, kv_heads=2, k_head_dim=8, v_head_dim=4, block_tokens=32)
PAGE_TOKENS, PAGES = 16, 24
Array = NDArray[np.float32]


class History:
    """The interface that a request reads."""

    error: BaseException | None = None
    recompute_s = lost_s = 0.0

    def __init__(self, *loaders: LayerLoader) -> None:
        self._loaders = loaders

    @property
    def load_reports(self) -> list[LoadReport]:
        return [loader.report for loader in self._loaders]


class PagedEngine:
    """Its KV depends only on token and position, so that loaded KV can be compared."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client, self.blocks = client, client.open_layout(LAYOUT)
        self.keys = Keys(LAYOUT)
        self.device, self.rates = CpuDevice(), Rates()
        self.breaker = Breaker(probe_of(self.blocks))
        self.saver = LayerSaver(self.device, self.blocks, staging_bytes=MIB)
        self.lookup = PrefixLookup(client, self.blocks, self._no_turns)
        self.planner = LoadPlanner(LAYOUT, self.rates, self.breaker)
        self.pool = [
            (np.zeros((PAGES, 2, PAGE_TOKENS, 8), np.float32), np.zeros((PAGES, 2, PAGE_TOKENS, 4), np.float32))
            for _ in range(LAYOUT.layers)
        ]
        self.table: list[int] = np.random.default_rng(seed).permutation(PAGES).tolist()

    def pages(self, layer: int, first_token: int = 0) -> Pages:
        return Pages(*self.pool[layer], page_ids=self.table, first_token=first_token)

    def tokens(self, layer: int, count: int) -> list[Array]:
        """Keys and values of the first tokens, ``[head, token, dim]``, by its page table."""
        return [np.concatenate(list(states[self.table]), axis=1)[:, :count] for states in self.pool[layer]]

    def compute(self, token_ids: NDArray[Any], first: int) -> None:
        for layer, (keys, values) in enumerate(self.pool):
            for at in range(first, len(token_ids)):
                place = self.table[at // PAGE_TOKENS], slice(None), at % PAGE_TOKENS
                keys[place] = token_ids[at] + layer * 1000 + np.arange(8)
                values[place] = at + layer * 1000 + np.arange(4)

    def forward(self, token_ids: NDArray[Any], first: int, parent: bytes) -> ForwardSaves[int]:
        """Compute all tokens from `first` on, where a block begins, and save the whole blocks among them."""
        saves: ForwardSaves[int] = ForwardSaves(self.saver, self.breaker)
        chain = self.keys.chain(token_ids[first:], parent)
        block_bytes = LAYOUT.block_tokens * LAYOUT.bytes_per_token
        saves.open(chain, block_bytes, lambda block: first + block * LAYOUT.block_tokens)
        self.compute(token_ids, first)
        for layer in range(LAYOUT.layers):
            saves.layer(layer, lambda token, layer=layer: self.pages(layer, token))  # type: ignore[misc]
        assert saves.commit()
        return saves

    def close(self) -> None:
        self.saver.close()
        self.breaker.close()

    def _no_turns(self) -> Any:
        raise AssertionError("nothing is read elsewhere than it was stored")


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client("paged", timeout_s=15) as client:
        yield client


def test_an_engine_with_pages_saves_a_turn_and_another_one_loads_it_and_continues(client: Client) -> None:
    ids, hidden = np.arange(500, 500 + 150), np.zeros(150, bool)
    first = PagedEngine(client, seed=1)
    saves = first.forward(ids[:100], 0, first.keys.root)
    assert saves.wait(WAIT_S)
    chain = first.keys.chain(ids[:100])
    assert saves.take_stored(chain) == len(chain) == 3
    session_sync.sync_session(client, LAYOUT, "paged-chat", chain)

    second = PagedEngine(client, seed=2)
    request = Request(client, second.rates, "paged-request")
    found = second.lookup.by_tokens(ids, hidden, 149, second.keys, "paged-chat", Deadline(5.0), "paged-request")
    assert found is not None and (found.tokens, found.tier) == (96, "dram")
    request.looked_up()
    request.tokens, request.tier = found.tokens, found.tier
    request.plan = second.planner.plan(found.tokens, 150 - found.tokens, found.tier, may_mix=True)
    assert request.plan.kind is Kind.LOAD, "no load was measured"
    stream = second.device.stream("paged-load")
    source = HostLayers(stream, lambda: found.load(0, len(found.token_counts)), found.token_counts)
    loader = LayerLoader(
        second.device,
        stream,
        source,
        second.pages,
        layer_count=LAYOUT.layers,
        wait_s=WAIT_S,
        buffer_layers=second.planner.buffer_layers(96, 54, 96, found.tier),
        release=found.release,
    )
    loader.start()
    for layer in range(LAYOUT.layers):
        loader.wait(layer)
        for ours, theirs in zip(second.tokens(layer, 96), first.tokens(layer, 96), strict=True):
            assert np.array_equal(ours, theirs)
    history = History(loader)
    assert not second.planner.load_ended(history.load_reports, None, 0.0, found.tier, request.transport)
    assert second.rates.load_s(found.tokens * LAYOUT.bytes_per_token, "dram", request.transport) is not None

    saves = second.forward(ids, found.tokens, found.keys[-1])
    request.forward_ended(history, 54, 96, 0.01)
    turn_saver = TurnSaver(client, second.blocks, second.device, second.breaker)
    turn = Turn(second.keys.chain(ids, with_partial=True), second.pages, "paged-chat")
    saved = turn_saver.save(turn, Durability.DRAM, second.device.computed(), saves)

    assert saved == Saved(stored=2, already_stored=3)
    state = client.session(LAYOUT, "paged-chat").get()
    assert (state.token_count, state.slice_count, state.tail_tokens) == (150, 5, 150 - 128)
    until(lambda: len(client.admin.explain_request("paged-request").reports) > 0)
    report = client.admin.explain_request("paged-request").reports[0].report
    assert (report.history_tokens, report.loaded_tokens, report.new_tokens) == (96, 96, 54)
    assert report.loaded_bytes == 96 * LAYOUT.bytes_per_token
    first.close()
    second.close()
    turn_saver.close()
