"""Bytes, then fdatasync, then the record: read from the marks of a real daemon's file calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvservice.blocks import Extent
from kvservice_client import Durability, Tier
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import LARGE, SMALL, compare, new_chain, save
from tests.marks import OrderBroken, Replay

_PAGE = 4096


class MarkedDaemon:
    """A daemon whose marks are collected while it runs. The test may write marks of its own among them."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.daemon = DaemonProcess(folder, program=("-m", "tests.marked_daemon"), **settings)
        self._chunks: list[bytes] = []

    def __enter__(self) -> MarkedDaemon:
        read_fd, write_fd = os.pipe()
        self._pipe = open(write_fd, "wb", buffering=0)
        self._reader = threading.Thread(target=self._read, args=(read_fd,))
        self._reader.start()
        try:
            self.daemon.start(environment={"TEST_MARKS_FD": str(write_fd)}, pass_fds=[write_fd])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.daemon.remove()
        self._pipe.close()
        self._reader.join()

    def mark(self, word: str) -> None:
        self._pipe.write(f"test {word}\n".encode())

    def stop(self) -> list[str]:
        """End the daemon. Returns all marks."""
        assert self.daemon.stop() == 0
        self._pipe.close()
        self._reader.join()
        return b"".join(self._chunks).decode().splitlines()

    def _read(self, fd: int) -> None:
        while chunk := os.read(fd, 65536):
            self._chunks.append(chunk)
        os.close(fd)


def test_a_save_to_ssd_writes_then_flushes_then_commits_then_answers(tmp_path: Path) -> None:
    chain = new_chain(LARGE, 4)
    with MarkedDaemon(tmp_path) as marked:
        with marked.daemon.client() as client:
            client.open_layout(LARGE).contains(chain)  # Ignore the layout's own commit.
            marked.mark("begun")
            assert save(client, LARGE, chain, Durability.SSD).is_complete
            marked.mark("answered")
        lines = marked.stop()
    part = lines[lines.index("test begun") : lines.index("test answered")]
    writes = [place for place, line in enumerate(part) if " begin write " in line]
    thread_of_sync, sync = next((line.split()[0], at) for at, line in enumerate(part) if " begin sync " in line)
    synced = next(at for at in range(sync, len(part)) if part[at].split() == [thread_of_sync, "end"])
    first_put = next(at for at, line in enumerate(part) if " put " in line)
    commit = next(at for at, line in enumerate(part) if " begin commit ssd" in line)
    assert len(writes) >= 4
    assert writes[0] < sync < synced < first_put < commit
    assert [line for line in part if " begin commit ssd" in line or " end" in line][-1].endswith(" end ")
    replay = Replay([256 * MIB], {}).follow(lines_of_daemon(lines))
    assert replay.committed_count == 4
    assert len(replay.records) == 4


def test_no_record_goes_before_its_bytes_and_no_bytes_over_a_record_while_the_ssd_overflows(tmp_path: Path) -> None:
    """The SSD tier is much smaller than the blocks that three clients save, so its extents are reused many times."""
    with MarkedDaemon(tmp_path, ssd__capacity_bytes=8 * MIB, dram__capacity_bytes=16 * MIB) as marked:
        with ThreadPoolExecutor(3) as threads:
            for done in [threads.submit(overflow, marked.daemon, number) for number in range(3)]:
                done.result()
        with marked.daemon.client() as client:
            evicted = client.admin.status().counters["evicted_ssd_blocks"]
        lines = marked.stop()
    replay = Replay([8 * MIB], {}).follow(lines_of_daemon(lines))
    assert replay.committed_count >= 100
    assert evicted >= 60


def overflow(daemon: DaemonProcess, number: int) -> None:
    layout = (LARGE, LARGE, SMALL)[number]
    with daemon.client() as client:
        for turn in range(30):
            chain = new_chain(layout, 2)
            save(client, layout, chain, Durability.SSD)
            if turn % 5 == 4:
                client.evict(chain, Tier.DRAM)
                with client.open_layout(layout).lookup(chain) as lease:
                    if lease.hit_blocks:
                        compare(lease, layout, chain)
            if turn % 7 == 6:
                client.evict(chain, Tier.SSD)


def lines_of_daemon(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if not line.startswith("test ")]


WRITE = ["1 begin write 0 0 8192", "1 end"]
SYNC = ["2 begin sync 0", "2 end"]
PUT = ["2 put aa 0 0 8192"]
COMMIT = ["2 begin commit ssd", "2 end"]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(WRITE + PUT + COMMIT, id="no flush"),
        pytest.param(WRITE + PUT + COMMIT + SYNC, id="flush after the commit"),
        pytest.param(WRITE[:1] + SYNC + WRITE[1:] + PUT + COMMIT, id="flush during the write"),
        pytest.param(
            WRITE + SYNC[:1] + ["3 put aa 0 0 8192", "3 begin commit ssd", "3 end"], id="commit during the flush"
        ),
        pytest.param([*WRITE[:1], "1 failed", *SYNC, *PUT, *COMMIT], id="failed write"),
        pytest.param([*WRITE, "2 begin sync 0", "2 failed", *PUT, *COMMIT], id="failed flush"),
        pytest.param(["1 begin write 0 0 4096", "1 end", *SYNC, *PUT, *COMMIT], id="half of the bytes"),
        pytest.param(WRITE + SYNC + PUT + COMMIT + WRITE, id="write over a record"),
        pytest.param(WRITE + SYNC + PUT + COMMIT[:1] + WRITE, id="write over a record being committed"),
        pytest.param(
            [*WRITE, *SYNC, *PUT, *COMMIT, "2 delete aa", "2 begin commit ssd", *WRITE],
            id="write before the removal is committed",
        ),
    ],
)
def test_a_wrong_order_of_marks_is_found(lines: list[str]) -> None:
    with pytest.raises(OrderBroken):
        Replay([1 * MIB], {}).follow(lines)


def test_a_right_order_of_marks_is_accepted() -> None:
    again = ["2 delete aa", *COMMIT, *WRITE, *SYNC, *PUT, *COMMIT]
    replay = Replay([1 * MIB], {"bb": Extent(0, 2 * _PAGE, _PAGE)}).follow(WRITE + SYNC + PUT + COMMIT + again)
    assert replay.records == {"aa": Extent(0, 0, 2 * _PAGE), "bb": Extent(0, 2 * _PAGE, _PAGE)}
    assert not replay.in_flight


def test_what_was_begun_and_not_ended_is_in_flight() -> None:
    replay = Replay([1 * MIB], {}).follow([*WRITE[:1], "2 begin commit dram", "3 begin sync 0", "3 end"])
    assert replay.in_flight == {"write", "commit dram"}
