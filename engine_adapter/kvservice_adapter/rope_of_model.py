"""How a transformers model rotates keys, read from its configuration and from its code."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from kvservice_adapter.device.rotation import UnsupportedRotation
from kvservice_adapter.rope_frequencies import frequencies_of, kind_of
from kvservice_api.layout import Rotary

NamedPairing = tuple[str, tuple[tuple[str, float], ...]]  # The pairing for a layout, and parameters that go with it.


def rotaries_of(model: Any, layer_count: int) -> list[Rotary]:
    """How each layer rotates its keys, for a layout.

    A model that computes with other frequencies than its configuration gives (`model.to(bfloat16)` rounds them) is
    distinguished by a checksum of them. A model with several rotations has parameters per layer type, and frequencies
    under the type's name (Gemma 3). Raises UnsupportedRotation if no prefix could be reused, and where layer types
    are missing.
    """
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if not parameters and not _frequency_modules(model):
        return [Rotary()] * layer_count
    given = frequencies_of_layers(model)
    pairing = _named_pairing(type(model))
    if "" in given.of_type:
        is_configured = _as_configured(model, given.of_type[""].frequencies)
        return [_rotary(given.of_type[""], parameters, pairing, with_checksum=not is_configured)] * layer_count
    if len(given.layer_types) != layer_count:
        raise UnsupportedRotation("the rotary encoding differs from layer to layer, and no layer types describe it")
    made = {each: _rotary(own, parameters[each], pairing, with_checksum=True) for each, own in given.of_type.items()}
    return [made[each] for each in given.layer_types]


def rotaries_of_config(config: Any, model_class: type | None, head_dims: Sequence[int]) -> list[Rotary]:
    """As `rotaries_of`, for an engine with its own code that computes with the configuration's frequencies.

    `model_class` is that of transformers' own model of this configuration, if there is one: its code shows how dims are
    paired. `head_dims` are those of each layer's keys. Raises UnsupportedRotation, also for dynamic encodings: engines
    differ in when they change the frequencies.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if not parameters:
        return [Rotary()] * len(head_dims)
    types = _layer_types(config)
    if types is not None and len(types) != len(head_dims):
        raise UnsupportedRotation("the rotary encoding differs from layer to layer, and no layer types describe it")
    pairing = _named_pairing(model_class)
    made: dict[tuple[str, int], Rotary] = {}
    for each in zip(types or [""] * len(head_dims), head_dims, strict=True):
        if each in made:
            continue
        layer_type, head_dim = each
        own = parameters[layer_type] if layer_type else parameters
        kind = kind_of(own)
        if kind == "dynamic":
            raise UnsupportedRotation("with a dynamic rotary encoding, engines rotate the same keys differently")
        frequencies, scaling = frequencies_of(own, head_dim, getattr(config, "max_position_embeddings", None))
        computed = OwnFrequencies(kind, frequencies, scaling)
        made[each] = _rotary(computed, own, pairing, with_checksum=bool(layer_type))
    return [made[each] for each in zip(types or [""] * len(head_dims), head_dims, strict=True)]


class OwnFrequencies(NamedTuple):
    """The frequencies and the factor with which a model's code rotates keys."""

    kind: str
    frequencies: torch.Tensor
    attention_scaling: float


class LayerFrequencies(NamedTuple):
    """`of_type` has what the layers' types rotate with: one type, "", where all layers rotate alike."""

    layer_types: list[str]
    of_type: dict[str, OwnFrequencies]


def frequencies_of_layers(model: Any) -> LayerFrequencies:
    """The rotation parameters that the model's code uses in each layer. Raises UnsupportedRotation."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    types = _layer_types(model.config)
    if types is not None:
        found = {}
        for each in set(types):
            type_kind, frequencies = _kind_of_type(parameters[each]), _frequencies_of_type(model, each)
            scaling = _named(model, f"{each}_attention_scaling")
            found[each] = OwnFrequencies(type_kind, frequencies, float(scaling[0]) if scaling else 1.0)
        return LayerFrequencies(types, found)
    kind = kind_of(parameters)
    module = rotary_modules(model)[0]
    # `inv_freq` is what the last prompt used, in a model whose frequencies change.
    frequencies = module.original_inv_freq if kind == "dynamic" else module.inv_freq
    own = OwnFrequencies(kind, frequencies, float(getattr(module, "attention_scaling", 1.0)))
    return LayerFrequencies([""] * model.config.num_hidden_layers, {"": own})


def _layer_types(config: Any) -> list[str] | None:
    """The type of each layer, where types rotate in ways of their own; else None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        return None
    types = list(getattr(config, "layer_types", None) or ())
    if not types or not all(isinstance(parameters.get(each), Mapping) for each in types):
        raise UnsupportedRotation("the rotary encoding differs from layer to layer, and no layer types describe it")
    return types


def _kind_of_type(parameters: Mapping[str, Any]) -> str:
    kind = kind_of(parameters)
    if kind == "dynamic":
        raise UnsupportedRotation("dynamic rotary encoding that differs from layer to layer is not supported")
    return kind


