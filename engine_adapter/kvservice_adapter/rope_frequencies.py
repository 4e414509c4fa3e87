"""How fast each pair of dims turns, from the parameters that a model's configuration gives.

The formulas are those of transformers' `modeling_rope_utils`, in fp32 as there, so that the frequencies
are the model's own to the last bit. Engines that are not built on transformers read the same names
from the same `config.json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from kvservice_adapter.device.rotation import UnsupportedRotation

# In these a key is rotated by its position alone, or (dynamic) is as long as the prompt is short enough.
KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def kind_of(parameters: Mapping[str, Any]) -> str:
    """The kind of rotation that `parameters` describe. Raises UnsupportedRotation for one not in KINDS."""
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedRotation("the rotary encoding differs from layer to layer")
    if parameters.get("mrope_section") is not None:
        raise UnsupportedRotation("the rotary encoding has several positions per token (mrope)")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "longrope":
        raise UnsupportedRotation("with longrope, the rotation of a key depends on the length of the whole prompt")
    if kind not in KINDS:
        raise UnsupportedRotation(f"rotary encoding of kind {kind!r} is not known; known are {', '.join(KINDS)}")
    return str(kind)


def frequencies_of(
    parameters: Mapping[str, Any], head_dim: int, max_position_embeddings: int | None = None
) -> tuple[torch.Tensor, float]:
    """Angle a position in radians, fp32 ``[dims / 2]``, and the factor on rotated queries and keys.

    Dynamic NTK: those that hold up to `max_position_embeddings`. Raises UnsupportedRotation for other
    kinds, and where a parameter is missing.
    """
    kind = kind_of(parameters)
    dims = int(head_dim * _number(parameters, "partial_rotary_factor", 1.0))
    if dims < 2 or dims % 2 or dims > head_dim:
        raise UnsupportedRotation(f"{dims} of {head_dim} dims cannot be rotated in pairs")
    base = _number(parameters, "rope_theta")
    wavelengths = base ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)
    frequencies = 1.0 / wavelengths
    if kind == "linear":
        return frequencies / _number(parameters, "factor"), 1.0
    if kind == "llama3":
        return _llama3(frequencies, parameters), 1.0
    if kind == "yarn":
        return _yarn(wavelengths, parameters, base, max_position_embeddings)
    return frequencies, 1.0


def _llama3(frequencies: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: long waves are stretched by the factor, short ones kept, those between interpolated."""
    factor = _number(parameters, "factor")
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    trained_tokens = _number(parameters, "original_max_position_embeddings")
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > trained_tokens / low, frequencies / factor, frequencies)
    share = (trained_tokens / wavelengths - low) / (high - low)
    between = ~(wavelengths < trained_tokens / high) & ~(wavelengths > trained_tokens / low)
    return torch.where(between, (1 - share) * stretched / factor + share * stretched, stretched)


def _yarn(
    wavelengths: torch.Tensor, parameters: Mapping[str, Any], base: float, max_position_embeddings: int | None
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): a ramp over the dims between interpolation and extrapolation, and a scale."""
    dims = 2 * len(wavelengths)
    trained_tokens = _number(parameters, "original_max_position_embeddings", max_position_embeddings)
    factor = _number(parameters, "factor", max_position_embeddings and max_position_embeddings / trained_tokens)

    def dim_that_turns(times: float) -> float:
        return (dims * math.log(trained_tokens / (times * 2 * math.pi))) / (2 * math.log(base))

    first, last = (
        dim_that_turns(_number(parameters, "beta_fast", 32.0)),
        dim_that_turns(_number(parameters, "beta_slow", 1.0)),
    )
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    if first == last:
        last += 0.001
    kept = 1 - torch.clamp((torch.arange(dims // 2, dtype=torch.float32) - first) / (last - first), 0, 1)
    frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return frequencies, _yarn_scale(factor, parameters)


def _yarn_scale(factor: float, parameters: Mapping[str, Any]) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(_number(parameters, "mscale")) / scale(_number(parameters, "mscale_all_dim"))
    return scale(1.0)


def _number(parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = parameters.get(name)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UnsupportedRotation(f"{name} is {value!r}; the rotary encoding needs a number there")
    return value
