"""A model of the daemon's store with two tiers: it carries out the commands of the placement core.

Bytes that are evicted from DRAM before they were copied to SSD become a deferred write if SSD should have them: the
space is free at once, and the channel writes later. If the buffer of deferred writes is full, the bytes are lost.
Write-behind is the same for every policy: bytes that are in DRAM and not on SSD are copied while the channel has no
transfer of higher priority, unless the policy does not want the item on SSD.
"""

from __future__ import annotations

import math

import numpy as np

from kvservice.blocks import TierName
from kvservice.placement.core import PlacementCore
from kvservice.placement.views import bools, ints
from kvservice.policy.base import Promotion
from kvservice.simulate.settings import Machine
from kvservice.simulate.ssd_channel import SsdChannel

_DRAM, _SSD = TierName.DRAM, TierName.SSD


class StoreModel:
    """The transfers between both tiers. The replay calls it for requests, the channel for transfers."""

    def __init__(self, core: PlacementCore, machine: Machine, start_s: float = 0.0) -> None:
        items = core.items
        self.core = core
        self.channel = SsdChannel(machine.ssd_bytes_per_s, self, start_s)
        self.writes_dropped_bytes = 0
        self.has_ssd = machine.ssd_bytes > 0
        self._to_write = bools(np.zeros(items.row_count, np.bool_))
        self._size = ints(items.size_bytes)
        self._dram = ints(items.dram_bytes)
        self._ssd = ints(items.ssd_bytes)

    # Requests.

    def make_room(self, size_bytes: int, now_s: float) -> bool:
        """Evict items that are not held until `size_bytes` are free in DRAM. False if that is not enough."""
        return self._free_dram(size_bytes, math.inf, now_s)

    def evict_to_capacity(self, now_s: float) -> None:
        """Evict the items with the lowest scores until DRAM is within its capacity, and stop reads if need be.

        An item that was just stored may be evicted too.
        """
        dram = self.core.dram
        while dram.used_bytes > dram.capacity_bytes and not self._free_dram(0, math.inf, now_s):
            self.stop_read(self.core.read_to_stop())

    def write_behind(self, row: int) -> None:
        """Queue a copy of the bytes that SSD does not have."""
        if self.has_ssd and not self._to_write[row] and self._dram[row] > self._ssd[row]:
            self._to_write[row] = True
            self.channel.write(row)

    def store_on_ssd(self, row: int, size_bytes: int, now_s: float) -> None:
        """Set the item's size without space in DRAM. Bytes that SSD does not have are written to SSD, or lost."""
        self.core.resized(row, size_bytes)
        self._write_now(row, size_bytes, now_s)
        self.core.forget_if_gone(row, now_s)

    def cut_front(self, row: int, cut_bytes: int) -> None:
        """Remove the first `cut_bytes` of the item from both tiers. The rest becomes the item's new prefix."""
        if self.channel.write_row == row:
            self._end_write_early()
        self.core.cut_front(row, cut_bytes)

    def drop(self, row: int, now_s: float) -> None:
        """Remove the item from both tiers, because its session has ended."""
        if row in self.core.reading:
            self.stop_read(row)
        if self.channel.write_row == row:
            self._end_write_early()
        self.core.dropped(row, now_s)

    # Eviction.

    def _free_dram(self, wanted_bytes: int, worth: float, now_s: float) -> bool:
        """Evict items with a score below `worth` until `wanted_bytes` are free. False if that is not enough."""
        core, dram = self.core, self.core.dram
        if dram.used_bytes + wanted_bytes <= dram.capacity_bytes:
            return True
        for row, keep_bytes, _ in core.victims(_DRAM, wanted_bytes, worth, now_s):
            have = self._dram[row]
            if self.has_ssd:
                if self.channel.write_row == row:
                    self._end_write_early()
                if self._ssd[row] < have:
                    self._write_now(row, have, now_s)
            core.left(row, _DRAM, have - keep_bytes, now_s)
        return dram.used_bytes + wanted_bytes <= dram.capacity_bytes

    def _free_ssd(self, wanted_bytes: int, now_s: float) -> None:
        """Evict until `wanted_bytes` are free, or the rest of SSD is held."""
        core, ssd = self.core, self.core.ssd
        if ssd.used_bytes + wanted_bytes <= ssd.capacity_bytes:
            return
        if core.evicts_whole_items and wanted_bytes > ssd.capacity_bytes:
            return
        for row, keep_bytes, _ in core.victims(_SSD, wanted_bytes, math.inf, now_s):
            core.left(row, _SSD, self._ssd[row] - keep_bytes, now_s)

    # Reads.

    def read(self, promotion: Promotion) -> None:
        """Queue a read of the bytes that only SSD has, or change the deadline of a queued one."""
        row = promotion.row
        self.channel.promote(row, promotion.deadline_s, self._ssd[row] - self._dram[row])

    def stop_read(self, row: int) -> None:
        """Stop a read. The bytes that were read stay in DRAM."""
        core = self.core
        done, size = self.channel.cancel(row)
        if not size:
            core.read_cancelled(row)
            return
        come = core.aligned(done)
        core.entered(row, _DRAM, come, self.channel.now_s)
        core.read_ended(row, size - come)

    def begin_read(self, row: int, now_s: float) -> int:
        core = self.core
        lacks = core.read_began(row)
        if not lacks:
            return 0
        worth = core.reading[row].worth
        self._free_dram(lacks, worth, now_s)
        size = core.reserve(row, _DRAM, lacks)
        if not size:
            core.read_ended(row)
        elif core.kept_free_bytes:
            self._free_dram(core.kept_free_bytes, worth, now_s)
        return size

    def end_read(self, row: int, size_bytes: int, now_s: float) -> None:
        self.core.entered(row, _DRAM, size_bytes, now_s)
        self.core.read_ended(row)

    # Writes.

    def begin_write(self, row: int, now_s: float) -> int:
        core = self.core
        self._to_write[row] = False
        lacks = core.write_began(row, self._dram[row], now_s)
        if not lacks:
            return 0
        self._free_ssd(lacks, now_s)
        size = core.reserve(row, _SSD, lacks)
        if not size:
            core.write_ended(row)
        return size

    def end_write(self, row: int, size_bytes: int, now_s: float) -> None:
        self.core.entered(row, _SSD, size_bytes, now_s)
        self.core.write_ended(row)

    def _end_write_early(self) -> None:
        """Free the DRAM space of the running copy: defer its remaining bytes, or lose the whole copy."""
        channel = self.channel
        if channel.can_defer_running_write():
            channel.finish_write()
        else:
            row = channel.write_row
            self.core.write_ended(row, channel.abort_write())

    def _write_now(self, row: int, end_bytes: int, now_s: float) -> None:
        """Count the item's first `end_bytes` as on SSD, if SSD has space and the write can be deferred.

        Bytes that cannot be deferred are lost: write-behind was too late, because reads had the channel.
        """
        core = self.core
        lacks = core.write_began(row, end_bytes, now_s)
        if not lacks:
            return
        if self.channel.can_defer_write(lacks):
            self._free_ssd(lacks, now_s)
            size = core.reserve(row, _SSD, lacks)
            self.channel.defer_write(size)
            core.entered(row, _SSD, size, now_s)
        else:
            self.writes_dropped_bytes += lacks
        core.write_ended(row)
