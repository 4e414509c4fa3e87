"""What it is worth to keep something that comes back at a known hazard, and to fetch it ahead of time.

Memory is rented: holding costs `rent` a second, and each return that finds what it wants earns 1. The greatest
rent at which holding is still right is the index of an item at its age; whoever keeps the highest indices per
byte makes the best of a full memory (Whittle 1988). Reading costs: a return that finds nothing pays for a read,
and so does fetching ahead. Where what leaves is lost, the index is Gittins': the best mean reward over any stop.
"""

from __future__ import annotations

import numpy as np

from kvservice.policy.survival import WIDTHS, Floats

_RENTS = 40
_RENT_RANGE = 1e-6  # The least rent that is looked at, of the greatest that could ever be right.


def fetchable(hazards: Floats, prices: Floats, widths_s: Floats = WIDTHS) -> tuple[Floats, Floats]:
    """The indices of holding what is held, and of fetching what is not, where what leaves can be read again.

    `hazards` (class, bin) in returns a second; `prices` of one read, in returns that find what they want.
    Answers two arrays (class, price, bin), in returns a second. Backward through the ages for a grid of rents:
    V_in = max(hold, V_out), V_out = max(wait, V_in - price).
    """
    returns, stays_s = _passage(hazards, widths_s)
    price = prices[:, None]
    classes, bins = hazards.shape
    most = hazards.max(axis=1)[:, None, None] * (1 + price)
    rents = most * np.geomspace(_RENT_RANGE, 1.0, _RENTS)  # (class, price, rent)
    gains = np.empty((bins, classes, len(prices), _RENTS))
    value_in = value_out = np.zeros(gains.shape[1:])
    for at in reversed(range(bins)):
        comes = returns[:, at, None, None]
        hold = comes + (1 - comes) * value_in - rents * stays_s[:, at, None, None]
        wait = (1 - comes) * value_out - comes * price
        gains[at] = hold - wait
        value_in, value_out = np.maximum(hold, wait), np.maximum(wait, hold - price)
    in_order = gains.transpose(1, 2, 0, 3)
    rents = rents[:, :, None, :]
    hold = np.maximum(_break_even(in_order, rents), hazards[:, None, :])  # Holding for a moment is always an option.
    return hold, _break_even(in_order - price[..., None], rents)


def losable(hazards: Floats, widths_s: Floats = WIDTHS) -> Floats:
    """The index of holding (class, bin) where what leaves is lost. Exact: ages are joined from the last one
    backwards as long as going on raises the mean."""
    returns, stays_s = _passage(hazards, widths_s)
    index = np.empty_like(hazards)
    for row in range(len(hazards)):
        stretches: list[tuple[float, float]] = []  # Chance of a return, time spent; the next age's on top.
        for at in reversed(range(hazards.shape[1])):
            comes, stays = float(returns[row, at]), float(stays_s[row, at])
            while stretches and stretches[-1][0] * stays > comes * stretches[-1][1]:
                then_comes, then_stays = stretches.pop()
                comes, stays = comes + (1 - comes) * then_comes, stays + (1 - comes) * then_stays
            stretches.append((comes, stays))
            index[row, at] = comes / stays
    return index


def _passage(hazards: Floats, widths_s: Floats) -> tuple[Floats, Floats]:
    """Of whoever enters a bin: the share that returns in it, and the time that it stays."""
    returns = -np.expm1(-hazards * widths_s)
    return returns, returns / hazards


def _break_even(gains: Floats, rents: Floats) -> Floats:
    """The rent at which a gain that falls with it comes to nothing; 0 where there is none at any rent."""
    right = np.count_nonzero(gains >= 0, axis=-1)
    low = np.clip(right - 1, 0, gains.shape[-1] - 2)[..., None]
    gain_low, gain_high = (np.take_along_axis(gains, low + step, -1)[..., 0] for step in (0, 1))
    rents = np.broadcast_to(rents, gains.shape)
    rent_low, rent_high = (np.take_along_axis(rents, low + step, -1)[..., 0] for step in (0, 1))
    share = np.clip(gain_low / np.maximum(gain_low - gain_high, 1e-300), 0.0, 1.0)
    found: Floats = np.where(right > 0, rent_low + share * (rent_high - rent_low), 0.0)
    return found
