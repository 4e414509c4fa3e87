"""Stored KV is loaded, computed again, or both at the same time: the fastest plan, with the same answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvservice_adapter.rates import Rates
from kvservice_api.cost import Kind
from kvservice_client import Outcome
from tests.unit.connector_models import BLOCK_TOKENS, KeptBlocks, computed, connector, prompt, states, tiny_llama

_PROMPT = 10 * BLOCK_TOKENS + 3
_STORED = _PROMPT - 1  # One token is left to compute.


class KnownRates(Rates):
    """Fixed rates, in tokens per second."""

    def __init__(self, loads: float, computes: float) -> None:
        super().__init__()
        self.loads, self.computes = loads, computes
        self.bytes_per_token = 1

    def load_s(self, size_bytes: int, tier: str, transport: str = "", loads_ahead: int = 0) -> float:
        return size_bytes / self.bytes_per_token / self.loads

    def prefill_s(self, new_tokens: int, context_tokens: int = 0) -> float:
        return new_tokens / self.computes


@pytest.fixture
def kept() -> KeptBlocks:
    return KeptBlocks()


def planned(kept: KeptBlocks, model: Any, ids: torch.Tensor, loads: float, computes: float, **options: Any) -> Any:
    rates = KnownRates(loads, computes)
    subject = connector(kept, model, rates=rates)
    rates.bytes_per_token = subject.layout.bytes_per_token
    return subject, subject.restore(ids, **options)


def answer(model: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.parametrize(
    ("loads", "computes", "kind", "loaded_tokens"),
    [
        (1e6, 10.0, Kind.LOAD, _STORED),
        (10.0, 1e6, Kind.RECOMPUTE, 0),
        (100.0, 100.0, Kind.MIXED, _STORED - 5 * BLOCK_TOKENS),
    ],
    ids=["load", "recompute", "mixed"],
)
def test_the_fastest_plan_is_made_and_reported(
    kept: KeptBlocks, loads: float, computes: float, kind: Kind, loaded_tokens: int
) -> None:
    model, ids = tiny_llama(), prompt(_PROMPT)
    connector(kept, model).save(ids, computed(model, ids))

    subject, history = planned(kept, model, ids, loads, computes, request_id="plan")

    assert history.plan.kind is kind
    assert history.plan.load_tokens == history.loaded_tokens == loaded_tokens
    assert history.size_bytes == loaded_tokens * subject.layout.bytes_per_token
    assert history.cache.get_seq_length() == (0 if kind is Kind.RECOMPUTE else _STORED)
    output = answer(model, ids, history.cache)
    assert torch.equal(output, answer(model, ids))
    assert (subject.save(output, history.cache).stored, history.error) == (3, None), "what was stored is not sent again"
    [report] = kept.reports
    assert (report.outcome, report.plan, report.history_tokens) == (Outcome.DONE, kind.value, _STORED)
    assert (report.loaded_tokens, report.computed_tokens) == (loaded_tokens, _STORED - loaded_tokens)
    assert set(report.estimate_s) >= {"load", "recompute"}


def test_a_history_half_computed_and_half_loaded_is_the_whole_one(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(_PROMPT)
    whole = computed(model, ids)
    connector(kept, model).save(ids, whole)

    _, history = planned(kept, model, ids, loads=100.0, computes=100.0)

    head = history.plan.compute_tokens
    assert 0 < head < _STORED
    for (keys, values), (keys_there, values_there) in zip(states(whole), states(history.cache), strict=True):
        for there, expected in ((keys_there, keys), (values_there, values)):
            assert torch.equal(there[:, :, head:], expected[:, :, head:_STORED]), "what is loaded is loaded bit for bit"
            assert torch.allclose(there[:, :, :head], expected[:, :, :head], atol=1e-5)


def test_what_computing_and_loading_take_is_learned_from_requests(kept: KeptBlocks) -> None:
    model, ids = tiny_llama(), prompt(_PROMPT)
    rates = Rates()
    subject = connector(kept, model, rates=rates)
    first = subject.restore(ids, request_id="first")
    assert rates.prefill_s(_PROMPT) is None

    subject.save(answer(model, ids, first.cache), first.cache)
    assert rates.prefill_s(_PROMPT) is not None
    states(connector(kept, model, rates=rates).restore(ids).cache)

    assert [each.outcome for each in kept.reports] == [Outcome.MISS]


def test_keys_of_dynamic_rotary_encoding_are_reused_below_the_length_at_which_it_changes(kept: KeptBlocks) -> None:
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_llama(rope_parameters=parameters, max_position_embeddings=48)
    subject = connector(kept, model)
    short, long = prompt(40), torch.cat([prompt(40), prompt(40)], 1)
    cache = subject.restore(short).cache
    output = answer(model, short, cache)
    assert subject.flush()
    assert len(kept.stored) == 47 // BLOCK_TOKENS
    assert subject.save(output, cache).refused == 0

    again = subject.restore(short)
    assert again.tokens == 39
    assert torch.equal(answer(model, short, again.cache), output)

    missed = subject.restore(long)
    assert missed.tokens == 0, "all of its keys are rotated in another way"
    output = answer(model, long, missed.cache)
    assert torch.equal(output, answer(model, long))
    assert subject.flush()
    assert subject.save(output, missed.cache).stored == 0
    assert len(kept.stored) == -(-47 // BLOCK_TOKENS)


@pytest.mark.parametrize("given", ["a part of its tokens", "cropped", "in a batch"])
def test_no_key_of_dynamic_rotary_encoding_is_saved_that_a_longer_prompt_has_turned(
    kept: KeptBlocks, given: str
) -> None:
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_llama(rope_parameters=parameters, max_position_embeddings=48)
    subject = connector(kept, model)
    long = prompt(60)
    cache: Any = computed(model, long)
    if given == "cropped":
        cache = subject.restore(long).cache
        with torch.inference_mode():
            model(long, past_key_values=cache)
        cache.crop(-40)
    if given == "in a batch":
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[0, :40] = 0
        cache, both = DynamicCache(config=model.config), long.repeat(2, 1)
        with torch.inference_mode():
            model(both, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
        subject.save(both, cache, attention_mask=mask)
    else:
        subject.save(long[:, :20], cache)

    assert subject.flush()
    assert not kept.stored