def _frequencies_of_type(model: Any, layer_type: str) -> torch.Tensor:
    found = [each for each in _named(model, f"{layer_type}_inv_freq") if isinstance(each, torch.Tensor)]
    if not found or not all(torch.equal(found[0], each) for each in found[1:]):
        raise UnsupportedRotation(f"{type(model).__name__} keeps no rotary frequencies of {layer_type}")
    return found[0]


def _named(model: Any, name: str) -> list[Any]:
    """The values of an attribute, of all modules of the model that have it."""
    return [getattr(each, name) for each in model.modules() if getattr(each, name, None) is not None]


def _rotary(own: OwnFrequencies, parameters: Mapping[str, Any], named: NamedPairing, *, with_checksum: bool) -> Rotary:
    """`parameters` are the configuration's. The checksum is over the values that the model really uses."""
    numbers = {name: value for name, value in parameters.items() if name not in ("rope_type", "type", "rope_theta")}
    if not all(value is None or isinstance(value, (int, float)) for value in numbers.values()):
        raise UnsupportedRotation(f"the rotary parameters {numbers} are not plain numbers")
    given = [(name, float(value)) for name, value in numbers.items() if value is not None]
    if with_checksum:
        given.append(("frequencies_crc32", float(_checksum(own.frequencies))))
    pairing, unknown = named
    return Rotary(own.kind, pairing, 2 * own.frequencies.numel(), float(parameters["rope_theta"]), (*given, *unknown))


def _named_pairing(model_class: type | None) -> NamedPairing:
    """The pairing for a layout, and a parameter that says so if it is not known.

    Keys that are read where they were stored need no pairing. If they are to be rotated, `pairing_of` raises.
    """
    try:
        return _pairing_of_class(model_class), ()
    except UnsupportedRotation:
        return "half", (("pairing_unknown", 1.0),)


def pairing_of(model: Any) -> str:
    """Which two dims are rotated together. Found by calling the model's code, because no configuration states it."""
    return _pairing_of_class(type(model))


def _pairing_of_class(model_class: type | None) -> str:
    name = model_class.__name__ if model_class is not None else "this model"
    rotate_half = getattr(sys.modules[model_class.__module__], "rotate_half", None) if model_class is not None else None
    if rotate_half is None:
        raise UnsupportedRotation(f"how {name} pairs the dims of its rotary encoding is not known")
    rotated = rotate_half(torch.arange(1.0, 5.0)).tolist()
    known = {(-3.0, -4.0, 1.0, 2.0): "half", (-2.0, 1.0, -4.0, 3.0): "interleaved"}
    if tuple(rotated) not in known:
        raise UnsupportedRotation(f"{name} pairs the dims of its rotary encoding in an unknown way")
    return known[tuple(rotated)]


@torch.inference_mode()
def rotated_by(model: Any, keys: torch.Tensor, positions: Sequence[int], layer_type: str = "") -> torch.Tensor | None:
    """Keys ``[1, head, token, rotary dim]``, rotated by the model's own code; None if it is called another way."""
    rotate = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        return None
    keys = keys.to(model.device)
    places = torch.tensor(positions, device=keys.device)[None]
    try:
        if layer_type:
            name = f"{layer_type}_inv_freq"
            module: Any = next(each for each in model.modules() if getattr(each, name, None) is not None)
            cos, sin = module(keys, places, layer_type)
        else:
            cos, sin = rotary_modules(model)[0](keys, places)
        _, rotated = rotate(keys, keys, cos, sin)
    except (TypeError, ValueError, RuntimeError):  # It is called in another way.
        return None
    return rotated if isinstance(rotated, torch.Tensor) else None


def rotary_modules(model: Any) -> list[Any]:
    """The modules that keep the model's frequencies: one at least, all of the same.

    Raises UnsupportedRotation if there is none, or if they differ.
    """
    modules = _frequency_modules(model)
    if not modules:
        raise UnsupportedRotation(f"{type(model).__name__} keeps no rotary frequencies")
    first = modules[0].inv_freq
    if not all(torch.equal(first, each.inv_freq) for each in modules[1:]):
        raise UnsupportedRotation("the rotary encoding differs from layer to layer")
    return modules


def _frequency_modules(model: Any) -> list[Any]:
    return [each for each in model.modules() if isinstance(getattr(each, "inv_freq", None), torch.Tensor)]


def _as_configured(model: Any, frequencies: torch.Tensor) -> bool:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    configured, _ = frequencies_of(config.rope_parameters, head_dim, getattr(config, "max_position_embeddings", None))
    own = frequencies.to("cpu", torch.float32)
    # Processors differ in the last bits of a power; a rounded frequency differs by far more.
    return configured.shape == own.shape and torch.allclose(configured, own, rtol=1e-5, atol=0.0)


def _checksum(frequencies: torch.Tensor) -> int:
    """Of the frequencies to about four digits, that every processor may find the same."""
    return zlib.crc32((frequencies.double().cpu().log2() * 4096).round().to(torch.int32).numpy().tobytes())
