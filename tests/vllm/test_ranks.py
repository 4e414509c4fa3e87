"""Tensor parallelism through the real worker role: each rank stores its heads, and any number of ranks reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest

from kvservice_api.errors import SessionNotFound
from kvservice_client import BlockCache, Client, Session, Shard
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.ranks import KV, KV_HEADS, LAYERS, Ranks, chain_of, found_tokens, model_folder, request_of

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(
        not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"), reason="this vLLM has no kernels for a CPU"
    ),
]

BLOCK = 48  # Pages of 32, 64 and 128 tokens end inside blocks.
BLOCKS = 4
TOKENS = 3 * BLOCK + 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("store"), dram__capacity_bytes=128 * MIB) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _engines(daemon: DaemonProcess, model: Path, dtype: str) -> Iterator[Any]:
    made: list[Ranks] = []

    @cache
    def engine(size: int, page_tokens: int = 32) -> Ranks:
        made.append(Ranks(model, daemon.address, size=size, page_tokens=page_tokens, dtype=dtype))
        return made[-1]

    yield engine
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def engines(daemon: DaemonProcess, model: Path, dtype: str) -> Iterator[Any]:
    """Makes the ranks of an engine, by their number and the tokens per page. They are kept until the dtype changes."""
    yield from _engines(daemon, model, dtype)


@pytest.fixture(scope="module")
def fp32(daemon: DaemonProcess, model: Path) -> Iterator[Any]:
    """As `engines`, with one dtype."""
    yield from _engines(daemon, model, "float32")


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


_prompts = count(1)


def new_prompt(tokens: int = TOKENS) -> list[int]:
    """A prompt that shares no block with those of other tests."""
    return [next(_prompts), *range(100, 100 + tokens - 1)]


def stored(client: Client, engine: Ranks, shard: Shard | None = None) -> BlockCache:
    return client.open_layout(engine.scheduler.layout, shard)


def save(client: Client, engine: Ranks, prompt: list[int], dtype: torch.dtype = torch.float32) -> KV:
    """Have all ranks store a prompt with random KV."""
    kv = KV(len(prompt), dtype)
    orders = engine.save(prompt, kv)
    for rank in engine.all:
        rank.step(orders)
    wait_until_stored(stored(client, engine), engine, prompt)
    return kv


def wait_until_stored(blocks: BlockCache, engine: Ranks, prompt: list[int]) -> None:
    chain = chain_of(engine.scheduler, prompt)
    until(lambda: blocks.contains(chain) == len(chain))


def counted(engine: Ranks, saved: list[float]) -> list[float]:
    """The blocks that each rank has stored, with those counted before."""
    for number, rank in enumerate(engine.all):
        if (stats := rank.worker.take_stats()) is not None:
            saved[number] += stats.data.get("saved_blocks", 0) + stats.data.get("already_stored_blocks", 0)
    return saved


# Sessions


def test_a_session_names_a_turn_once_all_ranks_have_stored_their_shards(fp32: Any, client: Client) -> None:
    engine, prompt = fp32(2), new_prompt()
    session = client.session(engine.scheduler.layout, "chat")
    chain = chain_of(engine.scheduler, prompt)
    orders = engine.save(prompt, KV(len(prompt), torch.float32), session_id="chat")
    first, second = engine.all
    first.step(orders)
    other = new_prompt()
    both = engine.save(other, KV(len(other), torch.float32), session_id="another")
    for rank in engine.all:
        rank.step(both)
    another = client.session(engine.scheduler.layout, "another")
    until(lambda: exists(another))
    assert not exists(session), "its turn ended earlier, and half of its shards are missing"
    second.step(orders)
    until(lambda: exists(session))
    assert tuple(each.key for each in session.get().slices) == chain.keys


def exists(session: Session) -> bool:
    try:
        session.get()
    except SessionNotFound:
        return False
    return True


# Ranks of all sizes


@pytest.mark.parametrize("page_tokens", [32, 64, 128])
@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (2, 4), (1, 2), (4, 2), (1, 4), (4, 1), (2, 2)])
def test_ranks_read_in_each_byte_what_ranks_of_any_number_stored(
    engines: Any, client: Client, dtype: str, writers: int, readers: int, page_tokens: int
) -> None:
    """What a reader's pages hold is what its own forward would have written there, and nothing beside it."""
    prompt = new_prompt()
    kv = save(client, engines(writers, 64), prompt, getattr(torch, dtype))
    reader: Ranks = engines(readers, page_tokens)
    reader.clear()
    tokens, reports = reader.load([*prompt, 5])
    assert tokens == TOKENS
    pages = reader.page_ids(TOKENS + 1)
    assert all(rank.has_only(kv, pages, 0, TOKENS) for rank in reader.all)
    assert [report.failed for report in reports] == [[]] * readers
    assert not any(rank.worker.take_bad_pages() for rank in reader.all)


