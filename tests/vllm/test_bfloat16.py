"""A real vLLM in bfloat16: the same tokens as without the connector, and the KV that transformers computes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvservice_client import block_chain
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

BLOCK = 256
LAYOUT = model_layout(dtype="bfloat16", block_tokens=BLOCK)
# The norm of a layer's differences, of the norm of its values: bfloat16 has 8 bits of precision, and each layer adds to
# what the order of sums made of those before. Keys or values of other tokens differ by more than 1.
FIRST_LAYER, ANY_LAYER = 0.01, 0.05


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("store")
    with DaemonProcess(folder, dram__capacity_bytes=256 * MIB, ssd__capacity_bytes=512 * MIB) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def vllm(daemon: DaemonProcess) -> Iterator[Engine]:
    settings = transfer_config(
        address=daemon.address, model_id=LAYOUT.model_id, model_revision=LAYOUT.model_revision, **PATIENT
    )
    with engine(model_folder(), settings, block_size=64, dtype="bfloat16") as running:
        yield running


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Token ids of a text without repetitions."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    lines = (f"The bridge of road {each} is {each * each % 79} feet high and goes to {each + 3}." for each in range(99))
    ids: list[int] = tokenizer.encode(" ".join(lines))
    return ids


def test_a_conversation_in_bfloat16_continues_with_the_same_tokens(
    vllm: Engine, daemon: DaemonProcess, text: list[int]
) -> None:
    history, stored_tokens = text[: 2 * BLOCK + 30], 0
    with daemon.client() as client:
        stored = client.open_layout(LAYOUT)
        for mode in ("whole", "layers", "between_steps"):
            expected = vllm.answer(history, **NOT_KEPT)
            answer = vllm.answer(history, load=mode)
            assert (answer.token_ids, answer.cached_tokens) == (expected.token_ids, stored_tokens)
            history = [*history, *answer.token_ids]
            stored_tokens = len(history) - 1  # vLLM has not computed the last token of its answer.
            wait_until_stored(stored, history[:-1])
            history += text[900 : 900 + 40]


def test_blocks_in_bfloat16_are_the_kv_that_transformers_computes(
    vllm: Engine, daemon: DaemonProcess, text: list[int]
) -> None:
    prompt = text[10 : 10 + 2 * BLOCK]
    vllm.answer(prompt, 1, may_load=False)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16)
    with torch.inference_mode():
        cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
    with daemon.client() as client:
        stored, chain = client.open_layout(LAYOUT), block_chain(LAYOUT, prompt)
        until(lambda: stored.contains(chain) == len(chain))
        largest = 0.0
        with stored.lookup(chain) as lease:
            assert lease.hit_blocks == len(chain)
            for layer in lease.load():
                arrays = stored.layer_arrays(layer.data, lease.token_counts)
                expected = cache.layers[layer.index]
                for found, right in zip(zip(*arrays, strict=True), (expected.keys[0], expected.values[0]), strict=True):
                    values = torch.from_numpy(np.concatenate(found, axis=1)).view(torch.bfloat16).float()
                    share = float((values - right.float()).norm() / right.float().norm())
                    largest = max(largest, share)
                    assert share < (ANY_LAYER if layer.index else FIRST_LAYER), layer.index
        print(f"largest difference: {largest:.3g} of a layer's norm")
