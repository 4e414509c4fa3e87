"""Pages of stored blocks, sessions, layouts and clients, and the facts of one block."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockTable, TierName
from kvservice.clock import Clock
from kvservice.index.session_records import Manifest
from kvservice.store.caller import Caller
from kvservice.store.leases import Client
from kvservice.store.sessions.sessions import Sessions
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Layout, Shard

T = TypeVar("T")

_PAGE_SIZE, _PAGE_SIZE_MAX = 100, 1000
_ROWS_A_TURN = 64  # Time on the event loop.
_ROWS_A_SCAN = 65_536  # Less than a millisecond of the event loop.
_WORD_DIGITS = 16  # Hexadecimal digits of 8 bytes.


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """One stored object. Times are wall-clock milliseconds; `pinned_until_ms` is 0 without a pin."""

    key: bytes
    parent_key: bytes
    layout: Layout
    shard: Shard
    token_count: int
    size_bytes: int
    tiers: Sequence[TierName]  # That hold it, the fastest first.
    stored_at_ms: int
    used_at_ms: int
    hits: int
    leases: int
    holds: int
    pinned_until_ms: int


@dataclass(frozen=True, slots=True)
class LayoutFacts:
    """A layout, and the stored objects of it."""

    layout: Layout
    blocks: int
    size_bytes: int


def block_facts(blocks: BlockTable, layouts: Mapping[int, Layout], row: int, now_ms: int) -> BlockFacts:
    pinned_until_ms = int(blocks.pinned_until_ms[row])
    return BlockFacts(
        key=blocks.key_of(row),
        parent_key=blocks.parent_key[row].tobytes(),
        layout=layouts[int(blocks.layout_id[row])],
        shard=blocks.shard_of(row),
        token_count=int(blocks.token_count[row]),
        size_bytes=int(blocks.size_bytes[row]),
        tiers=blocks.tiers_of(row),
        stored_at_ms=int(blocks.stored_at_ms[row]),
        used_at_ms=int(blocks.used_at_ms[row]),
        hits=int(blocks.hits[row]),
        leases=int(blocks.leases[row]),
        holds=int(blocks.holds[row]),
        pinned_until_ms=pinned_until_ms if pinned_until_ms > now_ms else 0,
    )


class Listings:
    """Lists in pages. A page token is valid for one run of the daemon, as rows and serial numbers are."""

    def __init__(
        self, blocks: BlockTable, layouts: Mapping[int, Layout], sessions: Sessions, clock: Clock, boot_epoch: int
    ) -> None:
        self._blocks = blocks
        self._layouts = layouts
        self._sessions = sessions
        self._clock = clock
        self._boot_epoch = boot_epoch

    async def blocks(
        self,
        caller: Caller,
        page_token: str,
        page_size: int,
        *,
        layout_id: int | None,
        tiers: Sequence[TierName],
        key_prefix: str = "",
    ) -> tuple[list[BlockFacts], str]:
        """A page of stored objects, with a copy in each of `tiers`, and the next page's token; empty on the last one.

        Raises InvalidRequest.
        """
        size, table = _checked(page_size), self._blocks
        start = self._number(page_token, table.row_end)
        shown = table.live[start : table.row_end].copy()
        if layout_id is not None:
            shown &= table.layout_id[start : table.row_end] == layout_id
        for tier in tiers:
            shown &= table.resident(tier)[start:]
        if key_prefix:
            shown &= await begin_with(table.key[start : start + len(shown)], key_prefix)
        rows = np.flatnonzero(shown)[: size + 1] + start
        found = []
        for count, row in enumerate(rows[:size].tolist()):
            if count % _ROWS_A_TURN == 0:
                await asyncio.sleep(0)
            if table.live[row]:
                found.append(block_facts(table, self._layouts, row, self._clock.wall_ms()))
        return found, self._token(int(rows[size])) if len(rows) > size else ""

    async def sessions(
        self, caller: Caller, page_token: str, page_size: int, session_id: str, layout_id: int | None
    ) -> tuple[list[Manifest], str]:
        """A page of sessions in the order of their creation, and the next page's token. Raises InvalidRequest."""
        size, start = _checked(page_size), self._number(page_token)
        found, following = await self._sessions.page(caller, start, size, session_id, layout_id)
        return found, "" if following is None else self._token(following)

    async def layouts(self, caller: Caller, page_token: str, page_size: int) -> tuple[list[LayoutFacts], str]:
        """A page of layouts in the order in which they were first opened, and the next page's token. Raises
        InvalidRequest.
        """
        table = self._blocks
        known, token = self._page(sorted(self._layouts), page_token, page_size, int)
        sizes = np.zeros(max(known, default=0) + 1)
        for start in range(0, table.row_end, _ROWS_A_SCAN):
            await asyncio.sleep(0)
            part = slice(start, start + _ROWS_A_SCAN)
            ids = np.where(table.live[part], table.layout_id[part], 0)
            weights = np.where(table.live[part], table.size_bytes[part], 0)
            sizes += np.bincount(np.minimum(ids, len(sizes)), weights=weights, minlength=len(sizes) + 1)[: len(sizes)]
        blocks = table.live_of_layout
        return [LayoutFacts(self._layouts[each], blocks[each], int(sizes[each])) for each in known], token

    def clients(
        self, caller: Caller, page_token: str, page_size: int, attached: Collection[Client]
    ) -> tuple[list[Client], str]:
        """A page of the attached clients, and the next page's token. Raises InvalidRequest."""
        return self._page(attached, page_token, page_size, lambda client: client.number)

    def _page(
        self, items: Iterable[T], page_token: str, page_size: int, number_of: Callable[[T], int]
    ) -> tuple[list[T], str]:
        """The first of the items from the token's number on. They are in the order of their numbers."""
        size, start = _checked(page_size), self._number(page_token)
        found = list(islice((each for each in items if number_of(each) >= start), size + 1))
        return found[:size], self._token(number_of(found[size])) if len(found) > size else ""

    def _token(self, number: int) -> str:
        return f"{self._boot_epoch:x}.{number:x}"

    def _number(self, token: str, number_max: int = 2**62) -> int:
        """The number in a page token; 0 for an empty one."""
        if not token:
            return 0
        epoch, _, number = token.partition(".")
        try:
            if int(epoch, 16) == self._boot_epoch and 0 <= (start := int(number, 16)) <= number_max:
                return start
        except ValueError:
            pass
        raise InvalidRequest("this daemon issued no such page token: start from the first page", field="page_token")


