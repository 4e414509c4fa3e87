"""A real vLLM whose conversations come back from a real daemon: the same tokens, and the KV that they must have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_client import BlockCache, Client, block_chain
from tests.daemon import MIB, DaemonProcess, until
from tests.vllm.engine import (
    NOT_KEPT,
    PATIENT,
    Engine,
    engine,
    model_folder,
    model_layout,
    transfer_config,
    wait_until_stored,
)

fast = pytest.mark.fast

BLOCK = 64  # The model computes each prompt without the store too, which takes most of the time of these tests.
MODES = ["whole", "layers", "between_steps"]
LAYOUT = model_layout(block_tokens=BLOCK)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("store")
    with DaemonProcess(folder, dram__capacity_bytes=512 * MIB, ssd__capacity_bytes=1024 * MIB) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def vllm(daemon: DaemonProcess) -> Iterator[Engine]:
    settings = transfer_config(
        address=daemon.address,
        model_id=LAYOUT.model_id,
        model_revision=LAYOUT.model_revision,
        block_tokens=BLOCK,
        **PATIENT,
    )
    with engine(model_folder(), settings, block_size=32) as running:
        yield running


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Token ids of a text without repetitions."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    lines = (
        f"The river of city {each} is {each * each % 89} miles long and meets river {each + 7}." for each in range(200)
    )
    ids: list[int] = tokenizer.encode(" ".join(lines))
    return ids


class Prompts:
    """Prompts that share no block with those of other tests."""

    def __init__(self, text: list[int]) -> None:
        self._text, self._next = text, 0

    def new(self, tokens: int) -> list[int]:
        self._next += 1
        return [self._next + 300, *self._text[: tokens - 1]]


@pytest.fixture(scope="module")
def prompts(text: list[int]) -> Prompts:
    return Prompts(text)


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture(scope="module")
def stored(client: Client) -> BlockCache:
    """The blocks that the daemon has of this model."""
    return client.open_layout(LAYOUT)


def leased_blocks(client: Client) -> int:
    """How many blocks the daemon has located so far for leases, to be read in place."""
    return int(client.admin.status().counters["located_blocks"])


def save(vllm: Engine, stored: BlockCache, prompt: list[int], tokens: int = 8) -> list[int]:
    """Have vLLM compute a prompt and save it. Returns its answer."""
    answer = vllm.answer(prompt, tokens, may_load=False)
    wait_until_stored(stored, [*prompt, *answer.token_ids[:-1]])
    return answer.token_ids


@fast
@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_continues_with_the_same_tokens(
    vllm: Engine, client: Client, stored: BlockCache, prompts: Prompts, mode: str
) -> None:
    history, stored_tokens = prompts.new(2 * BLOCK + 30), 0
    for _ in range(3):
        expected = vllm.answer(history, **NOT_KEPT)
        assert expected.cached_tokens == 0
        leased = leased_blocks(client)
        answer = vllm.answer(history, load=mode)
        assert answer.token_ids == expected.token_ids
        assert answer.cached_tokens == stored_tokens
        assert leased_blocks(client) - leased == -(-stored_tokens // BLOCK)  # The daemon counts the same hit.
        until(lambda: client.admin.status().leases == 0)
        history += answer.token_ids
        stored_tokens = len(history) - 1  # vLLM has not computed the last token of its answer.
        wait_until_stored(stored, history[:-1])
        history += prompts.new(BLOCK // 2)


@pytest.mark.parametrize("mode", [pytest.param(MODES[0], marks=fast), *MODES[1:]])
def test_a_prompt_that_is_stored_whole_leaves_one_token_to_compute(
    vllm: Engine, stored: BlockCache, prompts: Prompts, mode: str
) -> None:
    prompt = prompts.new(2 * BLOCK)
    expected = save(vllm, stored, prompt)
    answer = vllm.answer(prompt, load=mode)
    assert (answer.token_ids, answer.cached_tokens) == (expected, 2 * BLOCK - 1)


@fast
def test_only_what_vllm_has_not_itself_is_loaded(vllm: Engine, stored: BlockCache, prompts: Prompts) -> None:
    """vLLM's own pages end inside a block: the block is loaded from there on."""
    prompt = prompts.new(2 * BLOCK + 10)
    expected = save(vllm, stored, prompt)
    vllm.answer(prompt[: BLOCK + 40], 1, **NOT_KEPT)  # Its own pages hold 96 tokens now.
    answer = vllm.answer(prompt, keep_own=True, load="whole")
    assert (answer.token_ids, answer.cached_tokens) == (expected, 2 * BLOCK)


