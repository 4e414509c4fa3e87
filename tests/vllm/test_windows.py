"""A real vLLM that frees pages behind sliding windows: the same tokens, and the KV that transformers computes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from kvservice_adapter.connectors.transformers import TransformersConnector
from kvservice_adapter.connectors.transformers.model_layout import layout_of
from kvservice_client import BlockCache, Client, block_chain
from tests.daemon import MIB, DaemonProcess
from tests.vllm.engine import NOT_KEPT, PATIENT, Engine, engine, transfer_config, wait_until_stored

BLOCK, WINDOW = 64, 128
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # So that wrong KV shows in the tokens.
    "sliding_window": WINDOW,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixed": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 6, "layer_types": LAYERS, "query_pre_attn_scalar": 32},
    ),
    "windows only": ("MistralConfig", {"num_hidden_layers": 4}),
}


class Served(NamedTuple):
    folder: Path
    plain: list[list[int]]  # A conversation's answers by vLLM without the connector.
    vllm: Engine


def prompt(seed: str, count: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(3, SIZES["vocab_size"]) for _ in range(count)]


def turns() -> Iterator[list[int]]:
    """What a user says in each turn of a conversation, most of which is longer than the window."""
    yield prompt("first", 2 * WINDOW + 30)
    for turn in range(3):
        yield prompt(f"turn {turn}", 50)


ANSWER = 2 * WINDOW + 9  # Tokens: the window leaves what was prefilled.


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("store"), dram__capacity_bytes=256 * MIB) as daemon:
        yield daemon


@pytest.fixture(scope="module", params=MODELS)
def served(
    request: pytest.FixtureRequest, daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    name, more = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(1)
    made: Any = AutoModelForCausalLM
    made.from_config(getattr(transformers, name)(**SIZES, **more)).float().save_pretrained(folder)
    options: dict[str, Any] = {"skip_tokenizer_init": True, "block_size": 32}
    with engine(folder, None, **options) as plain:
        history, answers = [], []
        for said in turns():
            history += said
            answers.append(plain.answer(history, ANSWER).token_ids)
            history += answers[-1]
    settings = transfer_config(
        address=daemon.address, model_id="tiny", model_revision=request.param, block_tokens=BLOCK, **PATIENT
    )
    with engine(folder, settings, **options) as vllm:
        yield Served(folder, answers, vllm)


@pytest.fixture(scope="module")
def model(served: Served) -> Any:
    return AutoModelForCausalLM.from_pretrained(served.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def stored(daemon: DaemonProcess, served: Served, model: Any) -> Iterator[BlockCache]:
    """The blocks that the daemon has of this model, by the layout of the transformers connector."""
    with daemon.client() as client:
        yield client.open_layout(layout_of(model, **_identity(model), block_tokens=BLOCK))


def _identity(model: Any) -> dict[str, Any]:
    is_mixed = "full_attention" in (getattr(model.config, "layer_types", None) or ())
    return {"model_id": "tiny", "model_revision": "mixed" if is_mixed else "windows only"}


def test_vllm_frees_pages_behind_the_windows(served: Served) -> None:
    """Else these tests would show nothing."""
    assert served.vllm.llm.llm_engine.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is False


def test_a_conversation_longer_than_the_window_has_the_tokens_of_vllm_alone(served: Served, stored: BlockCache) -> None:
    """Its hits reach to the last token that vLLM has computed."""
    history, stored_tokens = [], 0
    for said, expected in zip(turns(), served.plain, strict=True):
        history += said
        answer = served.vllm.answer(history, ANSWER, load="between_steps")
        assert answer.token_ids == expected
        assert answer.cached_tokens == stored_tokens
        history += answer.token_ids
        stored_tokens = len(history) - 1
        wait_until_stored(stored, history[:-1])


def test_stored_blocks_are_the_kv_that_transformers_computes(served: Served, stored: BlockCache, model: Any) -> None:
    """Prefilled, and generated while the window moved."""
    given = prompt("compared", 2 * WINDOW + 30)
    tokens = [*given, *served.vllm.answer(given, ANSWER).token_ids[:-1]]
    wait_until_stored(stored, tokens)
    cache = DynamicCache()  # Without windows it keeps all tokens.
    with torch.inference_mode():
        model(torch.tensor([tokens]), past_key_values=cache)
    with stored.lookup(block_chain(stored.layout, tokens, with_partial=True)) as lease:
        assert lease.hit_tokens == len(tokens)
        for layer in lease.load():
            arrays = stored.layer_arrays(layer.data, lease.token_counts, layer=layer.index)
            keys, values = (np.concatenate(each, axis=1) for each in zip(*arrays, strict=True))
            expected: Any = cache.layers[layer.index]
            assert np.abs(keys - expected.keys[0].numpy()).max() < 1e-3
            assert np.abs(values - expected.values[0].numpy()).max() < 1e-3


def test_what_transformers_stored_vllm_loads(served: Served, daemon: DaemonProcess, model: Any) -> None:
    given = prompt("of transformers", 3 * WINDOW + 9)
    expected = served.vllm.answer(given, 40, **NOT_KEPT)
    with Client(daemon.address) as client:
        connector = TransformersConnector(client, model, **_identity(model), block_tokens=BLOCK)
        history = connector.restore(given)
        with torch.inference_mode():
            model(torch.tensor([given]), past_key_values=history.cache)
        assert connector.save(given, history.cache, wait_s=60.0).error is None
        assert connector.flush(60.0)
        connector.close()
    answer = served.vllm.answer(given, 40, load="between_steps")
    assert answer.token_ids == expected.token_ids
    assert answer.cached_tokens >= len(given) // BLOCK * BLOCK


def test_requests_that_run_together_have_the_tokens_of_requests_alone(served: Served, stored: BlockCache) -> None:
    histories = [prompt(f"together {each}", WINDOW + 40 * each) for each in range(1, 6)]
    expected = [served.vllm.answer(history, 60, may_load=False).token_ids for history in histories]
    for history, answer in zip(histories, expected, strict=True):
        wait_until_stored(stored, [*history, *answer[:-1]])
    answers = served.vllm.answers(histories, 60, [{"load": "between_steps"}] * len(histories))
    assert [answer.token_ids for answer in answers] == expected
    assert all(
        answer.cached_tokens >= len(each) // BLOCK * BLOCK for answer, each in zip(answers, histories, strict=True)
    )
