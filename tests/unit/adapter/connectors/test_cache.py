"""The cache that a model uses: it waits for each layer, and layers that do not arrive are computed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from kvservice_adapter.connectors.transformers.cache import StoredCache
from kvservice_adapter.connectors.transformers.history import Buffers, LoadedHistory
from kvservice_api.errors import ChecksumMismatch, KVError, LeaseExpired
from kvservice_client import BlockChain, ChainBuilder, LoadedLayer, Outcome
from tests.clock import ClientClock
from tests.daemon import until
from tests.unit.connector_models import (
    BLOCK_TOKENS,
    KeptBlocks,
    KeptLease,
    computed,
    connector,
    prompt,
    states,
    tiny_llama,
)

_LAYERS = 5
_ASK: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


class FailingBlocks(KeptBlocks):
    """Loads end with an error after some layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fails_after: int | None = None
        self.hangs: threading.Event | None = None
        self.error: Exception = ChecksumMismatch("a bit is not what it was")

    def lookup(self, chain: BlockChain | ChainBuilder, **options: Any) -> KeptLease:
        lease = super().lookup(chain, **options)
        load = lease.load

        def failing(first_block: int, block_count: int) -> Iterator[LoadedLayer]:
            for layer in load(first_block, block_count):
                if layer.index == self.fails_after:
                    if self.hangs is not None:
                        self.hangs.wait(30.0)
                    raise self.error
                yield layer

        lease.load = failing  # type: ignore[method-assign]
        return lease


@pytest.fixture
def kept() -> FailingBlocks:
    return FailingBlocks()


def loaded(cache: Any) -> LoadedHistory:
    assert isinstance(cache, StoredCache) and isinstance(cache.history, LoadedHistory)
    return cache.history


def answer(model: Any, ids: torch.Tensor, cache: Any = None, **more: Any) -> list[list[int]]:
    mask = more.pop("attention_mask", torch.ones_like(ids))
    tokens: list[list[int]] = model.generate(ids, attention_mask=mask, past_key_values=cache, **_ASK, **more).tolist()
    return tokens


@pytest.mark.parametrize("error", [ChecksumMismatch("damaged"), LeaseExpired("gone"), ValueError("odd")], ids=repr)
@pytest.mark.parametrize("fails_after", range(_LAYERS))
def test_a_layer_that_does_not_come_is_computed_inside_the_forward(
    kept: FailingBlocks, fails_after: int, error: Exception
) -> None:
    model, ids = tiny_llama(num_hidden_layers=_LAYERS), prompt(6 * BLOCK_TOKENS + 2)
    subject = connector(kept, model)
    subject.save(ids, computed(model, ids))
    kept.fails_after, kept.error = fails_after, error

    history = subject.restore(ids, request_id="fails")

    assert answer(model, ids, history.cache) == answer(model, ids)
    assert (history.error, history.loaded_tokens) == (error, 0)
    [report] = kept.reports
    assert (report.outcome, report.computed_tokens, report.loaded_tokens) == (Outcome.FAILED_OVER, 25, 0)
    assert report.outcome_reason == (error.reason if isinstance(error, KVError) else str(error))


