"""Gives an example its daemon: the one whose address it was called with, or a small one of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvservice_client import Client, KVError

_START_TIMEOUT_S = 30.0


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
            raise SystemExit(f"{error.message}\nStart a daemon with `kvservice serve`, or give no address.") from error
        yield address
        return
    with tempfile.TemporaryDirectory(prefix="kvservice-example-") as folder:
        socket = str(Path(folder) / "kvservice.sock")
        settings = {
            "store.path": f"{folder}/store",
            "dram.path": folder,  # On a host of your own, leave it out: the default is /dev/shm.
            "dram.capacity_bytes": "256MiB",
            "ssd.capacity_bytes": "256MiB",
            "server.address": "127.0.0.1:0",
            "server.unix_socket": socket,
            "server.metrics_address": "",
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "kvservice", "serve", *flags]
        with (Path(folder) / "log").open("w+") as log, subprocess.Popen(command, stderr=log) as process:
            try:
                _wait_until_it_serves(process, socket, Path(log.name))
                yield socket
            finally:
                process.terminate()


def _wait_until_it_serves(process: subprocess.Popen[bytes], socket: str, log: Path) -> None:
    give_up_s = time.monotonic() + _START_TIMEOUT_S
    with Client(socket, name="example", timeout_s=1.0) as client:
        while True:
            try:
                client.capabilities()
                return
            except KVError as error:
                if process.poll() is not None or time.monotonic() > give_up_s:
                    raise SystemExit(f"the daemon did not start: {log.read_text()}") from error
            time.sleep(0.02)
