"""Memory views of arrays. Access to single elements is about three times as fast as through NumPy."""

from __future__ import annotations

from typing import Any, cast

from numpy.typing import NDArray


def ints(array: NDArray[Any]) -> memoryview[int]:
    """A view of an integer array."""
    return array.data


def floats(array: NDArray[Any]) -> memoryview[float]:
    """A view of a float array."""
    return cast("memoryview[float]", array.data)


def bools(array: NDArray[Any]) -> memoryview[bool]:
    """A view of a bool array."""
    return cast("memoryview[bool]", array.data)
