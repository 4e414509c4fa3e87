"""Opens a store as the settings say: the module that names every concrete class of it.

The order: lock, durable index (it has the store's id), SSD files, the tiers below SSD and their indexes, arena,
volatile index (it belongs to the arena), the block table from the records of all, and at last the move of blocks out
of tiers that are to be smaller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kvservice.blocks import TierName
from kvservice.clock import Clock
from kvservice.config import ConfigError, Settings
from kvservice.counters import Counters
from kvservice.host_limits import (
    HostLimit,
    available_memory_bytes,
    memory_limit,
    reserve_bytes,
)
from kvservice.index import replacement
from kvservice.index.block_index import BlockIndex
from kvservice.index.identity import SCHEMA_WITH_FREE_FILE_NUMBERS
from kvservice.index.store_lock import StoreLock
from kvservice.policy import daemon_policy
from kvservice.ssd_drives import Drives, find_drives, leave_ssd, left_behind
from kvservice.start_checks import NotThere
from kvservice.store.directory import ResidencyDirectory
from kvservice.store.hints.exchange import HintLimits
from kvservice.store.hints.queue_mirror import QueueLimits
from kvservice.store.miss_reasons import MissReasons
from kvservice.store.mover.evictor import Watermarks
from kvservice.store.mover.learned_counts import LEARNED_NAME, LearnedCounts
from kvservice.store.recovery import recover
from kvservice.store.sessions.sessions import SessionLimits
from kvservice.store.smaller_arena import SmallerArena
from kvservice.store.store import BlockStore, StoreLimits
from kvservice.tiers.arena import Arena, arena_directory, without_generations
from kvservice.tiers.arena_notes import note_arena, write_arena_note
from kvservice.tiers.base import DurableTier, Resizable, StoreMismatch, Tier
from kvservice.tiers.dram import DramTier
from kvservice.tiers.files import FileCalls, executor_of, file_system_of
from kvservice.tiers.kinds import TierOptions, tier_kind
from kvservice.tiers.ssd import SsdTier

log = logging.getLogger(__name__)

MIB = 2**20
_VOLATILE_NAME = "index"  # The index of the arena's blocks, in its folder.
_DRAM_BYTES_MIN = 64 * MIB  # A DRAM tier that a memory limit makes smaller than this would hold few blocks, or none.


class StoreParts(NamedTuple):
    """An opened store, and what its daemon uses beside it."""

    store: BlockStore
    counters: Counters
    directory: ResidencyDirectory
    executor: ThreadPoolExecutor
    dram: DramTier


async def open_store(settings: Settings, clock: Clock, files: FileCalls, opening: ExitStack) -> StoreParts:
    """Open or create the store that the settings name. `opening` closes what is open, also after an error.

    Raises ConfigError, HostLimit, StoreError, StoreMismatch, OSError.
    """
    arena_limit = _arena_limit(settings)
    path = settings.store.path.absolute()
    path.mkdir(parents=True, exist_ok=True)
    lock = StoreLock(path / "lock")
    opening.callback(lock.release)
    has_ssd = bool(settings.ssd.capacity_bytes)
    slower: dict[TierName, DurableTier] = {}  # From the fastest to the slowest.

    def make_durable(tier: TierName) -> None:
        if tier in slower:
            slower[tier].sync()

    if left := replacement.interrupted(path):
        log.warning(left)
    index = BlockIndex.open(
        path / "index",
        map_bytes=settings.durable_map_bytes,
        layouts_max=settings.index.layouts_max,
        before_commit=partial(make_durable, TierName.SSD) if has_ssd else None,
        ssd_files=[file for folder in settings.ssd_directories for file in sorted(folder.absolute().glob("ssd-*.kv"))]
        if has_ssd
        else (),
    )
    opening.callback(index.close)
    index.remember_place()
    drives: Drives | None = None
    if not has_ssd:
        leave_ssd(index, settings.ssd.drained_paths)
    else:
        drives = find_drives(index, settings.ssd_directories, settings.ssd.drained_paths)
        index.remember_ssd_files(drives.files, changing=[*drives.creatable, *drives.leaving])
        try:
            ssd = SsdTier.open(
                drives.files,
                store_id=index.store_id,
                capacity_bytes=int(settings.ssd.capacity_bytes) - settings.durable_map_bytes,
                io_threads=settings.ssd.io_threads,
                calls=files,
                direct=settings.ssd.direct,
                creatable=drives.creatable,
                leaving=drives.leaving,
            )
        except OSError as error:
            raise NotThere(f"ssd.capacity_bytes, ssd.paths: {error.filename}: {error.strerror}") from error
        opening.callback(ssd.close)
        slower[TierName.SSD] = ssd
        index.remember_ssd_files(drives.files, changing=drives.leaving)
        if drives.leaving or None in drives.files:
            index.require_schema(SCHEMA_WITH_FREE_FILE_NUMBERS)
    slower |= _lower_tiers(settings, index, make_durable, files, opening)
    arena = await _open_arena(settings, index, list(slower), clock.wall_ms(), files)
    opening.callback(arena.close)
    _note_arena(path, arena.directory.absolute())
    kind = file_system_of(arena.directory)
    if kind not in ("", "tmpfs", "ramfs", "hugetlbfs"):
        log.warning("the arena is on a disk: dram.path is meant for a tmpfs, and %s has %s", settings.dram.path, kind)
    if arena_limit is not None:
        arena.limit(*arena_limit)
    _warn_of_little_memory(arena, kind)
    dram = DramTier(arena)
    if settings.dram.share != "off":
        arena.share()
    emptied = index.open_volatile(
        arena.directory / _VOLATILE_NAME,
        arena.arena_id,
        map_bytes=settings.volatile_map_bytes,
        now_ms=clock.wall_ms(),
        why_new=arena.why_new,
    )
    if arena.why_new or emptied:
        why = arena.why_new or f"its index: {emptied}"
        log.info("the DRAM tier starts empty: %s", why, extra={"why": why})

    if forgotten := index.forget_unused_layouts():
        log.info("layouts without blocks are removed, because there were too many: %d", forgotten)
    history = MissReasons(clock, settings.history.events_max)
    blocks = recover(index, {TierName.DRAM: dram, **slower}, history)
    all_tiers: dict[TierName, Tier] = {TierName.DRAM: dram, **slower}
    too_large = [(name, tier) for name, tier in all_tiers.items() if isinstance(tier, Resizable) and tier.is_too_large]
    for _, tier in too_large:
        tier.shrink()
    executor = executor_of(max(2, min(settings.server.transfer_slots, 8)), "transfer")
    counters = Counters()
    store = BlockStore(
        blocks,
        dram,
        slower,
        index,
        daemon_policy(settings.mover.policy),
        clock,
        counters,
        executor,
        limits=_limits(settings),
        watermarks={
            TierName.DRAM: Watermarks(settings.mover.dram_free_low, settings.mover.dram_free_high),
            TierName.SSD: Watermarks(settings.mover.ssd_free_low, settings.mover.ssd_free_high),
            **{TierName(tier.name): Watermarks(tier.free_low, tier.free_high) for tier in settings.tiers.below_ssd},
        },
        history=history,
        learned=LearnedCounts(path / LEARNED_NAME),
    )
    for name, tier in too_large:
        log.info("%s is made smaller: blocks move, and those without space leave", name, extra={"tier": name})
        found = await store.relocate(name)
        tier.truncate()
        log.info("%s was made smaller", name, extra={"tier": name, **found._asdict()})
    if drives is not None and drives.leaving:
        index.remember_stale_ssd_files(index.stale_ssd_files | left_behind(drives))
        index.remember_ssd_files(
            [None if number in drives.leaving else file for number, file in enumerate(drives.files)]
        )
    directory = ResidencyDirectory(
        blocks,
        index.layouts,
        arena.directory,
        store_id=index.store_id,
        arena_id=arena.arena_id,
        boot_epoch=store.boot_epoch,
        bytes_max=int(settings.dram.directory_bytes_max),
        calls=files,
    )
    opening.callback(directory.close)
    return StoreParts(store, counters, directory, executor, dram)


async def _open_arena(
    settings: Settings, index: BlockIndex, slower: list[TierName], now_ms: int, files: FileCalls
) -> Arena:
    """Open or create the arena, with the size of the settings. Raises StoreMismatch, StorageFailed, OSError."""
    folder = arena_directory(settings.dram.path, index.store_id) / _VOLATILE_NAME
    map_bytes = settings.volatile_map_bytes

    def has_index(arena_id: bytes) -> bool:
        why_not = index.adopt_volatile(folder, arena_id, map_bytes=map_bytes)
        index.close_volatile()
        return not why_not

    arena = Arena.open(settings.dram.path, index.store_id, _arena_bytes(settings), calls=files, has_index=has_index)
    if not arena.is_too_large:
        return arena
    room = [arena.free_bytes]
    if file_system_of(arena.directory) in ("tmpfs", "ramfs"):
        if (available := available_memory_bytes()) is not None:
            room.append(available)
        if (limit := memory_limit()) is not None:
            room.append(limit.size_bytes - reserve_bytes(limit.size_bytes) - arena.ready_bytes - map_bytes)
    smaller = SmallerArena(
        index,
        folder,
        tiers=[TierName.DRAM, *slower],
        map_bytes=map_bytes,
        room_bytes=min(room) - map_bytes,
        now_ms=now_ms,
    )
    return await smaller.replace(arena)


def _note_arena(store: Path, arena: Path) -> None:
    """For `kvservice arenas` and `kvservice remove`: which arena belongs to which store."""
    try:
        write_arena_note(arena, store)
        for earlier in note_arena(store, arena):
            log.warning("an arena of an earlier dram.path takes memory: %s; see `kvservice arenas`", earlier)
    except OSError as error:
        log.warning("the store of the arena %s could not be noted: %s", arena, error.strerror)


def _lower_tiers(
    settings: Settings,
    index: BlockIndex,
    make_durable: Callable[[TierName], None],
    files: FileCalls,
    opening: ExitStack,
) -> dict[TierName, DurableTier]:
    """Open the indexes and the media of the tiers below SSD. Raises ConfigError, StoreMismatch, OSError."""
    lower = {TierName(tier.name): tier for tier in settings.tiers.below_ssd}
    emptied = index.open_lower(
        {name: (settings.lower_map_bytes(tier), partial(make_durable, name)) for name, tier in lower.items()}
    )
    for name, why in emptied.items():
        log.info("the tier %s starts empty: %s", name, why, extra={"tier": name, "why": why})
    opened: dict[TierName, DurableTier] = {}
    for name, tier in lower.items():
        try:
            opened[name] = tier_kind(tier.kind)(
                TierOptions(
                    path=tier.path.absolute(),
                    name=name,
                    store_id=index.store_id,
                    capacity_bytes=int(tier.capacity_bytes),
                    io_threads=tier.io_threads,
                    calls=files,
                    may_create=not index.count(name),
                )
            )
        except (ValueError, TypeError) as error:
            if isinstance(error, StoreMismatch):
                folder = index.lower_directory(name)
                raise StoreMismatch(
                    f"{error}. To drop the blocks of this tier, remove its file and the folder {folder}"
                ) from error
            raise ConfigError(f"tiers.below_ssd: the tier {name} of the kind {tier.kind!r}: {error}") from error
        opening.callback(opened[name].close)
    return opened


def _arena_bytes(settings: Settings) -> int:
    """The arena's part of the DRAM tier's shared memory; the rest is for its index and the generations."""
    return without_generations(int(settings.dram.capacity_bytes) - settings.volatile_map_bytes)


def _arena_limit(settings: Settings) -> tuple[int, str] | None:
    """How much of the arena may be allocated, and why no more; None where all of it may.

    Shared memory counts against the memory limit of the process's control groups, and the kernel kills the process
    that goes past it. Raises HostLimit if the limit leaves too little for a DRAM tier.
    """
    limit = memory_limit()
    folder = next(
        each for each in (settings.dram.path.absolute(), *settings.dram.path.absolute().parents) if each.is_dir()
    )
    if limit is None or file_system_of(folder) not in ("tmpfs", "ramfs"):
        return None  # The kernel can take back pages of a file on disk; huge pages are counted elsewhere.
    asked, kept = int(settings.dram.capacity_bytes), reserve_bytes(limit.size_bytes)
    if asked + kept <= limit.size_bytes:
        return None
    why = f"{limit.file} limits the memory of this process to {_mib(limit.size_bytes)}"
    beside = asked - _arena_bytes(settings)
    size = limit.size_bytes - kept - beside
    if size < _DRAM_BYTES_MIN:
        needed = kept + min(asked, _DRAM_BYTES_MIN + beside)
        raise HostLimit(
            f"{why}, too little for a DRAM tier: the daemon itself needs {_mib(kept)}; allow at least {_mib(needed)}, "
            f"or set dram.capacity_bytes, now {_mib(asked)}, lower"
        )
    log.warning(
        f"the DRAM tier is made smaller, {_mib(size + beside)} instead of the {_mib(asked)} of dram.capacity_bytes: "
        f"{why}, and the daemon itself needs {_mib(kept)} of it"
    )
    return size, why


def _warn_of_little_memory(arena: Arena, file_system: str) -> None:
    """Warn if the host has less memory than the arena still has to allocate: the kernel may kill processes."""
    available = available_memory_bytes()
    if available is not None and available < arena.missing_bytes and file_system in ("tmpfs", "ramfs"):
        log.warning(
            f"the DRAM tier will take {_mib(arena.missing_bytes)} more memory, and this host has {_mib(available)} "
            "available (MemAvailable): set dram.capacity_bytes lower, or the kernel may kill processes"
        )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f} MiB"


def _limits(settings: Settings) -> StoreLimits:
    return StoreLimits(
        clients_max=settings.server.clients_max,
        leases_per_client_max=settings.leases.per_client_max,
        leased_blocks_per_client_max=settings.leases.blocks_per_client_max,
        lease_ttl_max_s=settings.leases.ttl_max_s,
        frame_bytes=int(settings.server.frame_bytes),
        transfer_slots=settings.server.transfer_slots,
        writes_in_flight=settings.mover.writes_in_flight,
        reads_in_flight=settings.mover.reads_in_flight,
        ssd_drives=len(settings.ssd_directories),
        read_bytes=int(settings.ssd.read_bytes),
        write_bytes=int(settings.ssd.write_bytes),
        recency_flush_s=settings.index.recency_flush_s,
        scrub_bytes_per_second=int(settings.scrub.bytes_per_second),
        pin_ttl_max_s=settings.pins.ttl_max_s,
        pin_fraction_max=settings.pins.fraction_max,
        requests_remembered=settings.history.requests_max,
        session=SessionLimits(
            ttl_s=settings.session.ttl_s,
            sessions_max=settings.session.sessions_max,
            slices_max=settings.session.slices_max,
            flush_s=settings.index.recency_flush_s,
        ),
        hints=HintLimits(
            QueueLimits(settings.hints.queued_requests_max, settings.hints.queued_keys_max),
            dram_share=settings.hints.dram_share,
            bytes_per_s_max=int(settings.hints.bytes_per_second),
        ),
        writes_in_place=settings.dram.share == "writable",
        keys_max=settings.server.keys_max,
        loads_max=settings.server.loads_max,
        saves_max=settings.server.saves_max,
        transfer_idle_s=settings.server.transfer_idle_s,
    )
