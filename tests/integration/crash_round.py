"""One round of a crash test: a daemon under load, a kill at a chosen time, and checks of the remaining store.

Clients save, load, evict and discard conversations, and keep a ledger of the daemon's acknowledgements. All blocks
differ, and the bytes of a block follow from its key.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kvservice.blocks import Extent, TierName
from kvservice.index.block_index import BlockIndex
from kvservice_api.errors import DaemonUnavailable
from kvservice_api.keys import KEY_BYTES
from kvservice_client import BlockChain, Client, Durability, Layout, Tier
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, SMALL, compare, new_chain, save, verify
from tests.marks import Replay, read_marks

BLOCKS_MIN = 100  # Acknowledged in a round before its kill.
_KEPT_CONVERSATIONS = 6  # Kept from one round to the next.
_SSD_BYTES = 256 * MIB  # More than all rounds between two discards need, so that the policy evicts nothing.
_DURABLE_MAP_BYTES = 4 * MIB
_KILLER = Path(__file__).parent.parent / "killer.py"

LAYOUTS = (LARGE, SMALL)


@dataclass(eq=False, slots=True)
class Conversation:
    """A chain, and the daemon's acknowledgements of its blocks, by position."""

    layout: Layout
    chain: BlockChain
    stored: set[int] = field(default_factory=set)  # Acknowledged, in DRAM at least.
    on_ssd: set[int] = field(default_factory=set)  # Acknowledged or seen on SSD, and not evicted there.
    evicted_from: Tier | None = None
    discard_begun: bool = False
    discarded: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keys_of(self, positions: Iterable[int]) -> list[bytes]:
        return [self.chain.keys[position] for position in positions]


class Workload:
    """Clients that work until the daemon is killed. The ledger is right at every moment, also at the last one."""

    def __init__(self, daemon: DaemonProcess, ledger: list[Conversation], *, seed: int, evicts_from_ssd: bool) -> None:
        self.acknowledged_count = 0
        self.evicted_by_policy = 0  # From DRAM to SSD, until shortly before the kill.
        self.done = dict.fromkeys(("refused", "loaded", "evicted dram", "evicted ssd", "promoted", "discarded"), 0)
        self._daemon = daemon
        self._ledger = ledger
        self._seed = seed
        self._evicts_from_ssd = evicts_from_ssd
        self._numbers = itertools.count()
        self._ended = threading.Event()
        self._acknowledged = threading.Condition()

    def run(self, until: Callable[[], None]) -> None:
        """Work until the daemon is killed; `until` returns then. Raises the first error of a client."""
        parts = (self._save_to_dram, self._save_to_ssd, self._read, self._move)
        with ThreadPoolExecutor(len(parts)) as threads:
            jobs = [threads.submit(self._work, part) for part in parts]
            try:
                until()
            finally:
                self._ended.set()
        for job in jobs:
            job.result()

    def wait_for_acknowledged(self, count: int) -> None:
        with self._acknowledged:
            assert self._acknowledged.wait_for(lambda: self.acknowledged_count >= count, 30.0), "saves take too long"

    def _work(self, part: Callable[[Client, random.Random], None]) -> None:
        chooser = random.Random(f"{self._seed} {part.__name__}")
        with self._daemon.client(part.__name__, reconnect_wait_s=0.0) as client:
            while not self._ended.is_set():
                try:
                    part(client, chooser)
                except DaemonUnavailable:
                    return  # It was killed.

    def _save_to_dram(self, client: Client, chooser: random.Random) -> None:
        self._save(client, chooser, Durability.DRAM)

    def _save_to_ssd(self, client: Client, chooser: random.Random) -> None:
        self._save(client, chooser, Durability.SSD)

    def _save(self, client: Client, chooser: random.Random, durability: Durability) -> None:
        layout = chooser.choice(LAYOUTS)
        talk = Conversation(layout, new_chain(layout, chooser.randint(1, 6), f"{self._seed} {next(self._numbers)}"))
        self._ledger.append(talk)  # Before the save, because a block may survive although its save was not answered.
        result = save(client, layout, talk.chain, durability)
        stored = set(range(len(talk.chain))) - {position for position, _ in result.refused}
        talk.stored |= stored
        if durability is Durability.SSD:
            talk.on_ssd |= stored
        with self._acknowledged:
            self.acknowledged_count += len(stored)
            self.done["refused"] += len(result.refused)
            self._acknowledged.notify_all()

    def _read(self, client: Client, chooser: random.Random) -> None:
        talk = self._some(chooser)
        if talk is None:
            return
        promised = min(set(range(len(talk.chain))) - talk.stored, default=len(talk.chain))
        with client.open_layout(talk.layout).lookup(talk.chain) as lease:
            with talk.lock:
                assert talk.discard_begun or lease.hit_blocks >= promised, "an acknowledged block is a miss"
                if talk.evicted_from is not Tier.SSD:
                    tiers = [run.ssd for run in lease.residency for _ in range(run.count)]
                    talk.on_ssd |= {position for position, on_ssd in enumerate(tiers) if on_ssd}
            if lease.hit_blocks:
                compare(lease, talk.layout, talk.chain)
                self.done["loaded"] += lease.hit_blocks

    def _move(self, client: Client, chooser: random.Random) -> None:
        """Evict a copy of a block that has another one, promote a block, or discard one."""
        talk = self._some(chooser)
        if talk is None:
            return
        choice = chooser.random()
        if choice < 0.1:
            with talk.lock:
                talk.discard_begun = True
                talk.stored, talk.on_ssd = set(), set()
            self.done["discarded"] += client.admin.discard(talk.chain).discarded
            talk.discarded = True
        elif talk.evicted_from is Tier.DRAM:
            self.done["promoted"] += client.prefetch(talk.chain, wait=choice < 0.5).promoted
        elif talk.evicted_from is None and len(talk.on_ssd) == len(talk.chain):
            tier = Tier.SSD if self._evicts_from_ssd and choice < 0.5 else Tier.DRAM
            with talk.lock:
                talk.evicted_from = tier
                if tier is Tier.SSD:
                    talk.on_ssd = set()
            self.done[f"evicted {tier}"] += client.evict(talk.chain, tier).evicted

    def _some(self, chooser: random.Random) -> Conversation | None:
        """A saved conversation, more likely a recent one."""
        talks = [talk for talk in self._ledger[-40:] if talk.stored]
        if not talks:
            self._ended.wait(0.001)
            return None
        return chooser.choice(talks)


