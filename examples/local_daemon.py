"""Gives an example its daemon: the one whose address it was called with, or a small one of its own."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from kvservice_client import Client, KVError

_START_TIMEOUT_S, _STOP_TIMEOUT_S = 30.0, 10.0
_MIB = 2**20


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the argument that all examples have."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.add_argument("address", nargs="?", default="", help="of a daemon (default: start one for this program)")
    return parser


@contextmanager
def daemon(address: str) -> Iterator[str]:
    """Yield `address`, or if it is empty the address of a new daemon, which ends with the block.

    Blocks until the daemon answers. Ends the program with a message if it does not: within 5 s where it runs already,
    within 30 s where it was started here.
    """
    if address:
        try:
            with Client(address, name="example", timeout_s=5.0) as client:
                client.capabilities()
        except KVError as error:
            raise SystemExit(
                f"{error.message}\nStart a daemon with `kvservice serve --store.path FOLDER`, or give no address."
            ) from error
        yield address
        return
    with tempfile.TemporaryDirectory(prefix="kvservice-example-") as name:
        folder = Path(name)
        # On a host of your own, leave `dram.path` out: the default is /dev/shm.
        with LocalDaemon(folder, dram_folder=folder, dram_bytes=256 * _MIB, ssd_bytes=256 * _MIB) as started:
            yield started.address


class LocalDaemon:
    """`kvservice serve` as a child process, on a UNIX socket. The end of the block stops it."""

    def __init__(self, folder: Path, *, dram_folder: Path, dram_bytes: int, ssd_bytes: int) -> None:
        """The store is in `folder`. Blocks until the daemon answers. If it does not, ends the program."""
        self.address = str(folder / "kvservice.sock")
        settings = {
            "store.path": folder / "store",
            "dram.path": dram_folder,
            "dram.capacity_bytes": dram_bytes,
            "ssd.capacity_bytes": ssd_bytes,
            "server.address": "127.0.0.1:0",
            "server.unix_socket": self.address,
            "server.metrics_address": "",
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        self._log = folder / "daemon.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "kvservice", "serve", *flags], stderr=log)
        try:
            self._wait_until_it_serves()
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Send SIGTERM; send SIGKILL if the daemon does not end in time."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _wait_until_it_serves(self) -> None:
        give_up_s = time.monotonic() + _START_TIMEOUT_S
        with Client(self.address, name="example", timeout_s=1.0) as client:
            while True:
                try:
                    client.capabilities()
                    return
                except KVError as error:
                    if self._process.poll() is not None or time.monotonic() > give_up_s:
                        lines = "\n".join(self._log.read_text(errors="replace").strip().splitlines()[-5:])
                        raise SystemExit(f"the daemon did not start: {error.message}\n{lines}") from error
                time.sleep(0.02)  # The daemon reports its start to nothing that a program could wait for.
