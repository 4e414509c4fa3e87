"""`functools.cached_property` as it is from Python 3.12 on: without a lock.

In Python 3.11 each such property has one lock for all objects of its class, held while the value is computed. A child
that is forked while another thread holds it waits for ever; threads wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801  # Named as the one it replaces.
    """Computes an attribute once per object, at its first use; two threads at the same time may both compute it."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, made: None, owner: type) -> Self: ...
    @overload
    def __get__(self, made: object, owner: type) -> T: ...
    def __get__(self, made: object | None, owner: type) -> Self | T:
        if made is None:
            return self
        value: T = self._compute(made)
        vars(made)[self._name] = value  # Found before this method from now on, also in a frozen dataclass.
        return value
