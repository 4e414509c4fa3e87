"""Learned counts as bytes, to keep them over a restart: a header, then the arrays as little-endian float64."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from kvservice.policy.survival import Floats

_HEADER = struct.Struct("<4sII")  # A mark, the version, and how many numbers follow.
_MARK = b"KVPL"


def packed(version: int, arrays: Sequence[Floats]) -> bytes:
    """The arrays' values in their order."""
    values = np.concatenate([array.reshape(-1) for array in arrays]).astype("<f8")
    return _HEADER.pack(_MARK, version, len(values)) + values.tobytes()


def unpack_into(arrays: Sequence[Floats], version: int, state: bytes) -> bool:
    """Copy the values of `packed` into arrays of the same shapes.

    False, and nothing changes, if they are of another version or number, or not finite.
    """
    count = sum(array.size for array in arrays)
    if len(state) != _HEADER.size + 8 * count or _HEADER.unpack_from(state) != (_MARK, version, count):
        return False
    values = np.frombuffer(state, "<f8", offset=_HEADER.size)
    if not np.isfinite(values).all():
        return False
    begin = 0
    for array in arrays:
        array[...] = values[begin : begin + array.size].reshape(array.shape)
        begin += array.size
    return True