@pytest.mark.parametrize("own_tokens", [32, 96, 128])
def test_a_load_begins_and_ends_inside_of_blocks_and_of_pages(fp32: Any, client: Client, own_tokens: int) -> None:
    """vLLM's own pages before it, which other requests may share, stay as they are."""
    prompt = new_prompt()
    kv = save(client, fp32(1), prompt)
    reader: Ranks = fp32(2)
    reader.clear()
    assert reader.load(prompt[: TOKENS - 7] + [5] * 8, own_tokens)[0] == 3 * BLOCK - own_tokens
    pages = reader.page_ids(TOKENS + 1)
    assert all(rank.has_only(kv, pages, own_tokens, 3 * BLOCK) for rank in reader.all)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_prompt_of_which_a_rank_has_stored_nothing_is_a_miss(fp32: Any, client: Client, size: int) -> None:
    """Never a hit that some ranks could load and others not: any number of ranks gets the same answer."""
    prompt = new_prompt()
    writer: Ranks = fp32(2)
    orders = writer.save(prompt, kv := KV(TOKENS, torch.float32))
    writer.all[0].step(orders)
    wait_until_stored(stored(client, writer, Shard(0, LAYERS, 0, KV_HEADS // 2)), writer, prompt)
    reader: Ranks = fp32(size)
    assert found_tokens(reader.scheduler, request_of(prompt)) == 0
    writer.all[1].step(orders)
    wait_until_stored(stored(client, writer), writer, prompt)
    reader.clear()
    assert reader.load([*prompt, 5])[0] == TOKENS
    assert all(rank.has_only(kv, reader.page_ids(TOKENS + 1), 0, TOKENS) for rank in reader.all)


def test_a_hit_is_as_long_as_what_all_ranks_have_stored(fp32: Any, client: Client) -> None:
    prompt, kv = new_prompt(), KV(TOKENS, torch.float32)
    writer: Ranks = fp32(2)
    writer.all[1].step(writer.save(prompt[: 2 * BLOCK], kv))
    writer.all[0].step(writer.save(prompt, kv))
    wait_until_stored(stored(client, writer, Shard(0, LAYERS, 0, KV_HEADS // 2)), writer, prompt)
    wait_until_stored(stored(client, writer), writer, prompt[: 2 * BLOCK])
    for size in (1, 2, 4):
        assert found_tokens(fp32(size).scheduler, request_of(prompt)) == 2 * BLOCK


def test_a_head_that_several_ranks_hold_is_stored_once(fp32: Any, client: Client) -> None:
    """With more ranks than KV heads, the first rank of each head stores it; all of them load it."""
    prompt = new_prompt()
    engine: Ranks = fp32(2 * KV_HEADS)
    orders = engine.save(prompt, kv := KV(TOKENS, torch.float32))
    for rank in engine.all:
        rank.step(orders)
    wait_until_stored(stored(client, engine), engine, prompt)
    saved = [0.0] * len(engine.all)
    until(lambda: sum(counted(engine, saved)) == KV_HEADS * BLOCKS)
    assert saved == [BLOCKS, 0] * KV_HEADS
    for size in (1, 2, 2 * KV_HEADS):
        reader: Ranks = fp32(size)
        reader.clear()
        assert reader.load([*prompt, 5])[0] == TOKENS
        assert all(rank.has_only(kv, reader.page_ids(TOKENS + 1), 0, TOKENS) for rank in reader.all)


# What shares nothing


def test_adapters_and_salts_share_nothing(fp32: Any, client: Client) -> None:
    engine: Ranks = fp32(1)
    prompt, scheduler = new_prompt(3 * BLOCK), engine.scheduler
    kinds: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"lora_request": LoRARequest("x", 1, "/adapters/one")},
        {"lora_request": LoRARequest("x", 1, "/adapters/two")},
        {"lora_request": LoRARequest("y", 2, "/adapters/one")},
        {"lora_request": LoRARequest("y", 2, "/adapters/one"), "cache_salt": "a"},
    ]
    for number, kind in enumerate(kinds):
        found = [found_tokens(scheduler, request_of(prompt, **each)) for each in kinds]
        assert found == [3 * BLOCK - 1] * number + [0] * (len(kinds) - number)
        orders = engine.save(prompt, KV(len(prompt), torch.float32), **kind)
        engine.all[0].step(orders)
        (order,) = orders.saves
        until(lambda chain=order.chain: stored(client, engine).contains(chain) == len(chain))  # type: ignore[misc]


def test_generations_share_nothing(daemon: DaemonProcess, model: Path, client: Client) -> None:
    prompt = new_prompt()
    with closing(Ranks(model, daemon.address, size=1, model_revision="generations")) as engine:
        save(client, engine, prompt)
        assert found_tokens(engine.scheduler, request_of(prompt)) == TOKENS - 1
        assert engine.scheduler.reset()
        assert found_tokens(engine.scheduler, request_of(prompt)) == 0
        orders = engine.save(prompt, KV(TOKENS, torch.float32))
        engine.all[0].step(orders)
        until(lambda: stored(client, engine).contains(orders.saves[0].chain) == len(orders.saves[0].chain))
        assert found_tokens(engine.scheduler, request_of(prompt)) == TOKENS - 1


def test_revisions_share_nothing(daemon: DaemonProcess, model: Path, fp32: Any, client: Client) -> None:
    prompt, first = new_prompt(), fp32(1)
    save(client, first, prompt)
    with closing(Ranks(model, daemon.address, size=1, model_revision="2")) as second:
        assert found_tokens(second.scheduler, request_of(prompt)) == 0
    assert found_tokens(first.scheduler, request_of(prompt)) == TOKENS - 1
