"""Which files of some packages run code for a request: here with `FilesRun`, in a daemon with `FilesRunInDaemon`.

python -m tests.files_run        prints the files of one save and of two loads over gRPC, client and daemon
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

PACKAGES = ("kvservice", "kvservice_api", "kvservice_client")
_IN, _OUT = "TEST_FILES_RUN_IN", "TEST_FILES_RUN_OUT"
_IDLE_S = 3.0  # Longer than the period of every loop that an idle daemon runs often.


class FilesRun:
    """Notes each call of the packages' code, in all threads that begin after `start` and in the one that called it.

    A call counts for the outermost function of the packages on its stack, the *root*: the handler of an RPC, or a
    background loop. So the calls for a request are separate from those of loops that run without one.
    """

    def __init__(self, packages: Sequence[str] = PACKAGES) -> None:
        self._packages = packages
        self._files: dict[str, str | None] = {}  # The name of each file, None for those that do not count.
        self._calls: set[tuple[str, str]] = set()

    def start(self) -> None:
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def take(self) -> set[tuple[str, str]]:
        """What was called since the last call: pairs of a file, as package/path, and the root that it ran for."""
        calls, self._calls = self._calls, set()
        return calls

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or (name := self._name(frame)) is None:
            return
        root = ""
        each: FrameType | None = frame
        while each is not None and not _is_event_loop(each):
            if (file := self._name(each)) is not None:
                root = f"{file}:{each.f_code.co_qualname}"
            each = each.f_back
        self._calls.add((name, root))

    def _name(self, frame: FrameType) -> str | None:
        """Generated code does not count: it is not code that a reader of the project reads."""
        file = frame.f_code.co_filename
        if file not in self._files:
            parts = Path(file).parts
            starts = [at for at, part in enumerate(parts) if part in self._packages]
            self._files[file] = None if not starts or "v1" in parts else "/".join(parts[starts[-1] :])
        return self._files[file]


def _is_event_loop(frame: FrameType) -> bool:
    """Whether the frame runs the event loop. The frames below it on the stack started the loop, and are not callers."""
    return frame.f_code.co_filename.endswith("asyncio/runners.py")


class FilesRunInDaemon:
    """The same for a daemon whose program is this file and whose environment has `environment`."""

    def __init__(self, folder: Path) -> None:
        self._in, self._out = folder / "in", folder / "out"
        os.mkfifo(self._in)
        os.mkfifo(self._out)
        self.environment = {_IN: str(self._in), _OUT: str(self._out)}

    def take(self) -> set[tuple[str, str]]:
        """What was called since the last call. Blocks until the daemon answers."""
        self._in.write_text("take")
        return {(file, root) for line in self._out.read_text().splitlines() for file, root in [line.split("\t")]}


def _daemon() -> int:
    from kvservice.__main__ import main

    run = FilesRun(PACKAGES)

    def answer() -> None:
        while True:
            Path(os.environ[_IN]).read_text()
            Path(os.environ[_OUT]).write_text("\n".join(f"{file}\t{root}" for file, root in sorted(run.take())))

    threading.Thread(target=answer, name="files-run", daemon=True).start()
    run.start()
    return main()


def save_and_loads() -> dict[str, set[str]]:
    """The files that run for one save of one block, up to its copy on SSD, and for its loads from DRAM and from SSD.

    All over gRPC, in client and daemon together. Calls whose root also runs in an idle daemon do not count, and
    no files that run only once if the same is done twice: those of background work that happened to come then.
    """
    from kvservice_client import Durability
    from tests.daemon import DaemonProcess
    from tests.integration.known_blocks import SMALL, layers_of, new_chain

    with tempfile.TemporaryDirectory() as folder:
        in_daemon, in_client = FilesRunInDaemon(Path(folder)), FilesRun()
        daemon = DaemonProcess(Path(folder) / "store", program=("-m", "tests.files_run"))
        calls: dict[str, list[set[tuple[str, str]]]] = defaultdict(list)
        try:
            daemon.start(environment=in_daemon.environment)
            with daemon.client(transport="grpc") as client:
                blocks = client.open_layout(SMALL)
                warm = new_chain(SMALL)
                blocks.save(warm, layers_of(SMALL, warm), Durability.SSD)  # Connects, attaches, opens the layout.
                in_daemon.take()
                time.sleep(_IDLE_S)  # What runs in an idle daemon is found by its being idle.
                idle = {root for _, root in in_daemon.take()}
                for chain in (new_chain(SMALL), new_chain(SMALL)):
                    layers = layers_of(SMALL, chain)
                    in_daemon.take()
                    in_client.start()
                    blocks.save(chain, layers, Durability.SSD)
                    calls["save"].append(in_client.take() | in_daemon.take())
                    for tier in ("DRAM", "SSD"):
                        if tier == "SSD":
                            assert client.evict(chain, "dram").evicted == 1
                        with blocks.lookup(chain) as lease:
                            in_client.take()
                            in_daemon.take()
                            list(lease.load())
                            calls[f"load from {tier}"].append(in_client.take() | in_daemon.take())
                    in_client.stop()
        finally:
            daemon.__exit__(None, None, None)
    return {
        name: set.intersection(*({file for file, root in pairs if root not in idle} for pairs in found))
        for name, found in calls.items()
    }


if __name__ == "__main__":
    if _IN in os.environ:
        sys.exit(_daemon())
    argparse.ArgumentParser(prog="python -m tests.files_run", description=__doc__).parse_args()
    for operation, files in save_and_loads().items():
        client_files = sum(file.startswith("kvservice_client") for file in files)
        print(f"{operation}: {len(files)} files, {client_files} of the client", *sorted(files), sep="\n  ")
