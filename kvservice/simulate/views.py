"""Views by which single values of arrays are read and written: three times as fast as through numpy."""

from __future__ import annotations

from typing import Any, cast

from numpy.typing import NDArray


def ints(array: NDArray[Any]) -> memoryview[int]:
    """Of an array of whole numbers."""
    return array.data


def floats(array: NDArray[Any]) -> memoryview[float]:
    """Of an array of floats."""
    return cast("memoryview[float]", array.data)


def bools(array: NDArray[Any]) -> memoryview[bool]:
    """Of an array of truth values."""
    return cast("memoryview[bool]", array.data)
