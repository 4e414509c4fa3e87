"""Hazards made into rates of return, ready to be read for any age and price of reading."""

from __future__ import annotations

import numpy as np

from kvservice.policy.survival import BIN_COUNT, Floats, Ints, places_of
from kvservice.policy.worth import fetchable, losable

_LEAST_PRICE = 0.01
_PRICE_STEP = 10**0.5
_PRICES = _LEAST_PRICE * _PRICE_STEP ** np.arange(8)  # Of one read, in hits.


class Scores:
    """Indices by class, price and age, in returns a second: of holding, of fetching, of holding what leaving loses."""

    def __init__(self, *hazards: Floats) -> None:
        self.learn(*hazards)

    def learn(self, *hazards: Floats) -> None:
        """`hazards` (classes, bins), one group of classes after the other."""
        every = np.concatenate(hazards)
        hold, fetch = fetchable(every, _PRICES)
        self._hold, self._fetch = hold.reshape(-1), fetch.reshape(-1)
        self._lost = losable(every).reshape(-1)

    def rates(self, classes: Ints, ages_s: Floats, ready_s: Floats, prices: Floats) -> Floats:
        """For items of these classes and ages: three rows, of holding it, of fetching it so that it is there at age
        `ready_s`, and of holding it where leaving loses it."""
        levels = np.rint(np.log(prices * (1 / _LEAST_PRICE)) * (1 / np.log(_PRICE_STEP)))
        levels = np.clip(levels, 0, len(_PRICES) - 1).astype(np.int64)
        priced = (classes * len(_PRICES) + levels) * BIN_COUNT
        now, ready = places_of(ages_s), places_of(ready_s)
        return np.stack(
            [
                _between(self._hold, priced, now),
                _between(self._fetch, priced, ready),
                _between(self._lost, classes * BIN_COUNT, now),
            ]
        )


def _between(table: Floats, begins: Ints, places: Floats) -> Floats:
    whole = places.astype(np.int64)
    low = begins + whole
    read: Floats = table[low] + (places - whole) * (table[low + 1] - table[low])
    return read