@fast
def test_requests_that_run_together_are_loaded_and_saved_together(
    vllm: Engine, stored: BlockCache, prompts: Prompts
) -> None:
    histories = [prompts.new(BLOCK + 10 * each) for each in range(1, 6)]
    expected = [save(vllm, stored, history) for history in histories]
    answers = vllm.answers(histories)
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.cached_tokens for answer in answers] == [BLOCK] * len(histories)


@fast
def test_stored_blocks_are_the_kv_that_transformers_computes(
    vllm: Engine, stored: BlockCache, prompts: Prompts
) -> None:
    """No test within one engine sees wrong views of its pages: they round-trip."""
    prompt = prompts.new(2 * BLOCK)
    save(vllm, stored, prompt)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    with torch.inference_mode():
        cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
    with stored.lookup(block_chain(LAYOUT, prompt)) as lease:
        assert lease.hit_blocks == 2
        for layer in lease.load():
            arrays = stored.layer_arrays(layer.data, lease.token_counts)
            keys, values = (np.concatenate(each, axis=1) for each in zip(*arrays, strict=True))
            expected = cache.layers[layer.index]
            assert np.abs(keys - expected.keys[0].numpy()).max() < 1e-3
            assert np.abs(values - expected.values[0].numpy()).max() < 1e-3


@fast
def test_what_transformers_stored_vllm_loads(vllm: Engine, daemon: DaemonProcess, prompts: Prompts) -> None:
    prompt = prompts.new(2 * BLOCK + 9)
    expected = vllm.answer(prompt, **NOT_KEPT)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    with Client(daemon.address) as client:
        connector = TransformersConnector(
            client, model, model_id=LAYOUT.model_id, model_revision=LAYOUT.model_revision, block_tokens=BLOCK
        )
        history = connector.restore(prompt)
        with torch.inference_mode():
            model(torch.tensor([prompt]), past_key_values=history.cache)
        assert connector.save(prompt, history.cache, wait_s=60.0).error is None
        assert connector.flush(60.0)
        connector.close()
    answer = vllm.answer(prompt)
    assert (answer.token_ids, answer.cached_tokens) == (expected.token_ids, len(prompt) - 1)


@fast
def test_an_answer_is_saved_too(vllm: Engine, stored: BlockCache, prompts: Prompts) -> None:
    """Blocks that fill while vLLM generates."""
    prompt = prompts.new(BLOCK - 10)
    answer = save(vllm, stored, prompt, tokens=30)
    longer = [*prompt, *answer, *prompts.new(20)]
    expected = vllm.answer(longer, **NOT_KEPT)
    found = vllm.answer(longer)
    assert (found.token_ids, found.cached_tokens) == (expected.token_ids, len(prompt) + len(answer) - 1)


@fast
def test_a_new_generation_finds_nothing_of_the_former(vllm: Engine, stored: BlockCache, prompts: Prompts) -> None:
    prompt = prompts.new(BLOCK + 5)
    expected = save(vllm, stored, prompt)
    assert vllm.answer(prompt, may_save=False).cached_tokens == BLOCK
    assert vllm.llm.reset_prefix_cache(reset_connector=True)
    answer = vllm.answer(prompt)
    assert (answer.token_ids, answer.cached_tokens) == (expected, 0)
