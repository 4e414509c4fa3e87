"""Blocks that were acknowledged as durable survive the loss of all bytes that were not flushed to the disk."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from kvservice_client import BlockChain, Durability, KVError
from tests.daemon import MIB, DaemonProcess
from tests.integration.known_blocks import LARGE, SMALL, new_chain, save, verify
from tests.mounts import disk

_LAYOUTS = (LARGE, SMALL)


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_every_block_acknowledged_on_ssd_survives_a_disk_that_loses_what_was_not_flushed(
    tmp_path: Path, direct: str
) -> None:
    """A power cut is simulated by a file system that fails in the middle of saves."""
    acknowledged: list[tuple[int, BlockChain]] = []
    with disk(tmp_path, 160 * MIB) as drive:
        daemon = DaemonProcess(drive.path, ssd__capacity_bytes=96 * MIB, ssd__direct=direct)
        try:
            daemon.start()
            enough, cut_off = threading.Event(), threading.Event()
            workers = [
                threading.Thread(target=save_until, args=(cut_off, daemon, number, acknowledged, enough))
                for number in range(2)
            ]
            for worker in workers:
                worker.start()
            assert enough.wait(120.0), "saves take too long"
            drive.cut_off()
            cut_off.set()
            for worker in workers:
                worker.join()
            daemon.kill()
            shutil.rmtree(daemon.arena_folder)
            drive.unmount()
            drive.mount()
            checked = daemon.check()
            assert checked.returncode == 0, checked.stdout + checked.stderr
            daemon.start()
            with daemon.client() as client:
                for number, chain in acknowledged:
                    verify(client, _LAYOUTS[number], chain)
            print(f"{sum(len(chain) for _, chain in acknowledged)} acknowledged blocks survived")
        finally:
            daemon.remove()


def save_until(
    over: threading.Event,
    daemon: DaemonProcess,
    number: int,
    acknowledged: list[tuple[int, BlockChain]],
    enough: threading.Event,
) -> None:
    layout = _LAYOUTS[number]
    with daemon.client() as client:
        while not over.is_set():
            chain = new_chain(layout, 4)
            try:
                result = save(client, layout, chain, Durability.SSD)
            except KVError:
                return
            if not result.is_complete:
                return
            acknowledged.append((number, chain))
            if len(acknowledged) >= 30:
                enough.set()
