"""A model of the daemon's store with two tiers: it carries out what a policy decides.

Write-behind is the same for every policy: bytes that are in DRAM and not on SSD are copied while the channel has no
transfer of higher priority, unless the policy does not want the item on SSD.
"""

from __future__ import annotations

import math

import numpy as np

from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.settings import Machine
from kvservice.simulate.ssd_channel import SsdChannel
from kvservice.simulate.tier_contents import TierContents
from kvservice.simulate.views import bools


class StoreModel(TierContents):
    """Both tiers, and the transfers between them. The replay calls it for requests, the channel for transfers."""

    def __init__(
        self, items: ItemTable, machine: Machine, policy: Placement, block_bytes: int, start_s: float = 0.0
    ) -> None:
        super().__init__(items, machine, policy, block_bytes)
        self.channel = SsdChannel(machine.ssd_bytes_per_s, self, start_s)
        self._kept_free = int(policy.dram_kept_free * machine.dram_bytes)
        self._to_write = bools(np.zeros(items.row_count, np.bool_))
        self._worth: dict[int, float] = {}  # By row: what each promotion is worth in DRAM.

    # Requests.

    def stop_promotion(self, row: int) -> None:
        """Stop a promotion. The bytes that were read stay in DRAM."""
        del self._worth[row]
        done, size = self.channel.cancel(row)
        if size:
            self._arrive(row, self._aligned(done), size)
            self.release(row)

    def mark_used(self, row: int) -> None:
        """A request uses the item: its promoted bytes no longer count as unused."""
        self._promoted[row] = 0

    def grow(self, row: int, size_bytes: int, now_s: float) -> None:
        """Set the item's size, with all of it in DRAM. May exceed the capacity: call `evict_to_capacity` next."""
        have = self._dram[row]
        self._dram[row] = size_bytes
        self._size[row] = size_bytes
        self.dram.used_bytes += size_bytes - have
        if not have and size_bytes:
            self._entered_dram(row, now_s)

    def make_room(self, size_bytes: int, now_s: float) -> bool:
        """Evict items that are not held until `size_bytes` are free in DRAM. False if that is not enough."""
        return self._free_dram(size_bytes, math.inf, now_s)

    def evict_to_capacity(self, now_s: float) -> None:
        """Evict the items with the lowest scores until DRAM is within its capacity, and stop promotions if need be.

        An item that was just stored may be evicted too.
        """
        dram = self.dram
        if dram.used_bytes <= dram.capacity_bytes:
            return
        while not self._free_dram(0, math.inf, now_s):
            self.stop_promotion(self.channel.latest_reading())

    def write_behind(self, row: int) -> None:
        """Queue a copy of the bytes that SSD does not have."""
        if self.ssd.capacity_bytes and not self._to_write[row] and self._dram[row] > self._ssd[row]:
            self._to_write[row] = True
            self.channel.write(row)

    def store_on_ssd(self, row: int, size_bytes: int, now_s: float) -> None:
        """Set the item's size without space in DRAM. Bytes that SSD does not have are written to SSD, or lost."""
        self._size[row] = size_bytes
        self._write_now(row, size_bytes, now_s)
        self._forget_if_gone(row, now_s)

    def cut_front(self, row: int, cut_bytes: int, now_s: float) -> None:
        """Remove the first `cut_bytes` of the item from both tiers. The rest becomes the item's new prefix."""
        if self.channel.write_row == row:
            self._end_write_early()
        size, dram, ssd = self._size[row], self._dram[row], self._ssd[row]
        self._size[row] = max(0, size - cut_bytes)
        self.dram.used_bytes -= dram - max(0, dram - cut_bytes)
        self.ssd.used_bytes -= ssd - max(0, ssd - cut_bytes)
        self._dram[row] = max(0, dram - cut_bytes)
        self._ssd[row] = max(0, ssd - cut_bytes)
        if not self._dram[row]:
            self.dram.discard(row)
        if not self._ssd[row]:
            self.ssd.discard(row)

    def drop(self, row: int, now_s: float) -> None:
        """Remove the item from both tiers, because its session has ended."""
        if row in self._worth:
            self.stop_promotion(row)
        self.cut_front(row, self._size[row], now_s)
        self._size[row] = 0
        self._forget_if_gone(row, now_s)

    # Promotions.

    def promote(self, row: int, deadline_s: float, worth: float) -> None:
        """Queue a read of the bytes that only SSD has, or change the deadline and the worth of a queued one."""
        lacks = self._ssd[row] - self._dram[row]
        if row in self._worth or (lacks > 0 and not self._in_use[row]):
            self._worth[row] = worth
            self.channel.promote(row, deadline_s, lacks)

    def is_promoting(self, row: int) -> bool:
        """Whether a promotion of the item is queued or running."""
        return row in self._worth

    def begin_read(self, row: int, now_s: float) -> int:
        lacks = self._ssd[row] - self._dram[row]
        worth = self._worth[row]
        if lacks <= 0:
            del self._worth[row]
            return 0
        self.hold(row)
        if not self._free_dram(lacks, worth, now_s):
            room = self.dram.capacity_bytes - self.dram.used_bytes
            lacks = 0 if self._whole else self._aligned(max(0, room))
            if not lacks:
                del self._worth[row]
                self.release(row)
                return 0
        self.dram.used_bytes += lacks
        self._arriving[row] = lacks
        if self._kept_free:
            self._free_dram(self._kept_free, worth, now_s)
        return lacks

    def end_read(self, row: int, size_bytes: int, now_s: float) -> None:
        del self._worth[row]
        self._arrive(row, size_bytes, size_bytes)
        self.release(row)

    def _arrive(self, row: int, come_bytes: int, reserved_bytes: int) -> None:
        self._arriving[row] = 0
        self.dram.used_bytes -= reserved_bytes - come_bytes
        have = self._dram[row]
        self._dram[row] = have + come_bytes
        self._promoted[row] += come_bytes
        if come_bytes and not have:
            self._entered_dram(row, self.channel.now_s)

    # Write-behind.

    def begin_write(self, row: int, now_s: float) -> int:
        self._to_write[row] = False
        lacks = self._dram[row] - self._ssd[row]
        if lacks <= 0 or (self._asks_ssd and not self.policy.wants_on_ssd(self.items, row, now_s)):
            return 0
        self.ssd.discard(row)  # The write must not evict the item's own bytes.
        lacks = self._free_ssd(lacks, now_s)
        self.ssd.used_bytes += lacks
        if not lacks:
            self._ssd_may_leave(row)
        return lacks

    def end_write(self, row: int, size_bytes: int, now_s: float) -> None:
        self._entered_ssd(row, size_bytes, now_s)
