"""Positions are decoupled from keys: a key that was rotated at one position is rotated further to another.

    ropes = ModelRopes.from_model(model)
    rotations = ropes.rotations(stored_positions, read_positions)      # None: every key is where it is read
    if rotations is not None:
        rotations[layer].apply(keys)                                   # in place, once per layer

Rotary encoding turns each pair of a key's dims by an angle in proportion to the position: R(p). Rotations
compose, so a key of position p becomes the one of position q by R(q - p). The factor that YaRN puts on
keys is in them already. Arithmetic is fp32 for every dtype of the keys; keys whose position does not change
are not touched. Layers may rotate in different ways (Gemma 3: another base where attention is local).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvservice_adapter.device.rotation import Rotation, Stretch, UnsupportedRotation, rounded
from kvservice_adapter.rope_frequencies import frequencies_of, kind_of
from kvservice_adapter.rope_of_model import frequencies_of_layers, pairing_of, rotated_by

__all__ = ["ModelRopes", "Rope", "Rotation", "Stretch", "UnsupportedRotation"]

Positions = Sequence[int] | NDArray[Any]

PAIRINGS = ("half", "interleaved")
_PROBE_TOKENS, _PROBE_SHIFT = 4, 509
_PROBE_DIFFERENCE_MAX = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # Share of the keys' norm.


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """How one layer, or all layers of a model, rotate keys.

    `frequencies`: angle per position in radians, fp32 ``[dims / 2]``; `attention_scaling`: the factor on rotated
    keys. Above `tokens_max` tokens in one prompt the frequencies are others (dynamic NTK): neither save nor
    reuse KV there. None: they never change. `rotates_in_fp32`: whether the engine rotates in fp32, for every dtype of
    its keys.
    """

    frequencies: torch.Tensor
    pairing: str = "half"
    attention_scaling: float = 1.0
    kind: str = "default"
    tokens_max: int | None = None
    rotates_in_fp32: bool = False
    _exact: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise UnsupportedRotation(f"pairs of dims {self.pairing!r} are not known; known are {', '.join(PAIRINGS)}")
        object.__setattr__(self, "frequencies", self.frequencies.detach().to("cpu", torch.float32))
        object.__setattr__(self, "_exact", self.frequencies.double())

    @classmethod
    def from_config(
        cls,
        parameters: Mapping[str, Any],
        *,
        head_dim: int,
        pairing: str = "half",
        max_position_embeddings: int | None = None,
    ) -> Rope:
        """From `rope_parameters` as transformers 5 writes them: `rope_type`, `rope_theta`, `partial_rotary_factor`, ...

        `pairing` is in no configuration: the engine's code decides which two dims are rotated together ("half":
        i and i + dims / 2; "interleaved": 2 i and 2 i + 1). Raises UnsupportedRotation.
        """
        kind = kind_of(parameters)
        frequencies, scaling = frequencies_of(parameters, head_dim, max_position_embeddings)
        return cls(frequencies, pairing, scaling, kind, _tokens_max(kind, max_position_embeddings))

    @classmethod
    def from_model(cls, model: Any) -> Rope:
        """A transformers model's own rotation, where all layers have the same: `ModelRopes.from_model`."""
        ropes = ModelRopes.from_model(model).layers
        if any(rope is not ropes[0] for rope in ropes):
            raise UnsupportedRotation("the rotary encoding differs from layer to layer")
        return ropes[0]

    @property
    def dims(self) -> int:
        """How many of a key's dims turn: its first."""
        return 2 * len(self.frequencies)

    def check_shift(self, total_tokens: int) -> None:
        """Raises UnsupportedRotation if in a prompt of `total_tokens` keys would be rotated by other frequencies."""
        if self.tokens_max is not None and total_tokens > self.tokens_max:
            raise UnsupportedRotation(
                f"{self.kind} frequencies change above {self.tokens_max} tokens; this prompt has {total_tokens}"
            )

    def rotation(self, stored: Positions, read: Positions) -> Rotation | None:
        """The rotations of keys from the positions where they were stored to those where they are read, token by token.

        None if no position changes: then there is nothing to do, and every bit stays.
        """
        shifts = np.asarray(read, np.int64) - np.asarray(stored, np.int64)
        if not shifts.any():
            return None
        edges = np.flatnonzero(np.diff(shifts != 0)) + 1
        bounds = [0, *edges.tolist(), len(shifts)]
        stretches = []
        for first, end in itertools.pairwise(bounds):
            turned = shifts[first:end]
            if not turned[0]:
                continue
            distinct = turned[:1] if (turned == turned[0]).all() else turned
            # fp64: the angle of a long shift would lose digits in fp32.
            angles = torch.from_numpy(distinct.astype(np.float64))[:, None] * self._exact
            stretches.append(Stretch(first, end, angles.cos().float().numpy(), angles.sin().float().numpy()))
        return Rotation(tuple(stretches), self.pairing)

    def placing(self, positions: Positions, dtype: str) -> Rotation:
        """Rotates keys that were captured before rotation.

        With the model's own arithmetic for keys of `dtype`, so that they are those that it would have cached, bit for
        bit.
        """
        cos, sin = (rounded((part * self.attention_scaling).numpy(), dtype) for part in self._angles(positions))
        return Rotation((Stretch(0, len(positions), cos, sin),), self.pairing, self.rotates_in_fp32)

    def unplacing(self, positions: Positions) -> Rotation:
        """Takes the model's rotation, and its factor, from keys."""
        cos, sin = ((part / self.attention_scaling).numpy() for part in self._angles(positions))
        return Rotation((Stretch(0, len(positions), cos, -sin),), self.pairing)

    def _angles(self, positions: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 throughout, as models compute them, so that keys rotated here equal the model's own."""
        angles = torch.from_numpy(np.asarray(positions, np.float32))[:, None] * self.frequencies
        return angles.cos(), angles.sin()

    def _rotates_as(self, model: Any, dtype: torch.dtype, layer_type: str) -> bool:
        """Whether the model's code rotates keys of this dtype as `placing` does: bit for bit."""
        given = torch.linspace(-3.0, 3.0, _PROBE_TOKENS * self.dims).view(1, 1, _PROBE_TOKENS, self.dims).to(dtype)
        positions = range(1, _PROBE_TOKENS + 1)
        theirs = rotated_by(model, given, positions, layer_type)
        ours = given.clone()
        self.placing(positions, str(dtype).removeprefix("torch.")).apply(ours)
        return theirs is not None and torch.equal(theirs.cpu(), ours)


@dataclass(frozen=True, slots=True, eq=False)
class ModelRopes:
    """How each layer of a model rotates its keys. Layers that rotate alike share one `Rope`."""

    layers: tuple[Rope, ...]

    @classmethod
    def from_model(cls, model: Any) -> ModelRopes:
        """A transformers model's own rotations, tried on the model itself.

        The model computes a few tokens at two places, and the keys of every layer must be each other's
        rotation. This finds layers without rotary encoding, norms after it, and everything else that the
        configuration does not state. Raises UnsupportedRotation with the reason.
        """
        given = frequencies_of_layers(model)
        pairing = pairing_of(model)
        context_tokens = getattr(model.config, "max_position_embeddings", None)
        made = {}
        for layer_type, own in given.of_type.items():
            tokens_max = _tokens_max(own.kind, context_tokens)
            rope = Rope(own.frequencies, pairing, own.attention_scaling, own.kind, tokens_max)
            in_fp32 = not rope._rotates_as(model, torch.bfloat16, layer_type)
            made[layer_type] = replace(rope, rotates_in_fp32=in_fp32)
        ropes = cls(tuple(made[layer_type] for layer_type in given.layer_types))
        ropes._try_on(model)
        return ropes

    @property
    def tokens_max(self) -> int | None:
        """`Rope.tokens_max` of the layer that has the least."""
        return min((rope.tokens_max for rope in self.layers if rope.tokens_max is not None), default=None)

    def check_shift(self, total_tokens: int) -> None:
        """Raises UnsupportedRotation if in a prompt of `total_tokens` keys would be rotated by other frequencies."""
        for rope in self._distinct:
            rope.check_shift(total_tokens)

    def rotations(self, stored: Positions, read: Positions) -> list[Rotation] | None:
        """`Rope.rotation` of each layer. None if no position changes."""
        made = {rope: rope.rotation(stored, read) for rope in self._distinct}
        rotations = [made[rope] for rope in self.layers]
        return [each for each in rotations if each is not None] or None  # It is None for all of them, or for none.

    @property
    def _distinct(self) -> list[Rope]:
        return list(dict.fromkeys(self.layers))

    def _try_on(self, model: Any) -> None:
        limit = self.tokens_max or getattr(model.config, "max_position_embeddings", None) or 2 * _PROBE_SHIFT
        shift = max(1, min(_PROBE_SHIFT, limit - _PROBE_TOKENS))
        try:
            here, there = (_keys_at(model, first) for first in (0, shift))
        except (TypeError, AttributeError, ValueError, IndexError) as error:
            raise UnsupportedRotation(f"the model does not compute tokens at given positions: {error}") from error
        positions = np.arange(_PROBE_TOKENS)
        rotations = self.rotations(positions, positions + shift)
        assert rotations is not None
        if not len(here) == len(there) == len(rotations):
            raise UnsupportedRotation(f"the model caches {len(here)} layers; {len(rotations)} rotate keys")
        for layer, (keys, expected, rotation) in enumerate(zip(here, there, rotations, strict=True)):
            turned = keys.clone()
            rotation.apply(turned)
            difference = float((turned.float() - expected.float()).norm() / expected.float().norm())
            if not difference <= _PROBE_DIFFERENCE_MAX[keys.dtype]:
                rope = self.layers[layer]
                raise UnsupportedRotation(
                    f"keys of layer {layer} are not rotated only by {rope.kind} rotary encoding of {rope.pairing} "
                    f"pairs: moved by {shift} positions they differ by {difference:.2g}"
                )


def _tokens_max(kind: str, max_position_embeddings: int | None) -> int | None:
    if kind != "dynamic":
        return None
    if max_position_embeddings is None:
        raise UnsupportedRotation("dynamic rotary encoding needs max_position_embeddings")
    # One less: at the limit itself transformers keeps what a longer prompt before it has set.
    return max_position_embeddings - 1


@torch.inference_mode()
def _keys_at(model: Any, first: int) -> list[torch.Tensor]:
    """The keys of each layer for a few tokens at positions `first` and on, without a history; in host memory."""
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None] % model.config.vocab_size
    positions = torch.arange(first, first + _PROBE_TOKENS, device=model.device)[None]
    computed = model(tokens, position_ids=positions, use_cache=True)
    return [layer.keys.cpu() for layer in computed.past_key_values.layers]
