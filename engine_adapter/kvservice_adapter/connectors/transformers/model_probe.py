"""What a model's own code shows about its KV: which tensors it caches, and whether its attention is causal.

No configuration says it all. Encoders attend to what follows unless `is_decoder` is set, other models if
`use_bidirectional_attention` or `is_causal` says so, and the number of KV heads has a name of its own in many
families (Falcon, GPTBigCode, MLA). So after the configuration the model itself is asked: it computes short rows,
as one batch, that begin with the same tokens and end with different ones. With causal attention all rows have
the same keys and values for what they share, in every layer; with any other attention they differ from the
second layer on. Two of the rows are equal: what they differ by is rounding, and no more is tolerated than that,
or, on accelerators, a small share of the norm.

Positions are tried as well: with `position_ids` as `generate` gives them, and without, keys must be the same.

The forward ends as soon as every kind of attention layer was seen, usually after two layers: a large model usually pays
the share of two layers of one decoding step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from kvservice_adapter.connectors.transformers.cache import WholeLayer

_SHARED_TOKENS, _TOKENS = 3, 8
_ROWS = 3
# Of the norm. Rows of one batch are computed by the same code in the same order: on a CPU causal models show no
# difference at all. Accelerators may round rows of a batch in different ways, a last digit here and there.
_DIFFERENCE_MAX = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
_DIFFERENCE_MAX_CPU = {torch.float32: 1e-6, torch.float16: 5e-5, torch.bfloat16: 4e-4}
_PLACED_MAX = 1e-2  # Of the norm.
_ROUNDING_MAX = 4.0  # Times what equal rows differ by.


class NotProbed(ValueError):
    """The model does not compute, or does not cache, as a causal decoder does. The message says what was seen."""


class LayerShape(NamedTuple):
    """What one layer adds to the cache per token."""

    kv_heads: int
    k_head_dim: int
    v_head_dim: int


def probe(model: PreTrainedModel, cache: DynamicCache) -> list[LayerShape]:
    """The shape of each layer's KV. `cache` is an empty one of the model's; it is used up.

    Runs on the calling thread, and leaves parameters, training flags and random numbers as they are. Raises
    NotProbed where attention is not causal, and where the model does not fill the cache that it is given; and what
    the model raises.
    """
    body: Any = model.base_model
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise NotProbed(f"{type(model).__name__} takes no past_key_values: it has no KV cache of this kind")
    _check_windows(body, cache)
    kinds = _kinds_of_layers(model, [window_of(layer) for layer in cache.layers])
    seen = _Seen(_last_layer(kinds), needs_output=len(kinds) == 1)  # Its keys show nothing about its attention.
    sliding = cache.is_sliding
    cache.layers = [_ProbedLayer(index, seen, each) for index, each in enumerate(sliding)]
    ids = _rows(model)
    with torch.no_grad(), _evaluating(model):
        try:
            output = body(input_ids=ids, past_key_values=cache, use_cache=True)
        except _Enough:
            output = None
    missing = [index for index in range(seen.last_layer + 1) if index not in seen.states]
    if missing:
        raise NotProbed(f"{type(model).__name__} does not fill layer {missing[0]} of the cache that it is given")
    tokens = ids.shape[1]
    compared = [states for index in sorted(seen.states) for states in seen.states[index]]
    if any(states.shape[0] != _ROWS or states.ndim != 4 or states.shape[2] != tokens for states in compared):
        raise NotProbed(f"{type(model).__name__} does not cache one key and one value per token, row and head")
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, torch.Tensor) and hidden.ndim == 3:
        compared.append(hidden[:, None])
    for states in compared:
        first, second, same = (row[:, : min(_SHARED_TOKENS, tokens - 1)].float() for row in states)
        norm = first.norm().clamp(min=1e-12)
        difference, rounding = float((first - second).norm() / norm), float((first - same).norm() / norm)
        most = _DIFFERENCE_MAX_CPU if states.device.type == "cpu" else _DIFFERENCE_MAX
        tolerated = most.get(states.dtype, 0.0)
        if not difference <= max(tolerated, _ROUNDING_MAX * rounding):
            raise NotProbed(
                "its attention is not causal: what follows a token changes the token's keys and values "
                f"(by {difference:.2g} of their norm)"
            )
    if "position_ids" in inspect.signature(body.forward).parameters:
        counted = _Seen(0)
        cache.layers = [_ProbedLayer(index, counted, each) for index, each in enumerate(sliding)]
        positions = torch.arange(tokens, device=ids.device).expand(len(ids), -1)
        with torch.no_grad(), _evaluating(model), suppress(_Enough):
            body(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        for own, given in zip(seen.states[0], counted.states[0], strict=True):
            if not float((own.float() - given.float()).norm()) <= _PLACED_MAX * float(given.float().norm()):
                raise NotProbed(
                    "where it is given no position_ids it counts positions in another way than `generate` gives them: "
                    "the KV of equal tokens may differ"
                )
    shape_of_kind = {}
    for index, (keys, values) in seen.states.items():
        if keys.shape[1] != values.shape[1]:
            raise NotProbed(f"layer {index} has {keys.shape[1]} heads of keys and {values.shape[1]} of values")
        shape_of_kind[kinds[index]] = LayerShape(keys.shape[1], keys.shape[3], values.shape[3])
    return [shape_of_kind[kind] for kind in kinds]


def window_of(layer: Any) -> int:
    """How many tokens a layer of an empty cache attends to; 0 if it attends to all."""
    return int(layer.sliding_window) if layer.is_sliding else 0


def _check_windows(body: Any, cache: DynamicCache) -> None:
    """Raises NotProbed if only the library's cache makes the window: a cache that keeps all tokens has none then."""
    if not any(cache.is_sliding):
        return
    makers = ("create_sliding_window_causal_mask", "create_masks_for_generate")
    if not any(hasattr(sys.modules.get(kind.__module__), maker) for kind in type(body).__mro__ for maker in makers):
        raise NotProbed(
            f"{type(body).__name__} makes no sliding-window mask for its `sliding_window`: its attention would see "
            "tokens beyond the window"
        )


