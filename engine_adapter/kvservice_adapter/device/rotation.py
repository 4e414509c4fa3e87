"""Rotates keys to other positions: the numbers that a device uses, and the rotation itself on a CPU.

Rotary encoding turns each pair of a key's dims by an angle in proportion to the position. `rope` makes rotations
from models; a device applies them where the keys are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice_adapter.device.arrays import bits_of, view_of

_CHUNK_ELEMENTS = 32768  # Turned at a time, so that what is computed on the way stays in a processor's cache.
_BF16_NAN = 0x7FC0

Floats = NDArray[np.float32]


class UnsupportedRotation(ValueError):
    """Keys cannot be rotated to another position exactly. Recompute them there; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Consecutive tokens that are rotated, `end` excluded. `cos` and `sin` are ``[1 or token, dims / 2]``, fp32."""

    first: int
    end: int
    cos: Floats
    sin: Floats

    def part(self, first: int, end: int) -> tuple[Floats, Floats]:
        """`cos` and `sin` of tokens `first` to `end`, which are in this stretch."""
        if len(self.cos) == 1:
            return self.cos, self.sin
        return self.cos[first - self.first : end - self.first], self.sin[first - self.first : end - self.first]


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Turns the keys of one sequence in one layer. Immutable; any thread may use it.

    `stretches` are ascending and disjoint; tokens between them stay where they are. `pairing` says which two dims
    are rotated together: "half", i and i + dims / 2, or "interleaved", 2 i and 2 i + 1. Products and sums are computed
    in fp32 and rounded once to the keys' type; with `in_fp32` False each of them is rounded.
    """

    stretches: tuple[Stretch, ...]
    pairing: str = "half"
    in_fp32: bool = True

    def apply(self, keys: Any) -> None:
        """Turn `keys`, an array ``[..., token, dim]`` in host memory with any strides, in place; on this thread.

        They are the sequence's tokens from its first one on. Raises UnsupportedRotation for quantized keys.
        """
        view = view_of(keys)
        self.rotate_bits(bits_of(view), view.dtype)

    def rotate_bits(self, bits: NDArray[Any], dtype: str, first: int = 0) -> None:
        """As `apply`, of tokens from `first` on: the elements' bits (`arrays.bits_of`) and the name of their type."""
        if dtype not in ("float32", "float16", "bfloat16"):
            raise UnsupportedRotation(f"keys of {dtype} cannot be rotated; recompute them")
        end = first + bits.shape[-2]
        tokens_max = max(1, _CHUNK_ELEMENTS // max(1, bits[..., :1, :].size))
        for stretch in self.stretches:
            stop = min(end, stretch.end)
            for begin in range(max(first, stretch.first), stop, tokens_max):
                part_end = min(begin + tokens_max, stop)
                self._rotate(bits[..., begin - first : part_end - first, :], dtype, *stretch.part(begin, part_end))

    def _rotate(self, bits: NDArray[Any], dtype: str, cos: Floats, sin: Floats) -> None:
        """Pairs of the first dims: (a, b) -> (a cos - b sin, b cos + a sin)."""
        half = cos.shape[-1]
        if self.pairing == "half":
            first, second = bits[..., :half], bits[..., half : 2 * half]
        else:
            first, second = bits[..., 0 : 2 * half : 2], bits[..., 1 : 2 * half : 2]
        a, b = _floats(first, dtype), _floats(second, dtype)
        # A NaN stays a NaN. Rounding to halves may overflow, as it does in any engine.
        with np.errstate(invalid="ignore", over="ignore"):
            if self.in_fp32 or dtype == "float32":
                turned, other = a * cos - b * sin, b * cos + a * sin
            else:
                turned = _rounded(a * cos, dtype) - _rounded(b * sin, dtype)
                other = _rounded(b * cos, dtype) + _rounded(a * sin, dtype)
            first[...], second[...] = _bits(turned, dtype), _bits(other, dtype)


def rounded(values: Floats, dtype: str) -> Floats:
    """fp32 values that are exact in `dtype`."""
    with np.errstate(invalid="ignore", over="ignore"):
        return _rounded(values, dtype)


def _rounded(values: Floats, dtype: str) -> Floats:
    return values if dtype == "float32" else _floats(_bits(values, dtype), dtype)


def _floats(bits: NDArray[Any], dtype: str) -> Floats:
    """fp32 values of elements, in new memory or as a view."""
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bits(values: Floats, dtype: str) -> NDArray[Any]:
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    # Round to nearest, ties to even. NaNs are kept as they are: rounding could turn them into infinity or zero.
    carry = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    halves = ((bits + carry) >> np.uint32(16)).astype(np.uint16)
    is_nan = np.isnan(values)
    if is_nan.any():
        halves[is_nan] = _BF16_NAN
    return halves
