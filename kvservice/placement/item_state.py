"""What is known of all items: the events that change their table, reported to the policy."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kvservice.blocks import TierName
from kvservice.placement.tier_space import CountedSpace, RowEpochs, TierSpace
from kvservice.policy.base import Hint
from kvservice.policy.items import HINTS, NOT_QUEUED, ItemTable
from kvservice.policy.placement import Placement, overrides

_DRAM, _SSD = TierName.DRAM, TierName.SSD
_HINT_NUMBERS = {hint: HINTS.index(hint) for hint in Hint}


class ItemPart(NamedTuple):
    """What belongs to the front of an item that is split."""

    size_bytes: int
    dram_bytes: int
    ssd_bytes: int
    coming_bytes: int
    value: float


class ItemState:
    """The state of all items of a table, for one policy. The capacities are those of the table's conditions."""

    def __init__(self, items: ItemTable, policy: Placement, names_victims: bool = True) -> None:
        """Without `names_victims`, it does not say what to evict, and takes less memory per item."""
        conditions = items.conditions
        self.items = items
        self.policy = policy
        self._epochs = RowEpochs(items.row_count)
        self.dram, self.ssd = (
            TierSpace(tier, capacity_bytes, items, policy, self._epochs)
            if names_victims
            else CountedSpace(tier, capacity_bytes, items, policy)
            for tier, capacity_bytes in ((_DRAM, conditions.dram_capacity_bytes), (_SSD, conditions.ssd_capacity_bytes))
        )
        self.read_unused_bytes = 0  # Read ahead, and evicted from DRAM before a request used them.
        # By item, and only where it is not 0: few items have any of these.
        self._holds: dict[int, int] = {}  # Running requests and reads.
        self._writes: dict[int, int] = {}  # Writes to SSD that have begun.
        self._write_bytes: dict[int, int] = {}  # Space on SSD that they have reserved.
        self._unused: dict[int, int] = {}  # Bytes that were read ahead, and not used yet.
        self._later: dict[int, deque[int]] = {}  # By item: the queued requests for it after the first.
        self._accesses = 0
        self._arrivals = 0
        self._tells_queued = overrides(policy, "queued")
        self._tells_used = overrides(policy, "used")
        self._tells_stored = overrides(policy, "stored")
        self._tells_hinted = overrides(policy, "hinted")
        self._tells_arrived = overrides(policy, "arrived")
        self._tells_left = overrides(policy, "left")
        self._tells_forgotten = overrides(policy, "forgotten")
        self._view()

    def _view(self) -> None:
        at, by_arrival = self.items.at, self.policy.ranks_by_arrival
        self._dram_seq = self.items.dram_seq.data if by_arrival else None
        self._ssd_seq = self.items.ssd_seq.data if by_arrival else None
        self._changed = self._epochs.last
        self._size, self._coming, self._dram, self._ssd = at.size_bytes, at.coming_bytes, at.dram_bytes, at.ssd_bytes
        self._in_use, self._uses, self._access_seq, self._live = at.in_use, at.uses, at.access_seq, at.live
        self._unwanted, self._used_at, self._answer = at.unwanted_on_ssd, at.used_at_s, at.answer_tokens
        self._queue_seq, self._hint, self._hinted_at, self._ended = at.queue_seq, at.hint, at.hinted_at_s, at.ended

    # The table

    def grow(self, item_count: int) -> None:
        """Make space for so many items. The table's arrays are replaced."""
        self.items.grow(item_count)
        self._epochs.grow(item_count)
        self.dram.grow(item_count)
        self.ssd.grow(item_count)
        self._view()
        self.policy.grow(item_count)

    def created(self, item: int) -> None:
        """A request has begun to store an item, in a row that is new or whose last item was forgotten."""
        self.items.reset(item)
        for known in (self._holds, self._writes, self._write_bytes, self._unused):
            known.pop(item, None)
        self._live[item] = True
        self._uses[item] = 1
        self._accesses += 1
        self._access_seq[item] = self._accesses
        self._changed[item] = self._epochs.epoch

    def split(self, item: int, front: int, part: ItemPart, now_s: float) -> None:
        """The item's front is an item of its own now, in a new row. It begins as the whole one is, with its holds.

        A read and the writes of the item go on as those of its back.
        """
        items = self.items
        items.copy(item, front)
        for column, of_front in (
            (self._size, part.size_bytes),
            (self._dram, part.dram_bytes),
            (self._ssd, part.ssd_bytes),
            (self._coming, part.coming_bytes),
        ):
            column[front] = of_front
            column[item] -= of_front
        items.value[front] = part.value
        items.value[item] -= part.value
        later = self._later.get(item)
        if later is not None:
            self._later[front] = deque(later)
        if item in self._holds:
            self._holds[front] = self._holds[item]
        unused = self._unused.pop(item, 0)
        if unused:  # What was read ahead is at the item's end.
            self._unused[item] = min(unused, self._dram[item])
            self._unused[front] = unused - self._unused[item]
        for each in (item, front):
            self._changed[each] = self._epochs.epoch
            self.dram.discard(each)
            self.ssd.discard(each)
            self._may_leave(each)
        self.policy.split(items, item, front, now_s)

    # Requests

    def queued(self, path: Sequence[int], number: int, now_s: float) -> None:
        """A request joined the queue, as the `number`th of all. It reads the items of `path`, in this order."""
        queue_seq, live, changed, epoch = self._queue_seq, self._live, self._changed, self._epochs.epoch
        for item in path:
            if queue_seq[item] == NOT_QUEUED:
                queue_seq[item] = number
            else:
                self._later.setdefault(item, deque()).append(number)
            live[item] = True
            changed[item] = epoch
            if self._tells_queued:
                self.policy.queued(self.items, item, now_s)

    def unqueued(self, path: Sequence[int], number: int, now_s: float) -> None:
        """The request left the queue, and will not run."""
        for item in path:
            self._leave_queue(item, number)
            self._changed[item] = self._epochs.epoch
            self.forget_if_gone(item, now_s)

    def used(self, path: Sequence[int], number: int, now_s: float) -> None:
        """The queue's request `number` runs, and reads the items of `path`. It holds them until its answer ends.

        Reads of the items have been stopped: the request reads by itself. `number` is NOT_QUEUED for a request that
        did not wait.
        """
        access = self._accesses = self._accesses + len(path)  # A prefix is later than its suffix.
        queue_seq, changed, epoch, later = self._queue_seq, self._changed, self._epochs.epoch, self._later
        in_use, uses, access_seq, tells = self._in_use, self._uses, self._access_seq, self._tells_used
        unwanted, unused, hint, ended = self._unwanted, self._unused, self._hint, self._ended
        for item in path:
            changed[item] = epoch
            in_use[item] += 1
            uses[item] += 1
            access_seq[item] = access
            access -= 1
            unwanted[item] = False
            if unused:
                unused.pop(item, None)
            if tells:
                self.policy.used(self.items, item, now_s)
            if number == queue_seq[item] and item not in later:
                queue_seq[item] = NOT_QUEUED
            else:
                self._leave_queue(item, number)
            hint[item] = 0
            ended[item] = False

    def answered(self, item: int, answer_tokens: int, now_s: float) -> None:
        """A request of the item has ended. What it stored enters next, the end of its path first."""
        self._in_use[item] -= 1
        self._changed[item] = self._epochs.epoch
        self._answer[item] = answer_tokens
        self._used_at[item] = now_s

    def stored(self, path: Sequence[int], now_s: float) -> None:
        """All that the request stored has entered, and the request holds the items no more.

        Evict to capacity next: items of the path may leave, too.
        """
        if self._tells_stored:
            for item in path:
                self.policy.stored(self.items, item, now_s)

    def hinted(self, item: int, hint: Hint, now_s: float, kind: int = 0) -> None:
        """The application sent a hint about the item's session; `kind` as in `hint_kind`. After its next request it is
        too late.
        """
        if self._queue_seq[item] != NOT_QUEUED or self._in_use[item]:
            return
        self._hint[item] = _HINT_NUMBERS[hint]
        self._hinted_at[item] = now_s
        self._ended[item] = hint is Hint.ENDED
        self._changed[item] = self._epochs.epoch
        if self._tells_hinted:
            self.policy.hinted(self.items, item, hint, now_s, kind)

    def is_idle_since(self, item: int, at_s: float) -> bool:
        """Whether no request waits for the item or uses it, and none has used it after `at_s`."""
        return self._used_at[item] <= at_s and self._queue_seq[item] == NOT_QUEUED and not self._in_use[item]

    def _leave_queue(self, item: int, number: int) -> None:
        later = self._later.get(item)
        if number == self._queue_seq[item]:
            self._queue_seq[item] = later.popleft() if later else NOT_QUEUED
        elif later and number in later:
            later.remove(number)
        if later is not None and not later:
            del self._later[item]

    # Holds

    def hold(self, *items: int) -> None:
        """Keep the items' bytes in both tiers until `release`. Holds are counted."""
        holds, in_dram, on_ssd = self._holds, self._dram, self._ssd
        for item in items:
            if item in holds:
                holds[item] += 1
                continue
            holds[item] = 1
            if in_dram[item]:
                self.dram.discard(item)
            if on_ssd[item]:
                self.ssd.discard(item)

    def release(self, *items: int) -> None:
        """Undo one `hold` of each."""
        holds, in_dram, on_ssd, writes = self._holds, self._dram, self._ssd, self._writes
        for item in items:
            if holds[item] > 1:
                holds[item] -= 1
                continue
            del holds[item]
            if in_dram[item]:  # As `_may_leave`, without a call.
                self.dram.add(item)
            if on_ssd[item] and item not in writes:
                self.ssd.add(item)

    def _may_leave(self, item: int) -> None:
        """Let the tiers evict what they have of the item, unless it is held."""
        if item in self._holds:
            return
        if self._dram[item]:
            self.dram.add(item)
        if self._ssd[item] and item not in self._writes:
            self.ssd.add(item)

    # Bytes

    def resized(self, item: int, size_bytes: int) -> None:
        """The size of the whole item."""
        self._size[item] = size_bytes

    def saved(self, item: int, size_bytes: int, now_s: float) -> None:
        """The item has this size now, and all of it is in DRAM. No read of it runs."""
        have = self._dram[item]
        self._size[item] = self._dram[item] = size_bytes
        self.dram.used_bytes += size_bytes - have
        if not have and size_bytes:
            self._arrived_in_dram(item, now_s)

    def _arrived_in_dram(self, item: int, now_s: float) -> None:
        if self._dram_seq is not None:
            self._arrivals += 1
            self._dram_seq[item] = self._arrivals
        if item not in self._holds:
            self.dram.add(item)
        if self._tells_arrived:
            self.policy.arrived(self.items, item, _DRAM, now_s)

    def entered(self, item: int, tier: TierName, size_bytes: int, now_s: float) -> None:
        """`size_bytes` more of the item are in `tier`, in the space that a read or a write has reserved, if any."""
        if tier is _DRAM:
            have = self._dram[item]
            self._dram[item] = have + size_bytes
            coming = self._coming[item]
            if coming:
                used = min(coming, size_bytes)
                self._coming[item] = coming - used
                self._unused[item] = self._unused.get(item, 0) + used
                self.dram.used_bytes += size_bytes - used
            else:
                self.dram.used_bytes += size_bytes
            if not have and size_bytes:
                self._arrived_in_dram(item, now_s)
            return
        have = self._ssd[item]
        self._ssd[item] = have + size_bytes
        reserved = self._write_bytes.pop(item, 0)
        if reserved > size_bytes:
            self._write_bytes[item] = reserved - size_bytes
        else:
            self.ssd.used_bytes += size_bytes - reserved
        if not have and size_bytes:
            if self._ssd_seq is not None:
                self._arrivals += 1
                self._ssd_seq[item] = self._arrivals
            if item not in self._writes:
                self._may_leave(item)
            if self._tells_arrived:
                self.policy.arrived(self.items, item, _SSD, now_s)

    def left(self, item: int, tier: TierName, size_bytes: int, now_s: float, *, was_evicted: bool = True) -> None:
        """`tier` has evicted the item's last `size_bytes`; or else they were discarded, and that says nothing of it."""
        if tier is _DRAM:
            self._dram[item] = keeps = self._dram[item] - size_bytes
            space = self.dram
            unused = self._unused.pop(item, 0) if self._unused else 0
            if unused:
                lost = min(unused, size_bytes)
                if unused > lost:
                    self._unused[item] = unused - lost
                self.read_unused_bytes += lost
        else:
            self._ssd[item] = keeps = self._ssd[item] - size_bytes
            space = self.ssd
            if was_evicted:
                self._unwanted[item] = True
        space.used_bytes -= size_bytes
        if not keeps:
            space.discard(item)
        if was_evicted and self._tells_left:
            self.policy.left(self.items, item, tier, now_s)
        if not (self._dram[item] or self._ssd[item]):
            self.forget_if_gone(item, now_s)

    def cut_front(self, item: int, cut_bytes: int) -> None:
        """The item's first `cut_bytes` are gone from both tiers. The rest is the item's new prefix."""
        for space, column in ((self.dram, self._dram), (self.ssd, self._ssd)):
            have = column[item]
            column[item] = keeps = max(0, have - cut_bytes)
            space.used_bytes -= have - keeps
            if not keeps:
                space.discard(item)
        self._size[item] = max(0, self._size[item] - cut_bytes)

    def dropped(self, item: int, now_s: float) -> None:
        """The item is gone from both tiers, without an eviction: its session has ended."""
        self.cut_front(item, self._size[item])
        self.forget_if_gone(item, now_s)

    def forget_if_gone(self, item: int, now_s: float) -> None:
        """Forget the item if no tier has or gets a byte of it, and no request waits for it or uses it."""
        if self._dram[item] or self._ssd[item] or self._coming[item] or self._in_use[item]:
            return
        if self._queue_seq[item] != NOT_QUEUED or not self._live[item]:
            return
        self._live[item] = False
        if self._tells_forgotten:
            self.policy.forgotten(self.items, item, now_s)
