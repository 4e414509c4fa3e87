"""How well the adapter predicts prefill times: it learns from each forward, as in an engine."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.adapter import rig
from benchmarks.adapter.report import Section
from kvservice_adapter.rates import Rates

_NEW = (30, 40, 64, 100, 200, 256, 400, 512, 800, 1000, 1500, 2048)
_CONTEXTS = (0, 0, 256, 512, 1000, 2048, 3000)
_FIRST = 10  # After these forwards it has seen lengths and contexts of several orders of magnitude.


def measure(*, quick: bool) -> Section:
    """Compare the predicted and the measured time of each forward over new tokens after a context."""
    model = rig.random_model(rig.QUICK_SHAPE if quick else rig.SHAPE)
    chance, rates = random.Random(1), Rates()
    tokens = rig.some_tokens(model, max(_CONTEXTS), seed=1)
    whole = DynamicCache(config=model.config)
    for first in range(0, max(_CONTEXTS), 512):
        rig.forward(model, tokens[:, first : first + 512], whole)
    errors = []
    for _ in range(30 if quick else 80):
        new, context = chance.choice(_NEW), chance.choice(_CONTEXTS)
        expected_s = rates.prefill_s(new, context)
        taken_s = rig.seconds(partial(rig.forward, model, tokens[:, :new], _beginning(model, whole, context)))
        rates.observe_prefill(new, context, taken_s)
        if expected_s is not None:
            errors.append(abs(expected_s / taken_s - 1))
    section = Section(
        "estimates",
        "Predicted prefill times",
        f"A Llama in the shape of SmolLM2-135M ({model.config.num_hidden_layers} layers, fp32, "
        f"{torch.get_num_threads()} threads) computes {min(_NEW)} to {max(_NEW)} new tokens after up to "
        f"{max(_CONTEXTS)} others, in random order. Each time is predicted from earlier ones. Errors are relative to "
        "the measured time.",
    )
    section.add("first_errors_median", rig.median(errors[:_FIRST]), note=f"of the first {_FIRST}")
    section.add("error_median", rig.median(errors[_FIRST:]), "at most 0.1", "of all others")
    section.add("error_p90", sorted(errors[_FIRST:])[int(0.9 * len(errors[_FIRST:]))])
    return section


def _beginning(model: Any, whole: DynamicCache, tokens: int) -> DynamicCache:
    """A cache of the first tokens."""
    cache = DynamicCache(config=model.config)
    layers: list[Any] = whole.layers if tokens else []
    for index, layer in enumerate(layers):
        cache.update(layer.keys[..., :tokens, :].clone(), layer.values[..., :tokens, :].clone(), index)
    return cache
