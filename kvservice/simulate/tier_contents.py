"""The bytes of every item in each tier, and eviction. Neither tier exceeds its capacity once eviction has run.

A tier holds a prefix of an item. Bytes that are evicted from DRAM before they were copied to SSD become a deferred
write if the policy wants the item on SSD: the space is free at once, and the channel writes later. Otherwise, or if
the buffer of deferred writes is full, the bytes are lost.
"""

from __future__ import annotations

import numpy as np

from kvservice.blocks import TierName
from kvservice.policy.items import NOT_QUEUED, ItemTable
from kvservice.policy.placement import Placement
from kvservice.simulate.settings import Machine
from kvservice.simulate.ssd_channel import SsdChannel
from kvservice.simulate.tier_space import RowEpochs, TierSpace
from kvservice.simulate.views import bools, ints

#: An item without blocks (a session's) is evicted in steps of one of this many parts.
_CUTS = 64


def overrides(policy: Placement, method: str) -> bool:
    """Whether the policy's class defines `method` itself. The simulator skips calls of the empty defaults."""
    return getattr(type(policy), method) is not getattr(Placement, method)


class TierContents:
    """The bytes of every item in each tier, and the items that may be evicted: those that are not held."""

    channel: SsdChannel

    def __init__(self, items: ItemTable, machine: Machine, policy: Placement, block_bytes: int) -> None:
        self.items = items
        self.policy = policy
        self._block_bytes = block_bytes  # 0 for sessions.
        self._whole = policy.whole_items and not block_bytes
        self.row_epochs = RowEpochs(items.row_count)
        self.changed_epoch = self.row_epochs.last
        self.dram = TierSpace(TierName.DRAM, machine.dram_bytes, items, policy, self.row_epochs)
        self.ssd = TierSpace(TierName.SSD, machine.ssd_bytes, items, policy, self.row_epochs)
        self._size = ints(items.size_bytes)
        self._dram = ints(items.dram_bytes)
        self._ssd = ints(items.ssd_bytes)
        self._arriving = ints(items.coming_bytes)
        self._in_use = ints(items.in_use)
        self._queue_seq = ints(items.queue_seq)
        self._dram_seq = ints(items.dram_seq)
        self._ssd_seq = ints(items.ssd_seq)
        self._unwanted = bools(items.unwanted_on_ssd)
        self._live = bools(items.live)
        self._held = ints(np.zeros(items.row_count, np.int32))  # Running requests and promotions per item.
        self._promoted = ints(np.zeros(items.row_count, np.int64))  # Promoted bytes in DRAM that no request has used.
        self._arrivals = 0
        self.promoted_unused_bytes = 0
        self.writes_dropped_bytes = 0
        self._tells_arrived = overrides(policy, "arrived")
        self._tells_left = overrides(policy, "left")
        self._tells_forgotten = overrides(policy, "forgotten")
        self._asks_ssd = overrides(policy, "wants_on_ssd")

    def hold(self, row: int) -> None:
        """Keep the item's bytes in both tiers until `release`. Holds are counted."""
        held = self._held[row]
        self._held[row] = held + 1
        if not held:
            self.dram.discard(row)
            self.ssd.discard(row)

    def release(self, row: int) -> None:
        """Undo one `hold`."""
        held = self._held[row] - 1
        self._held[row] = held
        if not held:
            if self._dram[row]:
                self.dram.add(row)
            self._ssd_may_leave(row)

    # Eviction.

    def _free_dram(self, wanted_bytes: int, worth: float, now_s: float) -> bool:
        """Evict items with a score below `worth` until `wanted_bytes` are free. False if that is not enough."""
        dram = self.dram
        excess = dram.used_bytes + wanted_bytes - dram.capacity_bytes
        if excess <= 0:
            return True
        dram.begin_eviction()
        while excess > 0:
            row = dram.next_victim(now_s)
            if row < 0:
                return False
            if dram.retention >= worth:
                dram.put_back(row)
                return False
            have = self._dram[row]
            keep = self._keep(have, excess, self._size[row])
            self._leave_dram(row, keep, now_s)
            if keep:
                dram.put_back(row)
            excess -= have - keep
        return True

    def _free_ssd(self, wanted_bytes: int, now_s: float) -> int:
        """Evict until `wanted_bytes` are free. Returns the bytes that are free: fewer if the rest of SSD is held."""
        ssd = self.ssd
        excess = ssd.used_bytes + wanted_bytes - ssd.capacity_bytes
        if excess <= 0:
            return wanted_bytes
        if self._whole and wanted_bytes > ssd.capacity_bytes:
            return 0
        ssd.begin_eviction()
        while excess > 0:
            row = ssd.next_victim(now_s)
            if row < 0:
                room = ssd.capacity_bytes - ssd.used_bytes
                return 0 if self._whole else self._aligned(room)
            have = self._ssd[row]
            keep = self._keep(have, excess, self._size[row])
            self._ssd[row] = keep
            ssd.used_bytes -= have - keep
            self._unwanted[row] = True
            if keep:
                ssd.put_back(row)
            else:
                ssd.discard(row)
            excess -= have - keep
            if self._tells_left:
                self.policy.left(self.items, row, TierName.SSD, now_s)
            self._forget_if_gone(row, now_s)
        return wanted_bytes

    def _leave_dram(self, row: int, keep_bytes: int, now_s: float) -> None:
        have = self._dram[row]
        if self.channel.write_row == row:
            self._end_write_early()
        if self._ssd[row] < have:
            self._write_now(row, have, now_s)
        self._dram[row] = keep_bytes
        self.dram.used_bytes -= have - keep_bytes
        promoted = self._promoted[row]
        if promoted:
            unused = min(promoted, have - keep_bytes)
            self._promoted[row] = promoted - unused
            self.promoted_unused_bytes += unused
        if not keep_bytes:
            self.dram.discard(row)
        if self._tells_left:
            self.policy.left(self.items, row, TierName.DRAM, now_s)
        self._forget_if_gone(row, now_s)

    def _keep(self, have_bytes: int, excess_bytes: int, size_bytes: int) -> int:
        if self._whole or excess_bytes >= have_bytes:
            return 0
        grain = self._block_bytes or max(1, size_bytes // _CUTS)
        return (have_bytes - excess_bytes) // grain * grain

    def _aligned(self, size_bytes: int) -> int:
        return size_bytes // self._block_bytes * self._block_bytes if self._block_bytes else size_bytes

    # Bookkeeping.

    def _entered_dram(self, row: int, now_s: float) -> None:
        self._arrivals += 1
        self._dram_seq[row] = self._arrivals
        if not self._held[row]:
            self.dram.add(row)
        if self._tells_arrived:
            self.policy.arrived(self.items, row, TierName.DRAM, now_s)

    def _entered_ssd(self, row: int, size_bytes: int, now_s: float) -> None:
        have = self._ssd[row]
        self._ssd[row] = have + size_bytes
        self._ssd_may_leave(row)
        if not have:
            self._arrivals += 1
            self._ssd_seq[row] = self._arrivals
            if self._tells_arrived:
                self.policy.arrived(self.items, row, TierName.SSD, now_s)

    def _ssd_may_leave(self, row: int) -> None:
        if self._ssd[row] and not self._held[row] and self.channel.write_row != row:
            self.ssd.add(row)

    def _forget_if_gone(self, row: int, now_s: float) -> None:
        if self._dram[row] or self._ssd[row] or self._arriving[row] or self._in_use[row]:
            return
        if self._queue_seq[row] != NOT_QUEUED or not self._live[row]:
            return
        self._live[row] = False
        if self._tells_forgotten:
            self.policy.forgotten(self.items, row, now_s)

    def _end_write_early(self) -> None:
        """Free the DRAM space of the running copy: defer its remaining bytes, or lose the whole copy."""
        channel = self.channel
        if channel.can_defer_running_write():
            channel.finish_write()
        else:
            row = channel.write_row
            self.ssd.used_bytes -= channel.abort_write()
            self._ssd_may_leave(row)

    def _write_now(self, row: int, end_bytes: int, now_s: float) -> None:
        """Count the item's first `end_bytes` as on SSD, if SSD has space and the write can be deferred.

        Bytes that cannot be deferred are lost: write-behind was too late, because reads had the channel.
        """
        lacks = end_bytes - self._ssd[row]
        if lacks <= 0 or not self.ssd.capacity_bytes:
            return
        if self._asks_ssd and not self.policy.wants_on_ssd(self.items, row, now_s):
            return
        self.ssd.discard(row)  # The write must not evict the item's own bytes.
        if self.channel.can_defer_write(lacks):
            lacks = self._free_ssd(lacks, now_s)
            self.channel.defer_write(lacks)
            self.ssd.used_bytes += lacks
            if lacks:
                self._entered_ssd(row, lacks, now_s)
        else:
            self.writes_dropped_bytes += lacks
        self._ssd_may_leave(row)
