"""What `lru` would have in DRAM, followed on a sample of the items, and whether a policy should follow it.

The shadow holds no bytes: only the keys and sizes of sampled items, in the order of their last uses, up to the share of
DRAM that the sample has. If many items are in it, fewer are sampled, so its memory is bounded.
"""

from __future__ import annotations

import math
from collections import OrderedDict

_ITEMS_MAX = 2048
_MEMORY = 1024.0  # Sampled uses after which a difference counts 1/e.
_LEAST_USES = 64
_SIGNIFICANT = 2.0  # In standard deviations of the sum of differences.
#: Recency decides until `lru` would have replaced DRAM so often: before that, absences of the length that matters have
#: hardly been seen. It decides again where `lru` is ahead: each time for twice as long, but at most so long.
_UNKNOWN_TURNOVERS, _TURNOVERS_MAX = 4.0, 64.0
_SCATTER = 0x9E3779B97F4A7C15  # Odd, so that the products of different keys differ.
_WORD_BITS = 64
_WORD_MASK = (1 << _WORD_BITS) - 1
_KEPT = 1 - 1 / _MEMORY


class ShadowLru:
    """An LRU cache of sampled keys, and the bytes that it and the real DRAM had for the requests that used them."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._halvings = 0  # One in 2 ** halvings keys is sampled.
        self._sampled_bytes = capacity_bytes  # The sample's share of DRAM.
        self._sizes: OrderedDict[int, int] = OrderedDict()  # The oldest use first.
        self._held_bytes = 0
        self._left_bytes = 0
        self._would_have = self._returned = 0.0  # Bytes, over recent uses.
        self.restart()

    def restart(self) -> None:
        """Compare from now on."""
        self._uses = 0
        self._ahead = self._square = 0.0

    def size_of(self, key: int) -> int:
        """The bytes of an item that `lru` would have; 0 if none, or if it is not sampled."""
        return self._sizes.get(key, 0)

    def used(self, key: int, size_bytes: int, dram_bytes: int) -> None:
        """A request uses an item that was saved with this size, and that has so many bytes in the real DRAM."""
        if not size_bytes or (self._halvings and not self._is_sampled(key)):
            return
        shadowed = self._sizes.get(key, 0)
        if shadowed > size_bytes:
            shadowed = size_bytes
        ahead = shadowed - dram_bytes
        self._uses += 1
        self._ahead = self._ahead * _KEPT + ahead
        self._square = self._square * _KEPT + ahead * ahead
        self._would_have = self._would_have * _KEPT + shadowed
        self._returned = self._returned * _KEPT + size_bytes

    def stored(self, key: int, size_bytes: int) -> None:
        """The item was saved, and is what was used last."""
        if self._halvings and not self._is_sampled(key):
            return
        sizes = self._sizes
        self._held_bytes += size_bytes - sizes.pop(key, 0)
        sizes[key] = size_bytes
        while self._held_bytes > self._sampled_bytes:
            oldest = next(iter(sizes))
            size = sizes[oldest]
            leaves = self._held_bytes - self._sampled_bytes
            if leaves < size:  # The end of an item leaves first.
                sizes[oldest] = size - leaves
            else:
                leaves = size
                del sizes[oldest]
            self._held_bytes -= leaves
            self._left_bytes += leaves << self._halvings
        if len(sizes) > _ITEMS_MAX:
            self._sample_less()

    def _sample_less(self) -> None:
        self._halvings += 1
        self._sampled_bytes = self._capacity_bytes >> self._halvings
        self._sizes = OrderedDict((key, size) for key, size in self._sizes.items() if self._is_sampled(key))
        self._held_bytes = sum(self._sizes.values())

    def _is_sampled(self, key: int) -> bool:
        return not (key * _SCATTER & _WORD_MASK) >> (_WORD_BITS - self._halvings)

    @property
    def turnovers(self) -> float:
        """How often `lru` would have replaced all that is in DRAM."""
        return self._left_bytes / self._capacity_bytes if self._capacity_bytes else 0.0

    @property
    def hit_share(self) -> float:
        """Of the bytes that requests used, those that `lru` would have had in DRAM."""
        return self._would_have / self._returned if self._returned else 0.0

    @property
    def is_ahead(self) -> bool:
        """Whether `lru` would have had more, beyond chance."""
        return self._uses >= _LEAST_USES and self._ahead > _SIGNIFICANT * math.sqrt(self._square)


class LruChoice:
    """Whether to follow recency: while nothing better is known, and where `lru` would have had more."""

    def __init__(self, capacity_bytes: int, may_differ: bool) -> None:
        """`may_differ`: whether the policy has another order. If not, it never needs to follow."""
        self.shadow = ShadowLru(capacity_bytes)
        self.follows = may_differ
        self._may_differ = may_differ
        self._length = self._until = _UNKNOWN_TURNOVERS

    def used(self, key: int, size_bytes: int, dram_bytes: int) -> None:
        self.shadow.used(key, size_bytes, dram_bytes)

    def stored(self, key: int, size_bytes: int) -> None:
        shadow = self.shadow
        shadow.stored(key, size_bytes)
        if self.follows:
            if shadow.turnovers >= self._until:
                self.follows = False
                shadow.restart()
        elif self._may_differ and shadow.is_ahead:
            self.follows = True
            self._until = shadow.turnovers + self._length
            self._length = min(2 * self._length, _TURNOVERS_MAX)

    @property
    def knows_enough(self) -> bool:
        """Whether recency does not decide for lack of anything better."""
        return not self.follows or self._length > _UNKNOWN_TURNOVERS

    def restored(self, knew_enough: bool) -> None:
        """What an earlier run has learned is known."""
        self.follows = self._may_differ and not knew_enough