class Report(NamedTuple):
    """The operations of a round, and the remaining blocks. Counts are of blocks."""

    number: int
    target: str
    in_flight: set[str]
    acknowledged: int
    committed: int  # Recorded on SSD by the daemon that was killed.
    done: dict[str, int]
    by_policy: int
    promised: int  # Had to survive.
    promised_dram: int  # Of these, only in DRAM.
    survived: int

    @property
    def hit_a_write(self) -> bool:
        """Whether the kill came while bytes of the SSD file were written, or an index commit was under way."""
        return bool(self.in_flight & {"write", "commit ssd", "commit dram"})

    def __str__(self) -> str:
        done = ", ".join(f"{count} {name}" for name, count in self.done.items())
        return (
            f"round {self.number}: {self.acknowledged} blocks acknowledged, {self.committed} recorded on SSD, {done}, "
            f"{self.by_policy} evicted by policy; "
            f"killed at {self.target!r} during {', '.join(sorted(self.in_flight)) or 'nothing'}; {self.promised} had "
            f"to survive, {self.promised_dram} of them only in DRAM; {self.survived} did"
        )


class CrashStore:
    """A store whose daemon is killed in each round. Create it, call `round` repeatedly, then `remove`."""

    def __init__(self, folder: Path, *, dram_bytes: int, evicts_from_ssd: bool) -> None:
        """`evicts_from_ssd` is for a DRAM tier that holds everything, so that evicted SSD copies are not lost. In any
        other the policy evicts in each round, before its kill.
        """
        folder.mkdir()
        self._daemon = DaemonProcess(
            folder,
            program=("-m", "tests.marked_daemon"),
            dram__capacity_bytes=dram_bytes,
            ssd__capacity_bytes=_SSD_BYTES,
        )
        self._evicts_from_ssd = evicts_from_ssd
        self._ledger: list[Conversation] = []
        self._records: dict[str, Extent] = {}  # Durable ones, as the running daemon found them.
        self._log_path = folder / "marks.log"
        self._start()

    def round(self, number: int, target: str, *, power_cut: bool) -> Report:
        """Work, kill, check, start again, verify. Raises AssertionError if a promise was broken."""
        workload = Workload(self._daemon, self._ledger, seed=number, evicts_from_ssd=self._evicts_from_ssd)
        workload.run(lambda: self._kill(workload, random.Random(number).randrange(40), target))
        replay = Replay([_SSD_BYTES], self._records).follow(read_marks(self._log_path))
        if power_cut:
            shutil.rmtree(self._daemon.arena_folder)
            for talk in self._ledger:
                talk.stored &= talk.on_ssd
        promised = {key for talk in self._ledger for key in talk.keys_of(talk.stored)}
        checked = self._daemon.check()
        assert checked.returncode == 0, f"kvservice check: {checked.stdout}{checked.stderr}"
        self._records = self._recorded()
        on_ssd = {bytes.fromhex(name)[:KEY_BYTES] for name in self._records}
        self._start()
        survived = self._verify(promised)
        return Report(
            number,
            target,
            replay.in_flight,
            workload.acknowledged_count,
            replay.committed_count,
            workload.done,
            workload.evicted_by_policy,
            len(promised),
            len(promised - on_ssd),
            survived,
        )

    def remove(self) -> None:
        self._daemon.remove()
        self._marks.close()  # This also ends the killer.
        self._killer.wait()

    def _start(self) -> None:
        read_fd, write_fd = os.pipe()
        self._marks = open(write_fd, "wb", buffering=0)  # noqa: SIM115  (open until the kill)
        try:
            self._daemon.start(environment={"TEST_MARKS_FD": str(write_fd)}, pass_fds=[write_fd])
            arguments = map(str, (_KILLER, read_fd, self._daemon.process.pid, self._log_path))
            self._killer = subprocess.Popen([sys.executable, "-I", "-S", *arguments], pass_fds=[read_fd])
        finally:
            os.close(read_fd)

    def _kill(self, workload: Workload, skip: int, target: str) -> None:
        workload.wait_for_acknowledged(BLOCKS_MIN)
        with self._daemon.client("status") as client:

            def has_evicted() -> bool:
                asked = workload.done["evicted dram"]
                counters = client.admin.status().counters
                assert not counters["lost_unwritten_blocks"], "the policy lost a block: what must survive is not known"
                workload.evicted_by_policy = max(0, int(counters["evicted_dram_blocks"]) - asked)
                return self._evicts_from_ssd or workload.evicted_by_policy > 0

            until(has_evicted)
        self._marks.write(f"armed {skip} {target}\n".encode())
        self._marks.close()
        assert self._daemon.wait_for_end() == -signal.SIGKILL
        assert self._killer.wait(120.0) == 0

    def _recorded(self) -> dict[str, Extent]:
        index = BlockIndex.open(self._daemon.store / "index", map_bytes=_DURABLE_MAP_BYTES)
        try:
            found = index.load(TierName.SSD)
        finally:
            index.close()
        places = found.records[["segment", "offset_bytes", "size_bytes"]].tolist()
        return {name.hex(): Extent(*place) for name, place in zip(found.keys, places, strict=True)}

    def _verify(self, promised: set[bytes]) -> int:
        """Compare the stored blocks with the ledger. Returns how many are stored."""
        with self._daemon.client("verify") as client:
            found = {block.key: block for block in client.admin.list_blocks()}
            assert not promised - set(found), f"{len(promised - set(found))} acknowledged blocks are lost"
            for talk in self._ledger:
                there = [position for position, key in enumerate(talk.chain) if key in found]
                assert not (there and talk.discarded), "a discarded block is back"
                for first, last in _runs(there):
                    verify(client, talk.layout, talk.chain[first : last + 1])
                in_dram = all(found[key].in_dram for key in talk.keys_of(there))
                talk.stored = set(there)
                talk.on_ssd = {
                    position for position, key in enumerate(talk.chain) if key in found and found[key].on_ssd
                }
                talk.evicted_from = None if in_dram else Tier.DRAM
            assert set(found) <= {key for talk in self._ledger for key in talk.chain}, "a block that no client saved"
            assert client.admin.status().counters["quarantined_blocks"] == 0
            kept = [talk for talk in self._ledger if talk.stored][-_KEPT_CONVERSATIONS:]
            dropped = [key for talk in self._ledger if talk not in kept for key in talk.keys_of(talk.stored)]
            client.admin.discard(dropped)
            self._ledger[:] = kept
        return len(found)


def _runs(positions: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(positions), lambda pair: pair[1] - pair[0]):
        numbers = [position for _, position in run]
        yield numbers[0], numbers[-1]
