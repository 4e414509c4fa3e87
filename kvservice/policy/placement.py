"""What a policy over an `ItemTable` is told besides, and asked: queue, hints, promotions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows, TierName
from kvservice.policy.base import Hint, Promotion
from kvservice.policy.items import ItemTable


class Placement:
    """The base of policies over items. What happens is told by the methods that do nothing here.

    The table already shows what a method tells of. A mover may skip a method that a policy did not override.
    """

    name: ClassVar[str]
    #: Whether a session leaves a tier whole, as in the paper, or only as much of its end as is needed.
    whole_items: ClassVar[bool] = False
    #: The share of DRAM that is free before a promotion begins. What is worth less than it leaves for that, before
    #: it begins and once it has taken its room.
    dram_kept_free: float = 0.0
    #: What has just come may be worth least of all, so victims are ranked anew whenever room is made.
    newcomers_may_leave: ClassVar[bool] = False
    #: The next time to ask for promotions; a method that is told something may bring it forward to `now_s`.
    look_at_s: float = math.inf

    def queued(self, items: ItemTable, row: int, now_s: float) -> None:
        """A request that continues the item has come and waits (`queue_seq` says where)."""

    def used(self, items: ItemTable, row: int, now_s: float) -> None:
        """A request's turn has come: the item's bytes are read now. `used_at_s` still tells of the use before."""

    def stored(self, items: ItemTable, row: int, now_s: float) -> None:
        """The request has ended; the item is in DRAM as far as it fits, and its user begins to think."""

    def hinted(self, items: ItemTable, row: int, hint: Hint, now_s: float) -> None:
        """The application said something about the item's session."""

    def arrived(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        """The first bytes of the item came into `tier`, which had none. Of one request's items the suffix is first.

        In DRAM, room for what a request stored is made after this: the item itself may be what leaves.
        """

    def left(self, items: ItemTable, row: int, tier: TierName, now_s: float) -> None:
        """Bytes of the item left `tier` to make room: its end, or all of it."""

    def forgotten(self, items: ItemTable, row: int, now_s: float) -> None:
        """No tier has a byte of it any more and no request waits for it."""

    def retention(self, items: ItemTable, rows: Rows, tier: TierName, now_s: float) -> NDArray[np.float64]:
        """See `Policy.retention`. Not called from another thread than the methods above."""
        raise NotImplementedError  # What leaves first is the policy itself: there is no order to inherit.

    def wants_in_dram(self, items: ItemTable, row: int, now_s: float) -> bool:
        return True

    def wants_on_ssd(self, items: ItemTable, row: int, now_s: float) -> bool:
        return True

    def promotions(self, items: ItemTable, queue: Sequence[int], now_s: float) -> Sequence[Promotion]:
        """What shall come from SSD to DRAM. Asked when `look_at_s` has come; sets the next one.

        `queue` has the rows of the requests that wait, in the order in which they will run; a request's row
        may be one without a byte anywhere. What was asked for and is on its way need not be asked for again;
        asking again with another deadline changes it.
        """
        self.look_at_s = math.inf
        return ()