async def begin_with(keys: NDArray[np.void], prefix: str) -> NDArray[np.bool_]:
    """Which keys begin with these hexadecimal digits. Raises InvalidRequest."""
    if not re.fullmatch(f"[0-9a-fA-F]{{1,{2 * KEY_BYTES}}}", prefix):
        raise InvalidRequest(f"{prefix!r} is not 1 to {2 * KEY_BYTES} hexadecimal digits", field="key_prefix")
    first = prefix[:_WORD_DIGITS].lower()
    low, high = (int(first.ljust(_WORD_DIGITS, digit), 16) for digit in "0f")
    begin = np.zeros(len(keys), np.bool_)
    for start in range(0, len(keys), _ROWS_A_SCAN):
        await asyncio.sleep(0)
        part = np.ascontiguousarray(keys[start : start + _ROWS_A_SCAN])
        words = part.view(">u8").reshape(len(part), -1)[:, 0]
        found = np.flatnonzero((words >= low) & (words <= high))
        if len(prefix) > _WORD_DIGITS:
            whole = prefix.lower()
            found = np.array([row for row in found.tolist() if part[row].tobytes().hex().startswith(whole)], np.int64)
        begin[start + found] = True
    return begin


def _checked(page_size: int) -> int:
    if page_size > _PAGE_SIZE_MAX:
        raise InvalidRequest(f"page_size is {page_size}; at most {_PAGE_SIZE_MAX} are allowed", field="page_size")
    return page_size or _PAGE_SIZE