class _Enough(Exception):
    """Ends the probe's forward: all kinds of layers were seen."""


class _Seen:
    """What layers were given."""

    def __init__(self, last_layer: int, *, needs_output: bool = False) -> None:
        self.last_layer = last_layer
        self.needs_output = needs_output  # The forward is not ended early.
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class _ProbedLayer(WholeLayer):
    def __init__(self, index: int, seen: _Seen, is_sliding: bool) -> None:
        super().__init__(is_sliding)
        self._index = index
        self._seen = seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._seen.states[self._index] = key_states, value_states
        if self._index == self._seen.last_layer and not self._seen.needs_output:
            raise _Enough
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return updated


def _kinds_of_layers(model: PreTrainedModel, windows: Sequence[int]) -> list[Any]:
    """For each layer of the cache something that is equal only for layers whose attention is of the same kind.

    Attention modules carry the number of their cache layer; two of one class with parameters of the same shapes
    cache the same shape. A layer without such a module is of a kind of its own. `windows` are the layers'.
    """
    modules: dict[int, list[Any]] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        inner = any(isinstance(getattr(each, "layer_idx", None), int) for each in list(module.modules())[1:])
        if isinstance(index, int) and not inner:
            shapes = tuple((name, tuple(each.shape)) for name, each in module.named_parameters())
            traits = tuple(getattr(module, name, None) for name in ("is_causal", "sliding_window", "layer_type"))
            modules.setdefault(index, []).append((type(module), shapes, traits))
    return [
        (window, tuple(modules[index])) if index in modules else (window, index) for index, window in enumerate(windows)
    ]


def _last_layer(kinds: list[Any]) -> int:
    """The layer after the first of the last kind: what attention does to a token shows in the next layer's keys."""
    last_first = max(kinds.index(kind) for kind in kinds)
    return min(last_first + 1, len(kinds) - 1)


def _rows(model: PreTrainedModel) -> torch.Tensor:
    """Token ids ``[row, token]``: rows share the first ones; the second differs from the others in all that follow."""
    embedding: Any = model.get_input_embeddings()
    vocabulary = min(model.config.vocab_size, getattr(embedding, "num_embeddings", model.config.vocab_size))
    tokens = min(_TOKENS, getattr(model.config, "max_position_embeddings", None) or _TOKENS)
    if tokens < 2 or vocabulary < 2:
        raise NotProbed("a model of one position or one token has no history")
    first = (torch.arange(tokens, device=model.device) * 7 + 3) % vocabulary
    second = first.clone()
    shared = min(_SHARED_TOKENS, tokens - 1)
    second[shared:] = (first[shared:] + vocabulary // 2) % vocabulary
    return torch.stack([first, second, first])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout would make the rows differ."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
