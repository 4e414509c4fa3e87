"""The value of keeping an item whose hazard of return is known, and of reading it ahead of time.

Model: holding an item costs `rent` per second; a return that finds it earns 1; a return that does not find it pays
the price of a read, as reading ahead does. The greatest rent at which holding is still optimal is the Whittle index of
the item at its age. Keeping the items with the highest indices per byte is the best use of a full memory (Whittle
1988). Where an evicted item is lost, the Gittins index applies: the best mean reward over all stopping times.
"""

from __future__ import annotations

import numpy as np

from kvservice.policy.survival import WIDTHS, Floats

_RENTS = 40
_RENT_RANGE = 1e-6  # The least rent of the grid, relative to the greatest possible one.


def whittle_index(hazards: Floats, prices: Floats, widths_s: Floats = WIDTHS) -> tuple[Floats, Floats]:
    """The Whittle indices of holding and of reading ahead, where an evicted item can be read again.

    `hazards`: shape [class, bin], returns per second. `prices`: of one read, in units of one return that hits.
    Returns two arrays of shape [class, price, bin], in returns per second.
    Dynamic programming backward through the ages, for a grid of rents:
    V_in = max(hold, V_out), V_out = max(wait, V_in - price).
    """
    returns, stays_s = _passage(hazards, widths_s)
    price = prices[:, None]
    classes, bins = hazards.shape
    most = hazards.max(axis=1)[:, None, None] * (1 + price)
    rents = most * np.geomspace(_RENT_RANGE, 1.0, _RENTS)  # (class, price, rent)
    comes, stays_s = (each.T[:, :, None, None] for each in (returns, stays_s))  # (bin, class, 1, 1)
    stays, paid, pays = 1 - comes, rents * stays_s, comes * price
    gains = np.empty((classes, len(prices), bins, _RENTS))
    hold, wait, value_in, value_out = np.zeros((4, *rents.shape))
    for at in reversed(range(bins)):
        np.multiply(stays[at], value_in, out=hold)
        hold += comes[at]
        hold -= paid[at]
        np.multiply(stays[at], value_out, out=wait)
        wait -= pays[at]
        np.subtract(hold, wait, out=gains[:, :, at])
        np.maximum(hold, wait, out=value_in)
        hold -= price
        np.maximum(wait, hold, out=value_out)
    rents = rents[:, :, None, :]
    holding = np.maximum(_break_even(gains, rents), hazards[:, None, :])  # Holding for a moment is always an option.
    gains -= price[..., None]
    return holding, _break_even(gains, rents)


def gittins_index(hazards: Floats, widths_s: Floats = WIDTHS) -> Floats:
    """The Gittins index of holding, shape [class, bin], where an evicted item is lost.

    Exact: ages are merged from the last bin backwards as long as that raises the mean reward.
    """
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
    """Of the items that enter a bin: the share that returns within it, and their mean time in it in seconds."""
    returns = -np.expm1(-hazards * widths_s)
    return returns, returns / hazards


def _break_even(gains: Floats, rents: Floats) -> Floats:
    """The rent at which the gain, which falls with the rent, reaches 0; 0 if it is negative at every rent."""
    right = np.count_nonzero(gains >= 0, axis=-1)
    low = np.minimum(np.maximum(right - 1, 0), gains.shape[-1] - 2)[..., None]
    gain_low, gain_high = (np.take_along_axis(gains, low + step, -1)[..., 0] for step in (0, 1))
    rents = np.broadcast_to(rents, gains.shape)
    rent_low, rent_high = (np.take_along_axis(rents, low + step, -1)[..., 0] for step in (0, 1))
    share = np.clip(gain_low / np.maximum(gain_low - gain_high, 1e-300), 0.0, 1.0)
    found: Floats = np.where(right > 0, rent_low + share * (rent_high - rent_low), 0.0)
    return found
