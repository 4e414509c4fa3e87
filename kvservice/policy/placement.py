"""The base class of policies over an `ItemTable`: events of the queue, hints, and promotions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.items import NOT_QUEUED, ItemTable


class Placement:
    """Base class of policies over items. The event methods do nothing here.

    The table is up to date before an event method is called. A store may skip a method that a policy does not override.
    """

    name: ClassVar[str]
    #: Whether a session is evicted whole, as in the paper. False: only as much of its end as is needed.
    whole_items: ClassVar[bool] = False
    #: The share of DRAM to keep free, so that a promotion need not wait for space. Items with a score below a
    #: promotion's are evicted for it, before the promotion starts and once it has reserved its space.
    dram_kept_free: float = 0.0
    #: Whether a new item may have the lowest score. If so, each eviction ranks all items again.
    newcomers_may_leave: ClassVar[bool] = False
    #: Whether the table keeps the order in which items entered the tiers: its `dram_seq` and `ssd_seq`.
    ranks_by_arrival: ClassVar[bool] = False
    #: When to call `promotions` next. An event method may set it to `now_s`.
    look_at_s: float = math.inf

    def grow(self, row_count: int) -> None:
        """The table has grown to so many rows."""

    def split(self, items: ItemTable, row: int, front_row: int, now_s: float) -> None:
        """The item was split: `front_row` has its front now. Both begin with what was known of the whole item."""

    def queued(self, items: ItemTable, row: int, now_s: float) -> None:
        """A request for the item joined the queue, at `queue_seq`."""

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        """A request for the item is dispatched and reads it now. `used_at_s` still has the previous use."""

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        """The request has ended. The item is in DRAM as far as it fits, and the user's think time starts."""

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float, kind: int = 0) -> None:
        """The application sent a hint about the item's session. `kind`: see `hint_kind`."""

    def arrived(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        """The first bytes of the item entered `tier`. For the items of one request, the suffix is reported first.

        In DRAM, the eviction for a stored request follows this call and may evict the item itself.
        """

    def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        """`tier` evicted the item's end, or the whole item."""

    def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
        """No tier has a byte of the item, and no request waits for it."""

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        """See `Policy.retention`. Called from the same thread as the methods above."""
        raise NotImplementedError  # Every policy has its own order.

    def next_to_leave(self, items: ItemTable, tier: TierName, may_leave: memoryview[int], begins: bool) -> int:
        """The row with the lowest `retention` in `tier` of those with `may_leave[row] >= 0`; NO_ROW if there is none.

        Only for policies that keep their order, where it takes less time than to score all rows. A store prefers it.
        If not `begins`, all that changed since the last call for the tier is that rows have `left`.
        """
        raise NotImplementedError  # Others are asked for scores.

    def wants_in_dram(self, items: ItemTable, row: int, now_s: float) -> bool:
        return True

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        return True

    def state(self) -> bytes:
        """What the policy has learned of all items together, for `restore` after a restart. Empty if nothing."""
        return b""

    def restore(self, state: bytes) -> bool:
        """Begin with what an earlier run had learned. Call it before the first event.

        False, and nothing changes, if the bytes are not from `state` of this policy and version. The caller checks that
        they are complete.
        """
        return False

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        """The promotions from SSD to DRAM that the policy wants. Called at `look_at_s`; must set the next one.

        `queue` has the rows of the waiting requests in the order in which they will run. A row may have no bytes in any
        tier. A promotion that is queued or running need not be returned again; returning it with another deadline
        changes the deadline.
        """
        self.look_at_s = math.inf
        return ()

    def explain(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> Mapping[str, float]:
        """What the item's score in `tier` depends on, by name, for people. Units are in the names."""
        return inputs_of(items, row, now_s)


def overrides(policy: Placement, method: str) -> bool:
    """Whether the policy's class defines `method` itself. Calls of the empty defaults are skipped."""
    return getattr(type(policy), method) is not getattr(Placement, method)


def inputs_of(items: ItemTable, row: int, now_s: float) -> dict[str, float]:
    """What is known of an item under every policy. What is not known of it is absent."""
    found = {
        "size_bytes": float(items.size_bytes[row]),
        "dram_bytes": float(items.dram_bytes[row]),
        "ssd_bytes": float(items.ssd_bytes[row]),
        "uses": float(items.uses[row]),
        "in_use": float(items.in_use[row] > 0),
    }
    if not math.isnan(items.used_at_s[row]):
        found["idle_s"] = now_s - float(items.used_at_s[row])
    if items.queue_seq[row] != NOT_QUEUED:
        found["requests_before_it"] = float(max(0, items.queue_seq[row] - items.conditions.served))
    if items.hint[row]:
        found["hinted_s_ago"] = now_s - float(items.hinted_at_s[row])
    return found
