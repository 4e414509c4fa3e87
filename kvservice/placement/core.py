"""The placement core: events of items come in, commands go out. The daemon and the simulator carry the commands out.

Pure: no I/O and no clock; the caller passes the time. All calls come from one thread. A tier holds a prefix of each
item, and gives up its end first. The core counts every item's bytes in DRAM and on SSD, calls the policy, and decides
who leaves a tier (`victims`), what is read ahead (`reads`), and what is written to SSD (`write_began`). It moves no
bytes: the caller does, and reports what it did (`reserve`, `entered`, `left`).

    a request    queued, hold, used, answered, saved, release, stored
    a read       reads, read_began, victims, reserve, entered, read_ended; or read_cancelled before it began
    a write      write_began, victims, reserve, entered, write_ended
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvservice.blocks import TierName
from kvservice.placement.item_state import ItemState
from kvservice.policy.base import Promotion
from kvservice.policy.items import ItemTable
from kvservice.policy.placement import Placement, overrides

NO_ITEM = -1
_DRAM = TierName.DRAM
#: An item without blocks of one size is evicted in steps of one of this many parts.
_CUTS = 64

#: A command to evict: (item, the bytes of its front that stay, its score). A plain tuple, because there are many.
Evict = tuple[int, int, float]


class PlacementCore(ItemState):
    """The items of a table, and what to do with their bytes."""

    def __init__(
        self, items: ItemTable, policy: Placement, block_bytes: int = 0, *, names_victims: bool = True
    ) -> None:
        """`block_bytes`: the size of a block, if items are cut between blocks of one size; else 0.

        Without `names_victims`, `victims` must not be called.
        """
        super().__init__(items, policy, names_victims)
        self._block_bytes = block_bytes
        self.evicts_whole_items = policy.whole_items and not block_bytes
        #: How much of DRAM to free beyond the space of a read that has begun.
        self.kept_free_bytes = int(policy.dram_kept_free * items.conditions.dram_capacity_bytes)
        self.reading: dict[int, Promotion] = {}  # By item: the reads that are asked for or running.
        self._asks_dram = overrides(policy, "wants_in_dram")
        self._asks_ssd = overrides(policy, "wants_on_ssd")

    # Eviction

    def aligned(self, size_bytes: int) -> int:
        """The size of the whole blocks within it."""
        return size_bytes // self._block_bytes * self._block_bytes if self._block_bytes else size_bytes

    def victims(self, tier: TierName, wanted_bytes: int, worth: float, now_s: float) -> Iterator[Evict]:
        """What to evict so that `wanted_bytes` are free: the lowest scores first, and only scores below `worth`.

        The caller carries out one command before it takes the next: it reports that the bytes `left`. A victim that
        has not left is passed over.
        """
        space, bytes_of = (self.dram, self._dram) if tier is _DRAM else (self.ssd, self._ssd)
        excess = space.used_bytes + wanted_bytes - space.capacity_bytes
        if excess <= 0:
            return
        space.begin_eviction()
        passed_over = []
        try:
            while excess > 0:
                item = space.next_victim(now_s)
                if item < 0:
                    return
                score = space.retention
                if score >= worth:
                    space.put_back(item, score)
                    return
                have = bytes_of[item]
                keep = 0 if self.evicts_whole_items or excess >= have else self._keep(item, have - excess)
                yield item, keep, score
                if bytes_of[item] == have:
                    passed_over.append(item)
                    space.discard(item)
                elif bytes_of[item]:
                    space.put_back(item, score)
                excess = space.used_bytes + wanted_bytes - space.capacity_bytes
        finally:
            for item in passed_over:
                self._may_leave(item)

    def _keep(self, item: int, most_bytes: int) -> int:
        grain = self._block_bytes or max(1, self._size[item] // _CUTS)
        return most_bytes // grain * grain

    def reserve(self, item: int, tier: TierName, wanted_bytes: int) -> int:
        """Take free space for a read or a write that has begun. Returns its size: whole blocks of what is wanted.

        `entered`, `read_ended` and `write_ended` use it up. Less than wanted for an item that leaves whole is 0.
        """
        space = self.dram if tier is _DRAM else self.ssd
        free = space.capacity_bytes - space.used_bytes
        if free < wanted_bytes:
            wanted_bytes = 0 if self.evicts_whole_items else self.aligned(max(0, free))
        if tier is _DRAM:
            self._coming[item] += wanted_bytes
        else:
            self._write_bytes[item] = self._write_bytes.get(item, 0) + wanted_bytes
        space.used_bytes += wanted_bytes
        return wanted_bytes

    # Reads

    def reads(self, queue: Sequence[int], now_s: float) -> list[Promotion]:
        """The reads that the policy wants now and has not asked for, and those with another deadline than before.

        `queue` has the items of the waiting requests, in the order in which they will run. What SSD has more of than
        DRAM is to be read, the earliest deadline first.
        """
        commands = []
        for promotion in self.policy.promotions(self.items, queue, now_s):
            item = promotion.row
            asked = self.reading.get(item)
            if asked is None and (self._ssd[item] <= self._dram[item] or self._in_use[item]):
                continue
            self.reading[item] = promotion
            if asked is None or asked.deadline_s != promotion.deadline_s:
                commands.append(promotion)
        return commands

    def read_began(self, item: int) -> int:
        """The read's turn has come. Returns the bytes to read; 0 if none are left, and the read is over.

        Else the item is held until `read_ended`. Make space next: evict what scores below the worth in `reading`.
        """
        lacks = self._ssd[item] - self._dram[item]
        if lacks <= 0:
            del self.reading[item]
            return 0
        self.hold(item)
        return lacks

    def read_ended(self, item: int, unread_bytes: int = 0) -> None:
        """The read is over. `unread_bytes` of its space were not used; what has come stays."""
        del self.reading[item]
        self._coming[item] -= unread_bytes
        self.dram.used_bytes -= unread_bytes
        self.release(item)

    def read_cancelled(self, item: int) -> None:
        """The read will not begin."""
        del self.reading[item]

    def read_to_stop(self) -> int:
        """Of the reads that have space in DRAM, the one with the latest deadline; NO_ITEM if there is none."""
        begun = [(read.deadline_s, item) for item, read in self.reading.items() if self._coming[item]]
        return max(begun)[1] if begun else NO_ITEM

    def wants_in_dram(self, item: int, now_s: float) -> bool:
        """Whether what a request reads from SSD gets space in DRAM."""
        return not self._asks_dram or self.policy.wants_in_dram(self.items, item, now_s)

    # Writes

    def wants_on_ssd(self, item: int, now_s: float) -> bool:
        """Whether what DRAM has of the item is copied to SSD."""
        return not self._asks_ssd or self.policy.wants_on_ssd(self.items, item, now_s)

    def write_began(self, item: int, end_bytes: int, now_s: float) -> int:
        """How many of the item's first `end_bytes` to write: those that SSD lacks, if it should have them.

        Unless it is 0, SSD keeps what it has of the item until `write_ended`: a write must not evict its own item.
        """
        have = self._ssd[item]
        lacks = end_bytes - have
        if lacks <= 0 or not self.ssd.capacity_bytes:
            return 0
        if not self.wants_on_ssd(item, now_s):
            return 0
        self._writes[item] = self._writes.get(item, 0) + 1
        if have:
            self.ssd.discard(item)
        return lacks

    def write_ended(self, item: int, unwritten_bytes: int = 0) -> None:
        """A write is over. `unwritten_bytes` of its space were not used."""
        running = self._writes.pop(item, 0) - 1
        if running > 0:
            self._writes[item] = running
        if unwritten_bytes:
            self._write_bytes[item] = self._write_bytes.get(item, 0) - unwritten_bytes
            self.ssd.used_bytes -= unwritten_bytes
        if self._ssd[item] and item not in self._holds and item not in self._writes:
            self.ssd.add(item)
