"""Which tokens of a history stay when it overflows the model's window. Pure functions.

    keep = keep_on_overflow(2040, window=2048, new_tokens=100)       # [(0, 4), (1022, 1018)]
    state = session.truncate(keep, state.revision)

Ranges are (first token, count), ascending and disjoint, counted in the history as it is: what
`Session.truncate` takes. An empty list keeps nothing; the session is then ended instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvservice_api.errors import InvalidRequest

Ranges = list[tuple[int, int]]


def keep_on_overflow(
    token_count: int,
    *,
    window: int,
    new_tokens: int,
    ratio: float = 0.5,
    sink_tokens: int = 4,
    block_tokens: int | None = None,
    block_ends: Sequence[int] | None = None,
) -> Ranges:
    """The ranges of a history of `token_count` tokens that stay, so that they and `new_tokens` fit in `window`.

    Everything, where it fits. Else the oldest `ratio` of what follows the first `sink_tokens` leaves, and
    again, until the rest fits (CachedAttention, arXiv 2403.19708, section 3.4, drops the oldest half; there
    are no sinks there: `sink_tokens=0`). Nothing, where not even the sinks fit.

    With `block_tokens`, what follows the cut begins where a block does, at a multiple of it; or, in a history
    that was cut before, after one of `block_ends` (ascending). More tokens leave if needed; if no later
    block begins, all but the sinks leave. Raises InvalidRequest for settings under which no history could stay.
    """
    _check(token_count, window, new_tokens, ratio, sink_tokens, block_tokens)
    if token_count + new_tokens <= window:
        return _ranges((0, token_count))
    sinks = min(sink_tokens, token_count)
    if sinks + new_tokens > window:
        return []
    first = sinks  # The first token after the cut.
    while sinks + (token_count - first) + new_tokens > window:
        first += math.ceil((token_count - first) * ratio)
        if block_ends is not None:
            at = bisect_left(block_ends, first)
            first = block_ends[at] if at < len(block_ends) else token_count
        elif block_tokens is not None:
            first = -(-first // block_tokens) * block_tokens
        first = min(first, token_count)
    return _ranges((0, sinks), (first, token_count - first))


def keep_without(token_count: int, discard: Sequence[int] | NDArray[Any]) -> Ranges:
    """The ranges that stay when a compression method discards these tokens, in any order.

    Raises InvalidRequest for tokens that the history does not have.
    """
    tokens = np.asarray(discard, np.int64)
    if tokens.ndim != 1:
        raise InvalidRequest(f"discard has {tokens.ndim} dimensions; give a list of tokens", field="discard")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < token_count:
        raise InvalidRequest(
            f"discard names tokens {tokens.min()} to {tokens.max()}; the history has {token_count}", field="discard"
        )
    stays = np.zeros(token_count + 2, np.int8)
    stays[1:-1] = 1
    stays[tokens + 1] = 0
    edges = np.diff(stays)
    firsts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(firsts.tolist(), (ends - firsts).tolist(), strict=True))


def kept_tokens(keep: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """The tokens of some ranges, one by one: where in the old history each token of the new one was."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(first, first + count) for first, count in keep)])


def _ranges(*ranges: tuple[int, int]) -> Ranges:
    return [each for each in ranges if each[1]]


def _check(
    token_count: int, window: int, new_tokens: int, ratio: float, sink_tokens: int, block_tokens: int | None
) -> None:
    for name, value, least in (
        ("token_count", token_count, 0),
        ("new_tokens", new_tokens, 0),
        ("sink_tokens", sink_tokens, 0),
        ("block_tokens", 1 if block_tokens is None else block_tokens, 1),
    ):
        if value < least:
            raise InvalidRequest(f"{name} is {value}; it must be at least {least}", field=name)
    if window <= new_tokens:
        raise InvalidRequest(
            f"the window has {window} tokens and {new_tokens} are new: no history fits; shorten the new tokens",
            field="window",
        )
    if sink_tokens >= window:
        raise InvalidRequest(
            f"sink_tokens is {sink_tokens}; it must be less than the window, {window}", field="sink_tokens"
        )
    if not 0 < ratio <= 1:
        raise InvalidRequest(f"ratio is {ratio}; it must be more than 0 and at most 1", field="ratio")
