"""Positions are decoupled from keys: a key that was rotated at one position is turned to another.

    rope = Rope.from_model(model)
    rotation = rope.rotation(stored_positions, read_positions)     # None: every key is where it is read
    if rotation is not None:
        rotation.apply(keys)                                       # in place, once a layer

Rotary encoding turns each pair of a key's dims by an angle in proportion to the position: R(p). Rotations
compose, so a key of position p becomes the one of position q by R(q - p). The factor that YaRN puts on
keys is in them already. Arithmetic is fp32 whatever the keys are; keys whose position does not change
are not touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvservice_adapter.rope_frequencies import UnsupportedRotation, frequencies_of, kind_of
from kvservice_adapter.rope_of_model import pairing_of, rotary_modules, rotated_by

__all__ = ["Rope", "Rotation", "Stretch", "UnsupportedRotation"]

Positions = Sequence[int] | NDArray[Any]

PAIRINGS = ("half", "interleaved")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROBE_TOKENS, _PROBE_SHIFT = 4, 509
_PROBE_DIFFERENCE_MAX = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # Share of the keys' norm.


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens that are turned, `end` excluded. `cos` and `sin` are ``[1 or token, dims / 2]``, fp32."""

    first: int
    end: int
    cos: torch.Tensor
    sin: torch.Tensor

    def part(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`cos` and `sin` of tokens `first` to `end`, which are in this stretch."""
        if len(self.cos) == 1:
            return self.cos, self.sin
        return self.cos[first - self.first : end - self.first], self.sin[first - self.first : end - self.first]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Turns the keys of one sequence from where they were stored to where they are read. Immutable; thread-safe.

    `stretches` are ascending and disjoint; tokens between them stay where they are.
    """

    stretches: tuple[Stretch, ...]
    pairing: str

    def apply(self, keys: torch.Tensor, first: int = 0, count: int | None = None) -> None:
        """Turn `keys`, ``[..., token, dim]`` with any strides, in place.

        They are `count` tokens of the sequence (default: all that `keys` holds) from its token `first` on.
        Raises UnsupportedRotation for quantized keys.
        """
        end = first + (keys.shape[-2] if count is None else count)
        for stretch in self.stretches:
            begin, stop = max(first, stretch.first), min(end, stretch.end)
            if begin < stop:
                turn(keys[..., begin - first : stop - first, :], *stretch.part(begin, stop), self.pairing)


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """One model's rotation of keys.

    `frequencies`: angle a position in radians, fp32 ``[dims / 2]``; `attention_scaling`: the factor on rotated
    keys. Above `tokens_max` tokens in one prompt the frequencies are others (dynamic NTK): neither save nor
    reuse KV there. None: they never change. `rotates_in_fp32`: whether the engine does, whatever its keys are.
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

        `pairing` is in no configuration: which two dims turn together is told by the engine's code ("half":
        i and i + dims / 2; "interleaved": 2 i and 2 i + 1). Raises UnsupportedRotation.
        """
        kind = kind_of(parameters)
        frequencies, scaling = frequencies_of(parameters, head_dim, max_position_embeddings)
        return cls(frequencies, pairing, scaling, kind, _tokens_max(kind, max_position_embeddings))

    @classmethod
    def from_model(cls, model: Any) -> Rope:
        """A transformers model's own rotation, tried on the model itself.

        The model computes a few tokens at two places, and the keys of every layer must be each other's
        rotation. So layers without rotary encoding, norms after it and whatever else the configuration
        does not tell are found. Raises UnsupportedRotation with the reason.
        """
        parameters = getattr(model.config, "rope_parameters", None) or {}
        kind = kind_of(parameters)
        module = rotary_modules(model)[0]
        # `inv_freq` is what the last prompt used, in a model whose frequencies change.
        frequencies = module.original_inv_freq if kind == "dynamic" else module.inv_freq
        scaling = float(getattr(module, "attention_scaling", 1.0))
        tokens_max = _tokens_max(kind, getattr(model.config, "max_position_embeddings", None))
        rope = cls(frequencies, pairing_of(model), scaling, kind, tokens_max)
        rope._try_on(model)
        return replace(rope, rotates_in_fp32=not rope._rotates_as(model, torch.bfloat16))

    @property
    def dims(self) -> int:
        """How many of a key's dims turn: its first."""
        return 2 * len(self.frequencies)

    def check_shift(self, total_tokens: int) -> None:
        """Raises UnsupportedRotation if in a prompt of `total_tokens` keys would be turned by other frequencies."""
        if self.tokens_max is not None and total_tokens > self.tokens_max:
            raise UnsupportedRotation(
                f"{self.kind} frequencies change above {self.tokens_max} tokens; this prompt has {total_tokens}"
            )

    def rotation(self, stored: Positions, read: Positions) -> Rotation | None:
        """What turns keys from the positions they were rotated at to those they are read at, token by token.

        None where no position changes: then there is nothing to do, and every bit stays.
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
            stretches.append(Stretch(first, end, angles.cos().float(), angles.sin().float()))
        return Rotation(tuple(stretches), self.pairing)

    def rotate(self, keys: torch.Tensor, positions: Positions) -> None:
        """Rotate keys ``[..., token, dim]``, which were captured before rotation, in place.

        With the model's own arithmetic, so that the keys are those that it would have cached, bit for bit.
        """
        cos, sin = ((part * self.attention_scaling).to(keys.dtype) for part in self._angles(positions))
        turn(keys, cos, sin, self.pairing, in_fp32=self.rotates_in_fp32)

    def unrotate(self, keys: torch.Tensor, positions: Positions) -> None:
        """Take the model's rotation, and its factor, from keys ``[..., token, dim]``, in place."""
        cos, sin = self._angles(positions)
        turn(keys, cos / self.attention_scaling, -sin / self.attention_scaling, self.pairing)

    def _angles(self, positions: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 throughout, as models compute them: what is rotated here is to be what the model rotates."""
        angles = torch.from_numpy(np.asarray(positions, np.float32))[:, None] * self.frequencies
        return angles.cos(), angles.sin()

    def _rotates_as(self, model: Any, dtype: torch.dtype) -> bool:
        """Whether the model's code rotates keys of this dtype as `rotate` does: bit for bit."""
        given = torch.linspace(-3.0, 3.0, _PROBE_TOKENS * self.dims).view(1, 1, _PROBE_TOKENS, self.dims).to(dtype)
        positions = range(1, _PROBE_TOKENS + 1)
        theirs = rotated_by(model, given, positions)
        ours = given.clone()
        self.rotate(ours, positions)
        return theirs is not None and torch.equal(theirs.cpu(), ours)

    def _try_on(self, model: Any) -> None:
        limit = self.tokens_max or getattr(model.config, "max_position_embeddings", None) or 2 * _PROBE_SHIFT
        shift = max(1, min(_PROBE_SHIFT, limit - _PROBE_TOKENS))
        try:
            here, there = (_keys_at(model, first) for first in (0, shift))
        except (TypeError, AttributeError, ValueError, IndexError) as error:
            raise UnsupportedRotation(f"the model does not compute tokens at given positions: {error}") from error
        positions = np.arange(_PROBE_TOKENS)
        rotation = self.rotation(positions, positions + shift)
        assert rotation is not None
        for layer, (keys, expected) in enumerate(zip(here, there, strict=True)):
            turned = keys.clone()
            rotation.apply(turned)
            difference = float((turned.float() - expected.float()).norm() / expected.float().norm())
            if not difference <= _PROBE_DIFFERENCE_MAX[keys.dtype]:
                raise UnsupportedRotation(
                    f"keys of layer {layer} are not turned by {self.kind} rotary encoding of {self.pairing} pairs "
                    f"alone: moved by {shift} positions they differ by {difference:.2g}"
                )


@torch.inference_mode()  # Keys may have been computed in it, and are then changed nowhere else.
def turn(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str, *, in_fp32: bool = True) -> None:
    """Turn pairs of the first dims of ``keys[..., token, dim]`` in place: (a, b) -> (a cos - b sin, b cos + a sin).

    `cos` and `sin` are ``[1 or token, dims / 2]``. Products and sums are fp32 and rounded once to the keys' dtype;
    without `in_fp32` each is rounded to it. Raises UnsupportedRotation for quantized keys.
    """
    if keys.dtype not in _DTYPES:
        raise UnsupportedRotation(f"keys of {keys.dtype} cannot be turned; recompute them")
    half = cos.shape[-1]
    if pairing == "half":
        first, second = keys[..., :half], keys[..., half : 2 * half]
    else:
        first, second = keys[..., 0 : 2 * half : 2], keys[..., 1 : 2 * half : 2]
    dtype = torch.float32 if in_fp32 else keys.dtype
    cos, sin = cos.to(keys.device, dtype), sin.to(keys.device, dtype)
    a, b = first.to(dtype), second.to(dtype)
    turned = a * cos - b * sin
    second.copy_(b * cos + a * sin)  # Before `first`: `a` may be a view of it.
    first.copy_(turned)


def _tokens_max(kind: str, max_position_embeddings: int | None) -> int | None:
    if kind != "dynamic":
        return None
    if max_position_embeddings is None:
        raise UnsupportedRotation("dynamic rotary encoding needs max_position_embeddings")
    # One less: at the limit itself transformers keeps what a longer prompt before it has set.
    return max_position_embeddings - 1


@torch.inference_mode()
def _keys_at(model: Any, first: int) -> list[torch.Tensor]:
    """The keys of each layer for a few tokens at positions `first` and on, without a history."""
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None] % model.config.vocab_size
    positions = torch.arange(first, first + _PROBE_TOKENS, device=model.device)[None]
    computed = model(tokens, position_ids=positions, use_cache=True)
    return [layer.keys for layer in computed.past_key_values.layers]
