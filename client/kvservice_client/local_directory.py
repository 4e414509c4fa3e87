"""Lookups without a call: the daemon's residency directory, where this process can map it.

All keys of a lookup are searched together: for each key a few slots are copied in one step, between two reads of their
sequences. If a slot may be torn, or if a block is stored as several shards, the answer is None, and the caller asks the
daemon.
"""

from __future__ import annotations

import mmap
import os
import stat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Shard
from kvservice_api.residency_directory import (
    HAS_TAILS,
    HEADER_BYTES,
    IN_DRAM,
    ON_SSD,
    SLOT_BYTES,
    STATE_WORD,
    TAIL,
    DirectoryState,
    Header,
    crcs_of,
    home_slots,
    layout_mark,
    tail_key,
)

_KEYS_AT_A_TIME = 1024
_SLOTS_FIRST, _SLOTS_AT_A_TIME = 4, 64  # Most searches end at once; the others have many shards.
_SLOTS_MAX = 1024  # A call to the daemon is faster than a longer search.
_ATTEMPTS_MAX = 3  # Reads of slots that the daemon is writing.

Flags = NDArray[np.uint32]


class LocalHit(NamedTuple):
    """How many leading blocks are stored, and how many of them per tier. They may be evicted at any time.

    `may_have_tail` is for a search with a `ChainBuilder`: false if no partial block continues the hit, so that `lookup`
    would find no more. It is true also if all of them are of other conversations. None: not searched, or a daemon
    that does not say.
    """

    blocks: int
    in_dram: int
    on_ssd: int
    may_have_tail: bool | None = None


class LocalDirectory:
    """The current mapping. Thread-safe: a lookup uses the mapping that it began with."""

    def __init__(self) -> None:
        self._mapping: DirectoryMapping | None = None

    def look_up(
        self,
        path: str,
        store_id: bytes,
        boot_epoch: int,
        packed_keys: bytes,
        fingerprint: bytes,
        shard: Shard,
        parent: bytes = b"",
    ) -> LocalHit | None:
        """The stored leading blocks of this layout, for all of `shard`. Makes no call.

        With `parent`, the key before the first one, the tails of the last hit are searched too.

        None if the directory has no certain answer: it is missing, unreadable, being filled, or of another store or
        boot epoch; or the block at which the answer would end is in doubt.
        """
        mapping = self._mapping
        if mapping is None or not mapping.is_good_for(store_id, boot_epoch):
            mapping = self._mapping = _opened(path, store_id, boot_epoch)
        if mapping is None:
            return None
        found: list[Flags] = []
        for start in range(0, len(packed_keys), _KEYS_AT_A_TIME * KEY_BYTES):
            part = packed_keys[start : start + _KEYS_AT_A_TIME * KEY_BYTES]
            flags, in_doubt = mapping.find(part, layout_mark(fingerprint), shard)
            misses = np.flatnonzero(flags == 0)
            if len(misses) and in_doubt[misses[0]]:
                return None
            found.append(flags[: misses[0]] if len(misses) else flags)
            if len(misses):
                break
        hits = np.concatenate(found) if found else np.empty(0, np.uint32)
        may_have_tail: bool | None = None
        if parent and mapping.header.contents & HAS_TAILS:
            end = len(hits) * KEY_BYTES
            last = packed_keys[end - KEY_BYTES : end] if end else parent
            tails, in_doubt = mapping.find(tail_key(last), layout_mark(fingerprint), shard, TAIL)
            may_have_tail = bool(tails[0] or in_doubt[0])
        in_dram, on_ssd = (int((hits & flag != 0).sum()) for flag in (IN_DRAM, ON_SSD))
        return LocalHit(len(hits), in_dram, on_ssd, may_have_tail)


