"""Learned counts as bytes, to keep them over a restart: a header, then the arrays as little-endian float64."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from kvservice.policy.hint_times import HintTimes
from kvservice.policy.return_times import ReturnTimes
from kvservice.policy.survival import Floats

_VERSION = 1
_HEADER = struct.Struct("<4sII")  # A mark, the version, and how many numbers follow.
_MARK = b"KVPL"


def packed(returns: ReturnTimes, hints: HintTimes, knows_enough: bool) -> bytes:
    """What both have counted."""
    numbers = np.array((returns.survival.event_count, float(knows_enough)))
    values = np.concatenate([array.reshape(-1) for array in _arrays(numbers, returns, hints)]).astype("<f8")
    return _HEADER.pack(_MARK, _VERSION, len(values)) + values.tobytes()


def fits(state: bytes, returns: ReturnTimes, hints: HintTimes) -> bool:
    """Whether `unpack` takes the bytes: they have this version and the length that both need, and are finite."""
    count = sum(array.size for array in _arrays(np.zeros(2), returns, hints))
    if len(state) != _HEADER.size + 8 * count or _HEADER.unpack_from(state) != (_MARK, _VERSION, count):
        return False
    return bool(np.isfinite(np.frombuffer(state, "<f8", offset=_HEADER.size)).all())


def unpack(state: bytes, returns: ReturnTimes, hints: HintTimes) -> bool:
    """Let both have counted what `packed` got. Returns its `knows_enough`. The bytes must fit."""
    values = np.frombuffer(state, "<f8", offset=_HEADER.size)
    numbers = np.zeros(2)
    begin = 0
    for array in _arrays(numbers, returns, hints):
        array[...] = values[begin : begin + array.size].reshape(array.shape)
        begin += array.size
    returns.survival.restored(int(numbers[0]))
    return bool(numbers[1])


def _arrays(numbers: Floats, returns: ReturnTimes, hints: HintTimes) -> Sequence[Floats]:
    return [numbers, *returns.counts(), *hints.counts()]