def test_without_memory_for_a_history_it_is_computed_and_its_leases_end(
    kept: FailingBlocks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny_llama(), prompt(2 * BLOCK_TOKENS + 3)
    subject = connector(kept, model)
    subject.save(ids, computed(model, ids))
    released = threading.Event()
    monkeypatch.setattr(KeptLease, "release", lambda lease: released.set())
    monkeypatch.setattr(Buffers, "__init__", _no_memory)

    restored = subject.restore(ids)

    assert restored.tokens == 0
    assert torch.equal(model(ids, past_key_values=restored.cache).logits, model(ids).logits)
    assert released.wait(30.0)
    assert "no memory for the history" in caplog.text


def _no_memory(*given: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_prompt_may_be_written_over_once_it_was_restored(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(num_hidden_layers=_LAYERS), prompt(6 * BLOCK_TOKENS + 2)
    subject = connector(kept, model)
    subject.save(ids, computed(model, ids))
    kept.fails_after = 0

    given = ids.clone()
    history = subject.restore(given)
    given.zero_()

    assert answer(model, ids, history.cache) == answer(model, ids)


def test_a_load_that_hangs_holds_up_no_other(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(num_hidden_layers=_LAYERS), prompt(6 * BLOCK_TOKENS + 2)
    subject = connector(kept, model, wait_s=0.05)
    subject.save(ids, computed(model, ids))
    kept.fails_after, kept.hangs = 2, threading.Event()
    expected = answer(model, ids)
    try:
        hung = subject.restore(ids)
        assert answer(model, ids, hung.cache) == expected
        assert hung.error is not None

        kept.fails_after = None
        after = subject.restore(ids)
        assert answer(model, ids, after.cache) == expected
        assert after.error is None
    finally:
        kept.hangs.set()


def test_rows_of_a_batch_are_waited_for_together(kept: FailingBlocks) -> None:
    model, clock = tiny_llama(), ClientClock()
    kept.clock = clock
    ids = torch.stack([prompt(10)[0].roll(each) for each in range(4)])
    subject = connector(kept, model, wait_s=10.0)
    for row in ids:
        subject.save(row[None], computed(model, row[None]))
    history = loaded(subject.restore(ids, attention_mask=torch.ones_like(ids)).cache)
    waits: list[float] = []

    def slow(layer: int, timeout_s: float) -> None:
        waits.append(timeout_s)
        clock.advance(seconds=2.0)  # The next loader's time is shorter by this.

    for loader in history.loaders:
        loader.wait = slow  # type: ignore[assignment,method-assign]

    history.layer(0)

    assert waits == [10.0, 8.0, 6.0, 4.0]


def test_a_closed_connector_has_no_threads_and_its_caches_still_work(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(6 * BLOCK_TOKENS + 2)
    others = set(threading.enumerate())
    subject = connector(kept, model)
    subject.save(ids, computed(model, ids))
    subject.restore(ids[:, :1])
    history = subject.restore(ids)

    subject.close()
    subject.close()

    assert answer(model, ids, history.cache) == answer(model, ids)
    assert history.error is None
    del history
    until(lambda: not set(threading.enumerate()) - others)


def test_layers_that_came_stay_as_they_are(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(num_hidden_layers=_LAYERS), prompt(6 * BLOCK_TOKENS + 2)
    subject, whole = connector(kept, model), computed(model, ids)
    subject.save(ids, whole)
    kept.fails_after = 3

    cache = subject.restore(ids).cache
    with torch.inference_mode():
        model(ids[:, 25:], past_key_values=cache)

    for layer, ((keys, values), (keys_again, values_again)) in enumerate(
        zip(states(whole), states(cache), strict=True)
    ):
        close = torch.equal if layer < 3 else partial(torch.allclose, atol=1e-6)
        assert close(keys[:, :, :25], keys_again[:, :, :25])
        assert close(values[:, :, :25], values_again[:, :, :25])


def test_the_forward_that_computes_a_history_gives_its_own_hidden_states_and_no_others(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(num_hidden_layers=_LAYERS), prompt(6 * BLOCK_TOKENS + 2)
    subject = connector(kept, model)
    subject.save(ids, computed(model, ids))
    kept.fails_after = 2

    cache = subject.restore(ids).cache
    with torch.inference_mode():
        again = model(ids[:, 25:], past_key_values=cache, output_hidden_states=True)
        plain = model(ids, output_hidden_states=True)

    assert len(again.hidden_states) == len(plain.hidden_states) == _LAYERS + 1
    for one, other in zip(again.hidden_states, plain.hidden_states, strict=True):
        assert torch.allclose(one, other[:, 25:], atol=1e-5)


def test_a_length_is_known_before_anything_came(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(6 * BLOCK_TOKENS + 2)
    subject = connector(kept, model)
    subject.save(ids, computed(model, ids))
    kept.fails_after = 0

    cache = subject.restore(ids).cache

    assert cache.get_seq_length() == 25
    assert cache.get_mask_sizes(1, 0) == (26, 0)
    assert loaded(cache).error is None, "the model has not read a layer yet"


def test_a_cache_may_be_copied_cropped_reset_and_reordered(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(6 * BLOCK_TOKENS + 2)
    subject, whole = connector(kept, model), computed(model, ids)
    subject.save(ids, whole)

    copied = copy.deepcopy(subject.restore(ids).cache)
    assert type(copied) is DynamicCache
    assert answer(model, ids, copied) == answer(model, ids)

    cropped = subject.restore(ids).cache
    cropped.crop(-10)
    assert cropped.get_seq_length() == 15
    assert answer(model, ids, cropped) == answer(model, ids)

    repeated: Any = subject.restore(ids).cache
    repeated.batch_repeat_interleave(3)
    repeated.reorder_cache(torch.tensor([2, 0, 1]))
    assert [tuple(keys.shape) for keys, _ in states(repeated)] == [(3, 2, 25, 8)] * 3
    assert answer(model, ids.repeat(3, 1), repeated) == 3 * answer(model, ids)

    emptied: Any = subject.restore(ids).cache
    emptied.reset()
    assert emptied.get_seq_length() == 0
    assert answer(model, ids, emptied) == answer(model, ids)


def test_beam_search_and_sampling_continue_from_a_history(kept: FailingBlocks) -> None:
    model, ids = tiny_llama(), prompt(6 * BLOCK_TOKENS + 2)
    subject = connector(kept, model)
    subject.save(ids, computed(model, ids))

    sampling = {"do_sample": True, "top_k": 20, "temperature": 1.3, "max_new_tokens": 8, "pad_token_id": 0}
    drawn = []
    for cache in (None, subject.restore(ids).cache):
        torch.manual_seed(7)
        drawn.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **sampling).tolist()
        )
    assert drawn[0] == drawn[1]

    beams = subject.restore(ids).cache
    beams.batch_repeat_interleave(4)
    assert answer(model, ids, beams, num_beams=4) == answer(model, ids, num_beams=4)


@pytest.mark.parametrize("first_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("second_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_cache_goes_from_one_mode_of_torch_to_another(kept: FailingBlocks, first_mode: Any, second_mode: Any) -> None:
    model, ids = tiny_llama(), prompt(6 * BLOCK_TOKENS + 6)
    subject = connector(kept, model)
    subject.save(ids[:, :24], computed(model, ids[:, :24]))
    kept.fails_after = 1
    with torch.no_grad():
        expected = model(ids).logits[:, -1]

    cache = subject.restore(ids).cache
    with first_mode():
        model(ids[:, 24:27], past_key_values=cache)
    with second_mode():
        logits = model(ids[:, 27:], past_key_values=cache).logits[:, -1]

    assert torch.allclose(logits, expected, atol=1e-5)


def left_padded(*prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a batch."""
    columns = max(each.shape[1] for each in prompts)
    rows = [torch.nn.functional.pad(each, (columns - each.shape[1], 0)) for each in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(each), (columns - each.shape[1], 0)) for each in prompts]
    return torch.cat(rows), torch.cat(masks)


@pytest.mark.parametrize("kv_heads", [2, 6], ids=["GQA", "MHA"])
@pytest.mark.parametrize("fails_after", [None, 1], ids=["loaded", "computed"])
def test_several_conversations_in_a_batch_are_answered_as_without_a_connector(
    kept: FailingBlocks, kv_heads: int, fails_after: int | None
) -> None:
    model = tiny_llama(num_key_value_heads=kv_heads)
    subject = connector(kept, model)
    prompts = prompt(26), prompt(17), prompt(23)
    for each, stored in zip(prompts, (24, 8, 16), strict=True):
        subject.save(each[:, :stored], computed(model, each[:, :stored]))
    ids, mask = left_padded(*prompts)
    kept.fails_after = fails_after

    history = subject.restore(ids, attention_mask=mask)

    assert history.cache.get_seq_length() == min(24, 9 + 8, 3 + 16) == 17
    assert history.tokens == 17 + (17 - 9) + (17 - 3)
    output = answer(model, ids, history.cache, attention_mask=mask)
    assert output == answer(model, ids, attention_mask=mask)

    kept.fails_after = None
    given = torch.tensor(output)
    saved = subject.save(given, history.cache, attention_mask=mask)
    assert (saved.refused, saved.error) == (0, None)
    for row, each in enumerate(prompts):
        alone = given[row : row + 1, ids.shape[1] - each.shape[1] :]
        assert subject.restore(alone).tokens == alone.shape[1] - 1
        assert answer(model, alone, subject.restore(alone).cache) == answer(model, alone)


def test_a_batch_in_which_one_row_has_nothing_is_computed(kept: FailingBlocks) -> None:
    model = tiny_llama()
    subject = connector(kept, model)
    known, unknown = prompt(20), prompt(21)
    subject.save(known, computed(model, known))
    ids, mask = left_padded(known, unknown)

    history = subject.restore(ids, attention_mask=mask)

    assert history.tokens == history.cache.get_seq_length() == 0
    assert answer(model, ids, history.cache, attention_mask=mask) == answer(model, ids, attention_mask=mask)


def test_a_model_that_wants_no_positions_and_one_that_learned_them_are_answered_alike(kept: FailingBlocks) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 97, "n_layer": 3, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
    models: list[Any] = [
        GPT2LMHeadModel(GPT2Config(n_embd=32, **shape)),
        BloomForCausalLM(BloomConfig(hidden_size=32, **shape)),
    ]
    for model in models:
        ids = prompt(22)
        subject = connector(kept, model.eval(), model_id=type(model).__name__)
        subject.save(ids, computed(model, ids))
        for kept.fails_after in (None, 1):
            assert answer(model, ids, subject.restore(ids).cache) == answer(model, ids)