class DirectoryMapping:
    """One file of the directory, mapped for reading."""

    def __init__(self, fd: int) -> None:
        """Raises OSError or ValueError if it is not a complete directory. The file may be closed after this."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no file")
        self.header = Header.decode(os.pread(fd, HEADER_BYTES, 0))
        data = mmap.mmap(fd, self.header.file_bytes, prot=mmap.PROT_READ)  # Raises ValueError if the file is shorter.
        words = np.frombuffer(data, "<u4")
        self._state = words[STATE_WORD : STATE_WORD + 1]
        self._sequences = words[HEADER_BYTES // 4 :: SLOT_BYTES // 4]
        self._slots = np.frombuffer(data, "<u8", offset=HEADER_BYTES).reshape(-1, SLOT_BYTES // 8)

    def is_good_for(self, store_id: bytes, boot_epoch: int) -> bool:
        header = self.header
        return bool(
            self._state[0] == DirectoryState.LIVE and header.boot_epoch == boot_epoch and header.store_id == store_id
        )

    def find(
        self, packed_keys: bytes, layout: bytes, shard: Shard, wanted_flags: int = IN_DRAM | ON_SSD
    ) -> tuple[Flags, NDArray[np.bool_]]:
        """For each key the flags of the first slots that have all of `shard`; and whether a miss is in doubt.

        Slots with none of `wanted_flags` are ignored.
        """
        keys = np.frombuffer(packed_keys, "<u8").reshape(-1, KEY_BYTES // 8)
        flags = np.zeros(len(keys), np.uint32)
        in_doubt = np.zeros(len(keys), np.bool_)
        wanted = np.arange(len(keys))
        for _ in range(_ATTEMPTS_MAX):
            flags[wanted], in_doubt[wanted], is_torn = self._search(keys[wanted], layout, shard, wanted_flags)
            wanted = wanted[is_torn]
            if not len(wanted):
                break
        return flags, in_doubt

    def _search(
        self, keys: NDArray[np.uint64], layout: bytes, shard: Shard, wanted_flags: int
    ) -> tuple[Flags, NDArray[np.bool_], NDArray[np.bool_]]:
        """Flags, which misses are in doubt, and which of those because a slot was being written."""
        last = len(self._slots) - 1
        homes = home_slots(keys, len(self._slots))
        flags = np.zeros(len(keys), np.uint32)
        is_partial, is_torn = np.zeros((2, len(keys)), np.bool_)
        searched = np.arange(len(keys))
        first, count = 0, _SLOTS_FIRST
        while len(searched) and first < _SLOTS_MAX:
            places = (homes[searched, None] + np.arange(first, first + count)) & last
            first, count = first + count, min(2 * count, _SLOTS_AT_A_TIME)
            before = self._sequences[places]
            slots = self._slots[places]
            after = self._sequences[places]
            torn = (before != after) | (before & 1 == 1)
            same_key = (slots[..., 4:] == keys[searched, None]).all(-1)
            found = slots[..., 1].astype(np.uint32) & np.uint32(wanted_flags)
            stored = same_key & (found != 0) & ~torn
            stored[stored] = _are_whole(slots[stored])
            torn |= same_key & (found != 0) & ~stored
            hits = stored.copy()
            hits[stored] = _answer(slots[stored], layout, shard)
            flags[searched] = np.bitwise_or.reduce(np.where(hits, found, np.uint32(0)), axis=1)
            is_partial[searched] |= (stored & ~hits).any(1)
            is_torn[searched] |= torn.any(1)
            ends = (slots[..., 1] & np.uint64(0xFFFF_FFFF) == 0) & ~torn
            searched = searched[(flags[searched] == 0) & ~ends.any(1)]
        is_partial[searched] = True  # The slots after it are not known.
        is_miss = flags == 0
        return flags, (is_partial | is_torn) & is_miss, is_torn & is_miss


def _are_whole(slots: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which slots have a correct crc. `slots` has the shape [slots, 8]."""
    covered = np.ascontiguousarray(slots[:, 1:]).view(f"V{SLOT_BYTES - 8}").ravel().tolist()
    whole: NDArray[np.bool_] = crcs_of(covered) == (slots[:, 0] >> np.uint64(32))
    return whole


def _answer(slots: NDArray[np.uint64], layout: bytes, shard: Shard) -> NDArray[np.bool_]:
    """Which ones are of this layout and hold all of `shard`."""
    parts = np.ascontiguousarray(slots[:, 3]).view(">u2").reshape(-1, 4)
    answers: NDArray[np.bool_] = (
        (slots[:, 2] == np.frombuffer(layout, "<u8"))
        & (parts[:, 0] <= shard.layer_begin)
        & (parts[:, 1] >= shard.layer_end)
        & (parts[:, 2] <= shard.head_begin)
        & (parts[:, 3] >= shard.head_end)
    )
    return answers


def _opened(path: str, store_id: bytes, boot_epoch: int) -> DirectoryMapping | None:
    if not path:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # Opening a pipe of that name would block.
        try:
            mapping = DirectoryMapping(fd)
        finally:
            os.close(fd)
    except (OSError, ValueError, OverflowError):
        return None  # It is of another host, container or user; or it is damaged.
    return mapping if mapping.is_good_for(store_id, boot_epoch) else None
