"""Keeps the KV of Hugging Face transformers models: restore before a turn, save after it.

    connector = TransformersConnector(client, model, model_id="SmolLM2-135M-Instruct", model_revision=revision)

    history = connector.restore(input_ids)
    output = model.generate(input_ids, past_key_values=history.cache)      # prefills what was not restored
    connector.save(output[0, : history.cache.get_seq_length()], history.cache)

A `DynamicLayer` holds keys and values as ``[1, head, token, dim]``; a stored slice is
``[K, V][head][token][dim]`` of one block. Either way each byte is copied once here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvservice_api.errors import KVError
from kvservice_api.keys import BlockChain, block_chain, extra_identity
from kvservice_api.layout import DTYPE_BYTES, Layout, Rotary
from kvservice_client import Client, Durability, Lease, SaveResult

log = logging.getLogger(__name__)

TokenIds = Sequence[int] | NDArray[Any] | torch.Tensor

# With these, where a key is rotated to depends on the length of the whole prompt: no prefix can be reused.
_LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


class UnsupportedModel(ValueError):
    """The model, or its cache, is of a kind whose KV this connector cannot keep and give back exactly."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A cache for the next turn, and what of it came from the daemon."""

    cache: DynamicCache
    tokens: int = 0
    size_bytes: int = 0
    tier: str = "none"  # Where it lay when asked for: "dram", "ssd", "mixed", or "none".
    error: KVError | None = None  # Why nothing was restored, unless it just was not stored.


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a save: counts of blocks, and why the first one that was not stored was not."""

    stored: int = 0
    already_stored: int = 0
    refused: int = 0
    error: KVError | None = None


class TransformersConnector:
    """One model's caches in one daemon. Thread-safe; keeps nothing between calls.

    Neither method raises for what the daemon does, or does not: the engine recomputes, after a wait
    that the client's timeout bounds. Both raise UnsupportedModel for batches, for other caches and once
    the model has adapters that `lora_id` does not name, and InvalidRequest for what are no token ids.
    """

    def __init__(
        self,
        client: Client,
        model: PreTrainedModel,
        *,
        model_id: str,
        model_revision: str,
        block_tokens: int = 256,
        lora_id: str = "",
        salt: bytes = b"",
    ) -> None:
        """`model_revision` tells weights apart that share a name: a commit, or a hash of the files, and
        how they were quantized, if the engine did that.

        `lora_id` names the adapter that is active, if any. Caches of another `salt` are never found.
        """
        self._model, self._lora_id = model, lora_id
        self._check_adapters()
        self.layout = layout_of(model, model_id=model_id, model_revision=model_revision, block_tokens=block_tokens)
        self._blocks = client.open_layout(self.layout)
        self._config = model.config
        self._device = model.device
        self._dtype = model.dtype
        self._salt = salt

    def _check_adapters(self) -> None:
        if not self._lora_id and _has_adapters(self._model):
            raise UnsupportedModel("the model has adapters loaded; name the active one by lora_id")

    @property
    def _extra(self) -> bytes:
        """What tells the keys of the adapter apart. Asked for each chain: one may have been loaded meanwhile."""
        self._check_adapters()
        return extra_identity(self._lora_id)

    def restore(self, token_ids: TokenIds) -> Restored:
        """A cache with the longest stored prefix of `token_ids` in whole blocks, to hand to `generate`.

        `token_ids` is one prompt from its first token on, without padding. At least one token is left
        to compute, for the model has to give its logits.
        """
        chain = self._chain(_as_array(token_ids)[:-1])
        if len(chain):
            try:
                with self._blocks.lookup(chain) as lease:
                    if lease.hit_blocks:
                        return self._load(lease)
            except KVError as error:
                log.warning("the history is computed again", extra={"reason": error.reason, "why": error.message})
                return Restored(DynamicCache(config=self._config), error=error)
        return Restored(DynamicCache(config=self._config))

    def save(self, token_ids: TokenIds, cache: Cache, durability: Durability = Durability.DRAM) -> Saved:
        """Store the whole blocks of `token_ids` that are not stored yet. `cache` starts with these tokens' KV."""
        states = self._states(cache)
        chain = self._chain(_as_array(token_ids)[: cache.get_seq_length()])
        if not len(chain):
            return Saved()
        try:
            stored_before = self._blocks.contains(chain)
            if stored_before == len(chain):
                return Saved(already_stored=stored_before)
            slices = [self._slices(layer, stored_before, len(chain)) for layer in states]
            result = self._blocks.save(chain[stored_before:], slices, durability)
        except KVError as error:
            log.warning("a turn was not saved", extra={"reason": error.reason, "why": error.message})
            return Saved(refused=len(chain), error=error)
        return _saved(result, stored_before)

    def _chain(self, token_ids: NDArray[Any]) -> BlockChain:
        block_count = len(token_ids) // self.layout.block_tokens
        return block_chain(self.layout, token_ids, salt=self._salt, extras=[self._extra] * block_count)

    def _load(self, lease: Lease) -> Restored:
        cache = DynamicCache(config=self._config)
        layers = _dynamic_layers(cache, self.layout.layers)
        size_bytes = 0
        for loaded in lease.load():
            self._fill(layers[loaded.index], loaded.data)
            size_bytes += loaded.data.nbytes
        return Restored(cache, lease.hit_tokens, size_bytes, _tier(lease))

    def _fill(self, layer: DynamicLayer, data: NDArray[np.uint8]) -> None:
        """Put the blocks of one layer, one after another, into a cache layer that is still empty."""
        layout = self.layout
        elements = torch.from_numpy(data).view(self._dtype)
        # [block][K, V][head][token][dim]
        blocks = elements.view(-1, 2, layout.kv_heads, layout.block_tokens, layout.k_head_dim)
        keys, values = (blocks[:, part].transpose(0, 1).flatten(1, 2)[None].to(self._device) for part in (0, 1))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values  # `update` would copy them once more.

    def _slices(self, layer: tuple[torch.Tensor, torch.Tensor], first_block: int, block_end: int) -> torch.Tensor:
        """The slices of some blocks of one layer, one after another in new memory of the host."""
        layout = self.layout
        count, tokens = block_end - first_block, layout.block_tokens
        slices = torch.empty(count, 2, layout.kv_heads, tokens, layout.k_head_dim, dtype=self._dtype)
        for part, states in enumerate(layer):
            new = states[0, :, first_block * tokens : block_end * tokens]
            slices[:, part].copy_(new.view(layout.kv_heads, count, tokens, -1).transpose(0, 1))
        return slices

    def _states(self, cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer. Raises UnsupportedModel where they are not what the layout describes."""
        layers = _dynamic_layers(cache, self.layout.layers)
        expected = (1, self.layout.kv_heads, cache.get_seq_length(), self.layout.k_head_dim)
        found = []
        for index, layer in enumerate(layers):
            keys, values = layer.keys, layer.values
            if keys is None or values is None:
                raise UnsupportedModel(f"layer {index} of the cache is empty")
            for states in (keys, values):
                if tuple(states.shape) != expected or states.dtype != self._dtype:
                    raise UnsupportedModel(
                        f"layer {index} of the cache is {tuple(states.shape)} of {states.dtype}; "
                        f"one sequence of this model would be {expected} of {self._dtype}"
                    )
            found.append((keys, values))
        return found


def layout_of(model: PreTrainedModel, *, model_id: str, model_revision: str, block_tokens: int) -> Layout:
    """The layout of a model's KV. Raises UnsupportedModel where blocks could not be given back exactly."""
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise UnsupportedModel("the model reads more than tokens: their ids alone do not tell what its KV is")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UnsupportedModel("the model lies on several devices")
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(f"the model computes in {dtype}; KV can be kept in {', '.join(DTYPE_BYTES)}")
    _dynamic_layers(DynamicCache(config=config), config.num_hidden_layers)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Layout(
        model_id=model_id,
        model_revision=model_revision,
        dtype=dtype,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        k_head_dim=head_dim,
        v_head_dim=head_dim,
        block_tokens=block_tokens,
        rotary=_rotary(model, getattr(config, "rope_parameters", None) or {}),
    )


def _rotary(model: PreTrainedModel, parameters: Mapping[str, Any]) -> Rotary:
    """How the model rotates its keys. The dims are counted where the model keeps its frequencies."""
    frequencies = [getattr(module, "inv_freq", None) for module in model.modules()]
    dims = {2 * each.numel() for each in frequencies if isinstance(each, torch.Tensor)}
    if not parameters and not dims:
        return Rotary()
    kind = parameters.get("rope_type")
    if not isinstance(kind, str) or len(dims) != 1 or kind in _LENGTH_DEPENDENT_ROTARY:
        raise UnsupportedModel(f"keys rotated by {dict(parameters)} cannot be reused in another prompt")
    numbers = {name: value for name, value in parameters.items() if name not in ("rope_type", "rope_theta")}
    if not all(value is None or isinstance(value, (int, float)) for value in numbers.values()):
        raise UnsupportedModel(f"the rotary parameters {numbers} are not plain numbers")
    return Rotary(
        kind=kind,
        pairing=_pairing(model),
        dims=dims.pop(),
        base=float(parameters["rope_theta"]),
        parameters=tuple((name, float(value)) for name, value in numbers.items() if value is not None),
    )


def _pairing(model: PreTrainedModel) -> str:
    """Which two dims turn together, asked of the model's own code: no configuration says it."""
    rotate_half = getattr(sys.modules[type(model).__module__], "rotate_half", None)
    if rotate_half is None:
        raise UnsupportedModel(f"how {type(model).__name__} pairs the dims of its rotary encoding is not known")
    rotated = rotate_half(torch.arange(1.0, 5.0)).tolist()
    known = {(-3.0, -4.0, 1.0, 2.0): "half", (-2.0, 1.0, -4.0, 3.0): "interleaved"}
    if tuple(rotated) not in known:
        raise UnsupportedModel(f"{type(model).__name__} pairs the dims of its rotary encoding in an unknown way")
    return known[tuple(rotated)]


def _dynamic_layers(cache: Cache, layer_count: int) -> list[DynamicLayer]:
    """The cache's layers. Raises UnsupportedModel where they are of another kind or number."""
    # Not isinstance: sliding, quantized and indexed layers are subclasses, and keep less, or more.
    layers = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    if len(layers) != len(cache.layers):
        strange = {type(layer).__name__ for layer in cache.layers} - {DynamicLayer.__name__}
        raise UnsupportedModel(f"cache layers of kind {', '.join(sorted(strange))} cannot be kept, only DynamicLayer")
    if len(layers) != layer_count:
        raise UnsupportedModel(f"the cache has {len(layers)} layers; the model has {layer_count}")
    return layers


def _has_adapters(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False)) or hasattr(model, "peft_config")


def _as_array(token_ids: TokenIds) -> NDArray[Any]:
    """Token ids of one sequence; a batch of one is taken too. Raises UnsupportedModel for a larger one."""
    array = token_ids.numpy(force=True) if isinstance(token_ids, torch.Tensor) else np.asarray(token_ids)
    if array.ndim == 2:
        if len(array) != 1:
            raise UnsupportedModel(f"a batch of {len(array)} sequences is given; restore and save take one at a time")
        array = array[0]
    return array


def _tier(lease: Lease) -> str:
    in_dram = {run.dram for run in lease.residency if run.count}
    if len(in_dram) > 1:
        return "mixed"
    return "dram" if in_dram.pop() else "ssd"


def _saved(result: SaveResult, stored_before: int) -> Saved:
    error = result.refused[0][1] if result.refused else None
    if error is not None:
        log.warning("blocks were not saved", extra={"blocks": len(result.refused), "why": error.message})
    return Saved(result.stored, result.already_stored + stored_before, len(result.refused), error)
