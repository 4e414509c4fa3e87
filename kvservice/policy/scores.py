"""Tables of scores from hazards, by age and by the price of a read."""

from __future__ import annotations

import math
from bisect import bisect

import numpy as np

from kvservice.policy.survival import BIN_COUNT, Floats, Ints
from kvservice.policy.worth import gittins_index, whittle_index

_LEAST_PRICE = 0.01
_PRICE_COUNT = 7  # Prices of one read in hits, half an order of magnitude apart.
_SAME = 1e-3  # Hazards that change by less keep their indices.
_LEVELS_PER_E = 2 / math.log(10)
_PRICES = _LEAST_PRICE * np.exp(np.arange(_PRICE_COUNT) / _LEVELS_PER_E)
#: A price counts as the nearest of `_PRICES`.
_LEVEL_ENDS: Floats = _LEAST_PRICE * np.exp((np.arange(_PRICE_COUNT - 1) + 0.5) / _LEVELS_PER_E)
_LEVEL_END: list[float] = _LEVEL_ENDS.tolist()

KEEP, HOLD, FETCH, LATER = range(4)


class Scores:
    """Four indices by class, price and age, in returns per second.

    KEEP is the worth of staying in DRAM if eviction loses the item, HOLD if SSD has a copy. FETCH is the worth of being
    read from SSD now, LATER the highest FETCH at this age or any later one.
    """

    def __init__(self, *hazards: Floats) -> None:
        self._hazards: Floats = np.empty((0, BIN_COUNT))
        self.learn(*hazards)

    def learn(self, *hazards: Floats) -> None:
        """Compute the tables. `hazards` are arrays of shape [classes, bins], which are concatenated by class."""
        every = np.concatenate(hazards)
        if len(every) != len(self._hazards):
            changed = np.arange(len(every))
            self._hazards = every
            self._tables = np.empty((4, len(every), _PRICE_COUNT, BIN_COUNT))
        else:
            changed = np.flatnonzero((np.abs(every - self._hazards) > _SAME * self._hazards).any(axis=1))
            if not len(changed):
                return
            self._hazards[changed] = every[changed]
        places: dict[bytes, int] = {}  # Of the different hazards: many classes begin alike.
        same = [places.setdefault(row.tobytes(), len(places)) for row in every[changed]]
        different = np.frombuffer(b"".join(places)).reshape(len(places), -1)
        hold, fetch = whittle_index(different, _PRICES)
        self._tables[HOLD, changed], self._tables[FETCH, changed] = hold[same], fetch[same]
        self._tables[LATER, changed] = np.maximum.accumulate(fetch[..., ::-1], axis=-1)[..., ::-1][same]
        self._tables[KEEP, changed] = gittins_index(different)[same, None, :]
        self._table = self._tables.reshape(-1)
        self._view = self._table.data
        self._kind = self._tables[0].size
        self._kinds = (np.arange(4) * self._kind).reshape(2, 2, 1)

    def rates(self, classes: Ints, places: Floats, prices: Floats) -> Floats:
        """The four indices, shape [4, items].

        `places`: shape [2, items], `places_of` the ages now, and of those at which items are in DRAM that are fetched
        now. It is changed.
        """
        begins = classes * _PRICE_COUNT
        begins += _LEVEL_ENDS.searchsorted(prices, side="right")
        begins *= BIN_COUNT
        bins = places.astype(np.int64)
        places -= bins
        bins += begins
        low = bins[:, None] + self._kinds  # KEEP and HOLD are read at the present age, the others at `ready_s`.
        rates: Floats = self._table[low]
        low += 1
        slopes = self._table[low]
        slopes -= rates
        slopes *= places[:, None]
        rates += slopes
        return rates.reshape(4, -1)

    def at_once(self, in_class: int, price: float) -> tuple[float, float]:
        """(HOLD, KEEP) of a class at age 0."""
        begins = (in_class * _PRICE_COUNT + bisect(_LEVEL_END, price)) * BIN_COUNT
        return self._view[begins + HOLD * self._kind], self._view[begins + KEEP * self._kind]
