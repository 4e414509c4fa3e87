"""Keeps the KV of Hugging Face transformers models: restore before a turn, save after it.

    connector = TransformersConnector(client, model, model_id="SmolLM2-135M-Instruct", model_revision=revision)

    history = connector.restore(input_ids)
    output = model.generate(input_ids, past_key_values=history.cache)      # prefills what was not restored
    connector.save(output[0, : history.cache.get_seq_length()], history.cache)

Both take a `session_id`: then the last block is kept too, though it is not full, and all of a
conversation's history is there again at its next turn.

A `DynamicLayer` holds keys and values as ``[1, head, token, dim]``; a stored slice is
``[K, V][head][token][dim]`` of one block. Either way each byte is copied once here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvservice_api.errors import KVError, SessionNotFound
from kvservice_api.keys import BlockChain, block_chain, extra_identity
from kvservice_api.layout import DTYPE_BYTES, Layout, Rotary
from kvservice_client import Client, Durability, Lease, SaveResult, SessionState

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
    """What became of a save: counts of blocks, and why the first one was not stored, or the session not continued."""

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
        self._client = client
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

    def restore(self, token_ids: TokenIds, *, session_id: str = "") -> Restored:
        """A cache with the longest stored prefix of `token_ids`, to hand to `generate`.

        In whole blocks, but for the end of what was saved under `session_id`. `token_ids` is one prompt
        from its first token on, without padding. At least one token is left to compute, for the model
        has to give its logits.
        """
        tokens = _as_array(token_ids)
        chain = self._chain(tokens[:-1])
        try:
            if session_id:
                chain = self._chain_of_session(tokens, session_id) or chain
            if len(chain):
                with self._blocks.lookup(chain) as lease:
                    if lease.hit_blocks:
                        return self._load(lease, tokens_max=len(tokens) - 1)
        except KVError as error:
            log.warning("the history is computed again", extra={"reason": error.reason, "why": error.message})
            return Restored(DynamicCache(config=self._config), error=error)
        return Restored(DynamicCache(config=self._config))

    def save(
        self,
        token_ids: TokenIds,
        cache: Cache,
        durability: Durability = Durability.DRAM,
        *,
        session_id: str = "",
    ) -> Saved:
        """Store the blocks of `token_ids` that are not stored yet. `cache` starts with these tokens' KV.

        Whole blocks only, unless a `session_id` is given: then the last one too, which belongs to the
        session until a later turn brings a fuller one. A session that was truncated is left as it is.
        """
        states = self._states(cache)
        chain = self._chain(_as_array(token_ids)[: cache.get_seq_length()], with_partial=bool(session_id))
        if not len(chain):
            return Saved()
        try:
            stored_before = self._blocks.contains(chain)
            result = SaveResult(0, 0, [])
            if stored_before < len(chain):
                new = chain[stored_before:]
                slices = [self._slices(layer, stored_before, new.token_counts) for layer in states]
                result = self._blocks.save(new, slices, durability)
        except KVError as error:
            log.warning("a turn was not saved", extra={"reason": error.reason, "why": error.message})
            return Saved(refused=len(chain), error=error)
        saved = _saved(result, stored_before)
        if not session_id:
            return saved
        kept = stored_before + result.refused[0][0] if result.refused else len(chain)
        try:
            self._remember(session_id, chain[:kept])
        except KVError as error:
            log.warning("a session was not continued", extra={"session_id": session_id, "why": error.message})
            return replace(saved, error=saved.error or error)
        return saved

    def _chain(self, token_ids: NDArray[Any], *, with_partial: bool = False) -> BlockChain:
        block_count = -(-len(token_ids) // self.layout.block_tokens)
        extras = [self._extra] * block_count
        return block_chain(self.layout, token_ids, salt=self._salt, extras=extras, with_partial=with_partial)

    def _chain_of_session(self, token_ids: NDArray[Any], session_id: str) -> BlockChain | None:
        """The session's history, tail included, as far as `token_ids` begin with it; None where they do not."""
        state = self._state_of(session_id)
        if state is None or state.cuts:  # What is left after a cut cannot be told from the tokens.
            return None
        chain = self._chain(token_ids[: state.token_count], with_partial=True)
        return chain[: _common_blocks(chain, state)] or None

    def _remember(self, session_id: str, chain: BlockChain) -> None:
        """Have the session name these stored blocks. One that went another way before is begun anew."""
        session = self._client.session(self.layout, session_id)
        state = self._state_of(session_id)
        if state is not None and state.cuts:
            log.info("a truncated session is left as it is", extra={"session_id": session_id})
            return
        first_new = 0
        if state is not None:
            first_new = state.slice_count - bool(state.tail_tokens)
            common = _common_blocks(chain, state)
            if common == len(chain) == state.slice_count:
                return  # It names them all.
            next_tokens = chain.token_counts[first_new] if first_new < len(chain) else 0
            if common < first_new or next_tokens <= (state.tail_tokens if common == first_new else 0):
                session.end()
                state, first_new = None, 0
        if len(chain) > first_new:
            session.append(chain[first_new:], state.revision if state is not None else 0)

    def _state_of(self, session_id: str) -> SessionState | None:
        try:
            return self._client.session(self.layout, session_id).get()
        except SessionNotFound:
            return None

    def _load(self, lease: Lease, tokens_max: int) -> Restored:
        cache = DynamicCache(config=self._config)
        layers = _dynamic_layers(cache, self.layout.layers)
        size_bytes = 0
        for loaded in lease.load():
            self._fill(layers[loaded.index], loaded.data, lease.hit_tokens)
            size_bytes += loaded.data.nbytes
        if lease.hit_tokens > tokens_max:
            cache.crop(tokens_max - lease.hit_tokens)  # Negative: how many leave.
        return Restored(cache, min(lease.hit_tokens, tokens_max), size_bytes, _tier(lease))

    def _fill(self, layer: DynamicLayer, data: NDArray[np.uint8], token_count: int) -> None:
        """Put the blocks of one layer, one after another, into a cache layer that is still empty."""
        layout = self.layout
        full, rest = divmod(token_count, layout.block_tokens)
        elements = torch.from_numpy(data).view(self._dtype)
        tail_at = elements.numel() // token_count * (token_count - rest)
        # [block][K, V][head][token][dim]
        blocks = elements[:tail_at].view(full, 2, layout.kv_heads, layout.block_tokens, layout.k_head_dim)
        tail = elements[tail_at:].view(2, layout.kv_heads, rest, layout.k_head_dim)
        shape = (layout.kv_heads, full, layout.block_tokens, layout.k_head_dim)
        found = []
        for part in (0, 1):
            states = torch.empty(layout.kv_heads, token_count, layout.k_head_dim, dtype=self._dtype)
            whole = states[:, : token_count - rest].view(shape)
            whole.copy_(blocks[:, part].transpose(0, 1))
            states[:, token_count - rest :] = tail[part]
            found.append(states[None].to(self._device))
        keys, values = found
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values  # `update` would copy them once more.

    def _slices(
        self, layer: tuple[torch.Tensor, torch.Tensor], first_block: int, token_counts: Sequence[int]
    ) -> torch.Tensor:
        """The slices of some blocks of one layer, one after another in new memory of the host."""
        layout = self.layout
        count, tokens = len(token_counts), layout.block_tokens
        full, rest = count - (token_counts[-1] < tokens), token_counts[-1] % tokens
        first, end = first_block * tokens, (first_block + full) * tokens
        token_elements = 2 * layout.kv_heads * layout.k_head_dim
        memory = torch.empty(sum(token_counts) * token_elements, dtype=self._dtype)
        slices = memory[: full * tokens * token_elements].view(full, 2, layout.kv_heads, tokens, layout.k_head_dim)
        tail = memory[full * tokens * token_elements :].view(2, layout.kv_heads, rest, layout.k_head_dim)
        for part, states in enumerate(layer):
            new = states[0, :, first:end].view(layout.kv_heads, full, tokens, layout.k_head_dim)
            slices[:, part].copy_(new.transpose(0, 1))
            tail[part].copy_(states[0, :, end : end + rest])
        return memory

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


def _common_blocks(chain: BlockChain, state: SessionState) -> int:
    """How many leading blocks a chain and an uncut session share."""
    pairs = zip(chain.keys, state.slices, strict=False)
    return next((at for at, (key, each) in enumerate(pairs) if key != each.key), min(len(chain), len(state.slices)))


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
