"""Checks of arguments. A caller's mistake raises InvalidRequest at once, with the rule, before any call."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message

from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import KEY_BYTES, BlockChain
from kvservice_api.session_ids import checked_session_id
from kvservice_api.v1 import types_pb2

M = TypeVar("M", bound=Message)
T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)

_TIER_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TIER_NUMBERS = {"dram": types_pb2.TIER_DRAM, "ssd": types_pb2.TIER_SSD}
_SECONDS_MAX = 1e9  # Some thirty years. Clocks of threads and of gRPC overflow at larger ones.
_CLIENT_NAME_MAX = 200
_REQUEST_ID_BYTES_MAX = 200


def instance(value: object, kind: type[T], field: str) -> T:
    """The value, if it is of this class."""
    if not isinstance(value, kind):
        raise InvalidRequest(f"{field} is of type {type(value).__name__}; it must be a {kind.__name__}", field=field)
    return value


def whole(value: Any, field: str, least: int = 0, most: int = 2**32 - 1) -> int:
    """The value, if it is a whole number in this range. NumPy's integers are accepted, booleans are not."""
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if isinstance(value, (bool, np.bool_)) or not least <= found <= most:
        raise InvalidRequest(f"{field} is {value!r}; it must be a whole number in {least}..{most}", field=field)
    return found


def sequence(value: Any, field: str) -> Sequence[Any]:
    """The value, if it has a length and can be indexed, as lists, tuples and arrays."""
    if isinstance(value, (str, bytes)) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        raise InvalidRequest(f"{field} is of type {type(value).__name__}; it must be a sequence", field=field)
    found: Sequence[Any] = value
    return found


def request_id(value: object) -> str:
    """The value, if it is a valid request id."""
    return text(value, "request_id", _REQUEST_ID_BYTES_MAX)


def text(value: object, field: str, bytes_max: int) -> str:
    """The value, if it is text that a message can have, of at most so many bytes in UTF-8."""
    try:
        if isinstance(value, str) and len(value.encode()) <= bytes_max:
            return value
    except UnicodeEncodeError:
        pass  # Half of a surrogate pair, as JSON may have.
    raise InvalidRequest(f"{field} must be text of at most {bytes_max} bytes", field=field)


def optional_session_id(value: object) -> str:
    """The value, if it is a session id, or empty."""
    return "" if value == "" else checked_session_id(value)


def seconds(value: object, field: str) -> float:
    """The value, if it is a duration in seconds: a number from 0 to 1e9, finite."""
    found = _number(value)
    if not 0 <= found <= _SECONDS_MAX:
        raise InvalidRequest(f"{field} is {value!r}; it must be a number of seconds from 0 to 1e9", field=field)
    return found


def rate(value: object, field: str) -> float:
    """The value, if it is a number of bytes per second, 0 or more."""
    found = _number(value)
    if not 0 <= found < math.inf:
        raise InvalidRequest(f"{field} is {value!r}; it must be a number of bytes per second, 0 for none", field=field)
    return found


def _number(value: object) -> float:
    """The number; NaN if the value is not a number. Texts, booleans and arrays are not."""
    return float(value) if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) else math.nan


def member(value: Any, kind: type[E], field: str) -> E:
    """The value as a member of an enumeration of texts."""
    try:
        return kind(value)
    except ValueError:
        words = ", ".join(repr(each.value) for each in kind)
        raise InvalidRequest(f"{field} is {value!r}; it must be one of {words}", field=field) from None


def tier_fields(tier: object) -> dict[str, Any]:
    """The fields of a request that name a tier; none for None. The daemon refuses a tier that it does not have."""
    if tier is None:
        return {}
    if not isinstance(tier, str) or not _TIER_NAME.fullmatch(tier):
        raise InvalidRequest(f"tier is {tier!r}; it must be 'dram', 'ssd' or the name of another tier", field="tier")
    return {"tier": _TIER_NUMBERS.get(tier, types_pb2.TIER_NAMED), "tier_name": str(tier)}


def client_name(value: object) -> str:
    """The value, if it is a valid client name."""
    if not isinstance(value, str) or len(value) > _CLIENT_NAME_MAX:
        raise InvalidRequest(f"name must be text of at most {_CLIENT_NAME_MAX} characters", field="name")
    return value


def chain(value: object) -> BlockChain:
    return instance(value, BlockChain, "chain")


def key(value: object) -> bytes:
    """The value, if it is a block key."""
    if not isinstance(value, bytes) or len(value) != KEY_BYTES:
        shown = f"{len(value)} bytes" if isinstance(value, bytes) else f"of type {type(value).__name__}"
        raise InvalidRequest(f"a key is {shown}; it must be {KEY_BYTES} bytes", field="keys")
    return value


def packed_keys(values: Any, count_max: int) -> Iterator[bytes]:
    """The keys, joined, in requests of at most `count_max`."""
    if isinstance(values, (bytes, str)) or not isinstance(values, Iterable):
        raise InvalidRequest("keys must be a sequence of keys, each 32 bytes", field="keys")
    remaining = iter(values)
    while some := list(islice(remaining, count_max)):
        yield b"".join(map(key, some))


def message(kind: type[M], **fields: object) -> M:
    """A request with these fields. Raises InvalidRequest if a value is not of its field's type or range."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a value given is of the wrong type or out of range: {error}") from error
