"""``kvservice check``: verifies a stopped store, and repairs it.

Every record, extent, trailer and slice of DRAM and SSD is read and compared, and the free space is
counted. The store itself says where its files are. What is damaged is a miss in a running daemon;
``--repair`` deletes its records, which is all that is needed to have the space back. An SSD file that
is missing keeps the daemon from starting: ``--repair`` deletes its records, and the next start may create it again.
If the index itself is damaged, ``--repair`` creates a new one from the records that can be saved
(``store/repair/salvage.py``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvservice.blocks import Extent, TierName
from kvservice.check_report import Problem, Report, TierReport
from kvservice.clock import SystemClock
from kvservice.index import replacement
from kvservice.index.block_index import BlockIndex
from kvservice.index.descriptor_secret import SECRET_NAME, DescriptorSecret
from kvservice.index.environment import DATA_NAME
from kvservice.index.errors import StoreDamaged, StoreError
from kvservice.index.identity import traces_of_store
from kvservice.index.records import Records
from kvservice.index.store_lock import StoreLock
from kvservice.store import image_check
from kvservice.store.repair import salvage
from kvservice.store.repair.rebuild import Progress, Search, SearchResult
from kvservice.tiers.arena import NEW_ARENA_NAME, Arena, examine
from kvservice.tiers.base import StoreMismatch, Tier
from kvservice.tiers.dram import DramTier
from kvservice.tiers.ssd import SsdTier
from kvservice.tiers.ssd_files import is_missing, read_header
from kvservice_api.errors import InvalidRequest, KVError, StorageFailed
from kvservice_api.image import PAGE_BYTES, BlockGeometry, block_geometry
from kvservice_api.keys import KEY_BYTES
from kvservice_api.layout import Shard

_PIECE_BYTES = 4 << 20
_BLOCKS_AT_ONCE = 8
_DELETES_AT_ONCE = 4096
_MAP_BYTES_MIN = 1 << 20


@dataclass(frozen=True, slots=True)
class _Copy:
    """A block in one tier, its record sound so far."""

    key: bytes
    extent: Extent
    shard: Shard
    geometry: BlockGeometry
    trailer_checksum: int


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 clean, 1 problems found (repaired or not) or a new index made, 2 not checked."""
    parser = argparse.ArgumentParser(prog="kvservice check", description="Verify a stopped store.")
    parser.add_argument("store", type=Path, help="folder of the store, `store.path` of the daemon")
    parser.add_argument(
        "--repair", action="store_true", help="delete the records of damaged objects and of missing SSD files"
    )
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="make a new index of the blocks that the SSD files have; the old one is kept under another name",
    )
    parser.add_argument(
        "--ssd-file",
        type=Path,
        action="append",
        default=[],
        help="for --rebuild: an SSD file outside the store's folder",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    try:
        report = asyncio.run(
            check(
                options.store.absolute(),
                repair=options.repair or options.rebuild,
                rebuild=options.rebuild,
                ssd_files=[file.absolute() for file in options.ssd_file],
                progress=Progress(SystemClock(), _say) if options.rebuild else None,
            )
        )
    except (StoreError, StoreMismatch, KVError, OSError) as error:
        print(f"kvservice check: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(report), indent=2) if options.json else "\n".join(report.lines()))
    return 1 if report.problems or report.made_anew else 0


def _say(line: str) -> None:
    print(f"kvservice check: {line}", file=sys.stderr)


async def check(
    store: Path,
    *,
    repair: bool = False,
    rebuild: bool = False,
    ssd_files: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Report:
    """Verify the whole store; with `rebuild`, on a new index. Damage is in the report. Calls `progress` as it goes.

    Raises StoreMismatch, StoreLocked, StoreTooNew, OSError.
    """
    index_directory = store / "index"
    if not (index_directory / DATA_NAME).is_file() and not traces_of_store(index_directory, ssd_files):
        raise FileNotFoundError(f"there is no store in {store}: give the folder that is the daemon's store.path")
    report = Report(str(store))
    with ExitStack() as opened:
        lock = StoreLock(store / "lock")
        opened.callback(lock.release)
        if repair or rebuild:
            report.notes += filter(None, [replacement.end_interrupted(store)])
        elif left := replacement.interrupted(store):
            report.problems.append(Problem("index", "", left))
        try:
            if rebuild:
                await _repair_index(store, report, rebuild=True, ssd_files=ssd_files, progress=progress)
            index = await _open_index(store, report, repair=repair)
        except StoreDamaged as error:
            report.problems.append(Problem("index", "", f"it cannot be repaired: {error}"))
            return report
        if index is not None:
            opened.callback(index.close)
            report.store_id = index.store_id.hex()
            report.layouts = len(index.layouts)
            await _Check(store, index, report, opened, progress).run(repair)
    return report


async def _open_index(store: Path, report: Report, *, repair: bool) -> BlockIndex | None:
    """The durable index. If damaged: None, or with `repair` a new one. Raises StoreDamaged if that fails."""
    directory = store / "index"
    try:
        return BlockIndex.open(directory, map_bytes=_map_bytes(directory), create=False)
    except StoreDamaged as error:
        problem = Problem("index", "", f"{error}. {error.what_helps}" if not repair else str(error))
    report.problems.append(problem)
    if repair:
        await _repair_index(store, report)
        return BlockIndex.open(directory, map_bytes=_map_bytes(directory), create=False)
    return None


async def _repair_index(
    store: Path,
    report: Report,
    *,
    rebuild: bool = False,
    ssd_files: Sequence[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Replace the damaged index by a new one. Raises StoreDamaged, StoreMismatch.

    With `rebuild` the SSD files are searched for blocks, and each record is checked against its block.
    """
    saved = salvage.read(store, ssd_files)
    if rebuild:
        saved.doubtful.update(saved.records)
        saved.records.clear()
    elif not (saved.records or saved.doubtful or saved.sessions):
        raise StoreDamaged("no record of a block or a session was found, so no index is made of it: use --rebuild")
    found: SearchResult | None = None
    index = salvage.make_index(store, saved)
    try:
        with ExitStack() as opened:
            looking = _Check(store, index, Report(str(store)), opened, progress)
            if rebuild:
                found = await looking.search(ssd_files, saved.secret)
                index.close()
                index = salvage.make_room(store, saved, len(found.keys))
            await salvage.fill(index, saved, looking.are_right, found)
        counts = (index.count(TierName.SSD), len(index.layouts), len(saved.sessions))
        if found is not None and found.others and not index.layouts:
            raise StoreDamaged(
                f"the SSD files have {sum(found.others.values())} trailers, and no layout is known, so no index "
                f"is made: restore the folder {store / 'layouts'} from a copy, then use --rebuild"
            )
    finally:
        index.close()
    kept = salvage.put_in_place(store)
    report.repaired += 1
    report.made_anew.append(
        f"the index, with {counts[0]} blocks, {counts[1]} layouts and {counts[2]} sessions; what else it had is unknown"
        + (f"; the old one is {kept}" if kept else "")
    )
    if found is not None:
        report.notes.append(
            "sessions that are not among these are lost, how many is not known; pins and hits of blocks that "
            "were found only by their trailers are lost"
        )
        if saved.secret_is_lost:
            report.notes.append(f"{store / SECRET_NAME} is gone or damaged, so no descriptor's tag could be checked")
        if found.with_other_tag:
            report.notes.append(
                f"{found.with_other_tag} blocks have a tag that this store's secret does not give: they were found by "
                "their checksums, and their parents are not known"
            )
        report.notes += [f"no record for {count} trailers {what}" for what, count in sorted(found.others.items())]


class _Check:
    """One check of an open store."""

    def __init__(
        self, store: Path, index: BlockIndex, report: Report, opened: ExitStack, progress: Progress | None = None
    ) -> None:
        self._store = store
        self._index = index
        self._report = report
        self._opened = opened
        self._progress = progress
        self._bad: dict[TierName, list[bytes]] = {tier: [] for tier in (TierName.DRAM, TierName.SSD)}
        self._trailers: dict[bytes, int] = {}  # Of the copies on SSD.
        self._away: dict[int, Path] = {}  # SSD files that are missing, by number.
        self._ssd: Tier | str = ""  # Set once it is opened for a search.
        self._ssd_files: list[Path | None] = []  # By number.
        self._begin_verifying("", 0)

    async def run(self, repair: bool) -> None:
        for fingerprint in self._index.layout_entries.damaged:
            self._report.problems.append(Problem("index", fingerprint.hex(), "its layout's entry is damaged"))
        for fingerprint in self._index.layout_entries.restorable:
            what = "its layout's entry is damaged, and its copy in the folder layouts is sound"
            self._report.problems.append(Problem("index", fingerprint.hex(), what))
        self._report.sessions = len(self._index.load_sessions())
        for name in self._index.damaged_sessions:
            self._report.problems.append(Problem("index", name.hex(), "its session's record is damaged"))
        await self._check_tier(TierName.SSD, self._open_ssd())
        await self._check_tier(TierName.DRAM, self._open_dram())
        if repair:
            await self._repair()

    async def _check_tier(self, name: TierName, tier: Tier | str) -> None:
        report = self._report.tiers[name] = TierReport()
        if isinstance(tier, str):
            report.not_checked = tier
            return
        copies = self._sound_copies(name, tier)
        report.blocks = len(copies)
        report.capacity_bytes = tier.capacity_bytes
        report.used_bytes = tier.used_bytes
        report.free_bytes = tier.capacity_bytes - tier.used_bytes
        waiting = iter(copies)
        self._begin_verifying(f"the tier {name}", len(copies))
        await asyncio.gather(*(self._verify_all(name, tier, waiting) for _ in range(_BLOCKS_AT_ONCE)))

    def _sound_copies(self, name: TierName, tier: Tier) -> list[_Copy]:
        """The copies whose records agree with themselves, their layout, the tier and each other."""
        found = self._index.load(name)
        for key, what in found.damaged.items():
            self._complain(name, key, what)
        records = found.records
        places = (records["segment"], records["offset_bytes"], records["size_bytes"])
        within = tier.holds(*places)
        tier.adopt(*(column[within] for column in places))
        copies = []
        for row, key in enumerate(found.keys):
            copy = self._copy_of(key, records[row]) if within[row] else "its extent is outside the tier"
            if isinstance(copy, str):
                self._complain(name, key, copy)
            elif self._trailers.setdefault(key, copy.trailer_checksum) != copy.trailer_checksum:
                self._complain(name, key, "its copy on SSD has other bytes")
            else:
                copies.append(copy)
        return copies

    def _copy_of(self, key: bytes, record: np.void) -> _Copy | str:
        extent = Extent(int(record["segment"]), int(record["offset_bytes"]), int(record["size_bytes"]))
        layout = self._index.layouts[int(record["layout_id"])]
        try:
            shard = Shard.decode(key[KEY_BYTES:]).check(layout)
            geometry = block_geometry(layout, shard, int(record["token_count"]))
        except InvalidRequest as error:
            return f"its record does not fit its layout: {error.message}"
        if geometry.image_bytes > extent.size_bytes:
            return f"its extent has {extent.size_bytes} bytes and needs {geometry.image_bytes}"
        return _Copy(key, extent, shard, geometry, int(record["trailer_checksum"]))

    async def _verify_all(self, name: TierName, tier: Tier, copies: Iterator[_Copy]) -> None:
        for copy in copies:
            try:
                what = await _damage(tier, copy)
            except StorageFailed as error:
                what = error.message
            self._report.tiers[name].bytes_checked += copy.geometry.image_bytes
            self._note_verified()
            if what:
                self._complain(name, copy.key, what)

    async def search(self, ssd_files: Sequence[Path], secret: DescriptorSecret) -> SearchResult:
        """The blocks in the SSD files, in any folder. Raises StoreMismatch if a file is missing."""
        if not self._index.ssd_files:
            self._index.remember_ssd_files(_by_number({*self._store.glob("ssd-*.kv"), *ssd_files}))
        tier = self._ssd = self._open_ssd()
        if isinstance(tier, str):
            raise StoreMismatch(f"{tier}: blocks can only be looked for in all SSD files at once")
        assert isinstance(tier, SsdTier)
        self._index.remember_ssd_files(self._ssd_files)
        return await Search(tier, self._index.layouts, secret, self._progress).run(self._ssd_files)

    async def are_right(self, keys: Sequence[bytes], records: Records) -> list[bool]:
        """Whether the bytes at each record's place on SSD are those of its block."""
        tier = self._ssd or self._open_ssd()
        if isinstance(tier, str):
            return [False] * len(keys)
        within = tier.holds(records["segment"], records["offset_bytes"], records["size_bytes"])
        right = [False] * len(keys)
        self._begin_verifying("the old index", len(keys))
        for row, key in enumerate(keys):
            copy = self._copy_of(key, records[row]) if within[row] else "its extent is outside the tier"
            if isinstance(copy, _Copy):
                with suppress(StorageFailed):
                    right[row] = not await _damage(tier, copy)
            self._note_verified()
        return right

    def _begin_verifying(self, what: str, blocks: int) -> None:
        self._verified, self._verifying = 0, (what, blocks)

    def _note_verified(self) -> None:
        self._verified += 1
        if self._progress is not None:
            what, blocks = self._verifying
            self._progress.note(lambda: f"{self._verified} of the {blocks} blocks of {what} verified")

    def _complain(self, tier: TierName, key: bytes, what: str) -> None:
        self._report.problems.append(Problem(tier, key.hex(), what))
        self._bad[tier].append(key)

    async def _repair(self) -> None:
        repaired = len(self._index.layout_entries.damaged) + len(self._index.damaged_sessions)
        repaired += self._index.layout_entries.restore()
        await self._index.layout_entries.delete_damaged()
        await self._index.delete_sessions(self._index.damaged_sessions)  # Of lost layouts too.
        for tier, keys in self._bad.items():
            for start in range(0, len(keys), _DELETES_AT_ONCE):
                await self._index.delete(tier, keys[start : start + _DELETES_AT_ONCE])
            repaired += len(keys)
        if self._away:
            repaired += await self._give_up_missing_files()
        self._report.repaired += repaired

    async def _give_up_missing_files(self) -> int:
        """Delete the records of missing files, and forget these files. Returns the number of records."""
        lost = self._blocks_by_file()
        for number, path in self._away.items():
            keys = lost.get(number, [])
            for start in range(0, len(keys), _DELETES_AT_ONCE):
                await self._index.delete(TierName.SSD, keys[start : start + _DELETES_AT_ONCE])
            self._report.given_up.append(
                f"{path} and the {len(keys)} blocks in it; the next start creates the file again, if ssd.paths still "
                "has its folder"
            )
        # Last: a file may be created only when no record names it.
        files = [None if number in self._away else file for number, file in enumerate(self._index.ssd_files)]
        self._index.remember_ssd_files(files)
        return sum(len(lost.get(number, [])) for number in self._away)

    def _blocks_by_file(self) -> dict[int, list[bytes]]:
        """The object keys of the sound records on SSD, by the number of their file."""
        found = self._index.load(TierName.SSD)
        numbers = found.records["segment"]
        return {
            number: [key.tobytes() for key in found.object_keys[numbers == number]]
            for number in np.unique(numbers).tolist()
        }

    def _open_ssd(self) -> Tier | str:
        """The tier, or why it is not checked. Files that are missing or cannot be used are a problem."""
        known = self._index.ssd_files
        files = known if any(known) else sorted(self._store.glob("ssd-*.kv"))
        if not files:
            if self._index.load(TierName.SSD).keys:
                self._report.problems.append(Problem(TierName.SSD, "", "there are records, and no file is known"))
            return "no SSD file is known"
        try:
            files = self._ssd_files = [
                None if file is None else self._found_at_home(number, file) for number, file in enumerate(files)
            ]
            self._away = {number: file for number, file in enumerate(files) if file is not None and is_missing(file)}
            if self._away:
                return self._complain_of_missing_files()
            tier = SsdTier.open(
                files,
                store_id=self._index.store_id,
                capacity_bytes=None,
                io_threads=_BLOCKS_AT_ONCE,
                creatable=(),
            )
        except (StoreMismatch, OSError) as error:
            self._report.problems.append(Problem(TierName.SSD, "", str(error)))
            return str(error)
        self._opened.callback(tier.close)
        return tier

    def _found_at_home(self, number: int, file: Path) -> Path:
        """The file, or if the index names none that is there, the one of this number in the store's own folder."""
        if not is_missing(file):
            return file
        for other in sorted(self._store.glob("ssd-*.kv")):
            header = read_header(other)
            if header is not None and (header.store_id, header.number) == (self._index.store_id, number):
                return other
        return file

    def _complain_of_missing_files(self) -> str:
        lost = self._blocks_by_file()
        for number, path in self._away.items():
            what = (
                f"{path} is missing, and {len(lost.get(number, []))} blocks with it: mount its drive or restore the "
                "file, or delete their records with --repair"
            )
            self._report.problems.append(Problem(TierName.SSD, "", what))
        return ", ".join(f"{path} is missing" for path in self._away.values())

    def _open_dram(self) -> Tier | str:
        """The tier, or why it is not checked: a daemon would then start with an empty one."""
        directory = self._index.volatile_directory
        if directory is None:
            return "no daemon has run on the store"
        path = directory.parent / "arena"
        header, why_not = examine(path, self._index.store_id)
        if header is not None:
            why_not = self._index.adopt_volatile(directory, header.arena_id, map_bytes=_map_bytes(directory))
        if why_not and self._index_is_of(path.with_name(NEW_ARENA_NAME), directory):
            return "a start that made the tier smaller was interrupted: the next start completes it"
        if header is None or why_not:
            return f"the arena is not this store's any more: {why_not}"
        arena = Arena.open(path.parent.parent, self._index.store_id, PAGE_BYTES + header.capacity_bytes)
        self._opened.callback(arena.close)
        assert not arena.why_new, "what was examined is opened as it is"
        return DramTier(arena)

    def _index_is_of(self, arena: Path, directory: Path) -> bool:
        """Whether the index in the folder `directory` is that of the arena. It is not open, and stays so."""
        header, _ = examine(arena, self._index.store_id)
        if header is None or self._index.adopt_volatile(directory, header.arena_id, map_bytes=_map_bytes(directory)):
            return False
        self._index.close_volatile()
        return True


def _by_number(files: Collection[Path]) -> list[Path | None]:
    """A store's SSD files, each at its number; None for the number of a file that left the store. Raises StoreMismatch
    if one is missing.
    """
    headers = {file: header for file in files if (header := read_header(file)) is not None}
    if not headers:
        raise StoreMismatch("no SSD file was found: name those that are elsewhere with --ssd-file")
    # The counts differ if a start with other drives was interrupted.
    count = max(header.file_count for header in headers.values())
    by_number = {header.number: file.absolute() for file, header in headers.items()}
    if len(by_number) < count or len(by_number) < len(headers):
        raise StoreMismatch(
            f"of the store's {count} SSD files these were found: {', '.join(map(str, sorted(headers)))}. Name those "
            "that are elsewhere with --ssd-file"
        )
    return [by_number.get(number) for number in range(max(by_number) + 1)]


async def _damage(tier: Tier, copy: _Copy) -> str:
    """What is damaged in the copy's bytes; empty if nothing is."""
    key, shard, expected = copy.key[:KEY_BYTES], copy.shard, copy.trailer_checksum
    what = await image_check.damage_in(tier, copy.extent, copy.geometry, key, shard, expected, piece_bytes=_PIECE_BYTES)
    return f"{what} is damaged" if what else ""


def _map_bytes(directory: Path) -> int:
    """As large as the daemon made it: the file is allocated whole."""
    try:
        return max((directory / DATA_NAME).stat().st_size, _MAP_BYTES_MIN)
    except (FileNotFoundError, NotADirectoryError):
        return _MAP_BYTES_MIN
