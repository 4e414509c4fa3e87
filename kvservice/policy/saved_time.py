"""What one use of an item saves: seconds until the request's first token, where the engine's rates are known.

A use that finds the item on SSD takes as long as `kvservice_api.cost.plan` would: it is read, computed again, or both
at once. With sizes in bytes of KV, a use of an item of S bytes takes

    computed     S / computed per second
    from SSD     min(computed, (wait + S / read per second + S / link per second) * read)
    from DRAM    S / link per second

where `read` is the share that is read while the rest is computed, 1 / (1 + computed per second / read per second). So
DRAM saves `from SSD - from DRAM`, and SSD saves `computed - from SSD`; without an SSD, DRAM saves `computed - from
DRAM`. What saves nothing is worth nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice.policy.items import Conditions
from kvservice.policy.survival import Floats, Ints


class SavedTime(NamedTuple):
    """The terms of the formulas above, as seconds and seconds per byte. All are 0 if the rates are not known."""

    computed: float
    wait_s: float
    read: float
    link: float

    @classmethod
    def of(cls, conditions: Conditions) -> SavedTime:
        computed_per_s, read_per_s = conditions.recompute_bytes_per_s, conditions.ssd_bytes_per_s
        if not computed_per_s:
            return cls(0.0, 0.0, 0.0, 0.0)
        both = 1 / (1 + computed_per_s / read_per_s)
        link = 1 / conditions.link_bytes_per_s
        return cls(1 / computed_per_s, conditions.demand_wait_s * both, both * (1 / read_per_s + link), link)

    def per_byte(self, size: int, value: float, has_ssd: bool) -> tuple[float, float]:
        """What a use saves per byte of an item, in seconds, or in `value` if the rates are not known.

        First for an item in DRAM that SSD has too, then for one that is lost when it is evicted: an item on SSD, or
        any item if there is no SSD.
        """
        if not self.computed:
            return value / size, value / size
        if not has_ssd:
            saved = max(self.computed - self.link, 0.0)
            return saved, saved
        from_ssd = min(self.computed, self.wait_s / size + self.read)
        return max(from_ssd - self.link, 0.0), max(self.computed - from_ssd, 0.0)

    def per_bytes(self, sizes: Ints, values: NDArray[np.float32], has_ssd: bool) -> tuple[Floats, Floats]:
        """`per_byte` of several items. All arrays have the shape [items]."""
        if not self.computed:
            each: Floats = values / sizes
            return each, each
        if not has_ssd:
            each = np.full(len(sizes), max(self.computed - self.link, 0.0))
            return each, each
        from_ssd = np.minimum(self.wait_s / sizes + self.read, self.computed)
        return np.maximum(from_ssd - self.link, 0.0), np.maximum(self.computed - from_ssd, 0.0)
