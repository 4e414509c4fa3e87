"""Records which files of some packages run code: in this process with `FilesRun`, in a daemon with `FilesRunInDaemon`.

python -m tests.files_run        prints the files of one save and of one load over gRPC, client and daemon
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

PACKAGES = ("kvservice", "kvservice_api", "kvservice_client")
_IN, _OUT = "TEST_FILES_RUN_IN", "TEST_FILES_RUN_OUT"


class FilesRun:
    """Notes each file whose code runs, in all threads that begin after `start` and in the one that called it."""

    def __init__(self, packages: Sequence[str] = PACKAGES) -> None:
        self._packages = packages
        self._files: set[str] = set()

    def start(self) -> None:
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def take(self) -> set[str]:
        """The files since the last call, as package/path."""
        files, self._files = self._files, set()
        return {name for file in files if (name := self._name(file))}

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            self._files.add(frame.f_code.co_filename)

    def _name(self, file: str) -> str | None:
        """Generated code does not count: it is not code that a reader of the project reads."""
        parts = Path(file).parts
        starts = [at for at, part in enumerate(parts) if part in self._packages]
        return None if not starts or "v1" in parts else "/".join(parts[starts[-1] :])


class FilesRunInDaemon:
    """The same for a daemon whose program is this file and whose environment has `environment`."""

    def __init__(self, folder: Path) -> None:
        self._in, self._out = folder / "in", folder / "out"
        os.mkfifo(self._in)
        os.mkfifo(self._out)
        self.environment = {_IN: str(self._in), _OUT: str(self._out)}

    def take(self) -> set[str]:
        """The files since the last call. Blocks until the daemon answers."""
        self._in.write_text("take")
        return set(self._out.read_text().split())


def _daemon() -> int:
    from kvservice.__main__ import main

    run = FilesRun(PACKAGES)

    def answer() -> None:
        while True:
            Path(os.environ[_IN]).read_text()
            Path(os.environ[_OUT]).write_text("\n".join(sorted(run.take())))

    threading.Thread(target=answer, name="files-run", daemon=True).start()
    run.start()
    return main()


def save_and_load() -> dict[str, set[str]]:
    """The files of one save of one block and of one load, over gRPC, in client and daemon together."""
    from tests.daemon import DaemonProcess
    from tests.integration.known_blocks import SMALL, layers_of, new_chain

    with tempfile.TemporaryDirectory() as folder:
        in_daemon, in_client = FilesRunInDaemon(Path(folder)), FilesRun()
        daemon = DaemonProcess(Path(folder) / "store", program=("-m", "tests.files_run"))
        try:
            daemon.start(environment=in_daemon.environment)
            with daemon.client(transport="grpc") as client:
                blocks = client.open_layout(SMALL)
                blocks.save(warm := new_chain(SMALL), layers_of(SMALL, warm))  # Connects, attaches, opens the layout.
                chain = new_chain(SMALL)
                layers = layers_of(SMALL, chain)
                in_daemon.take()
                in_client.start()
                blocks.save(chain, layers)
                saved = in_client.take() | in_daemon.take()
                with blocks.lookup(chain) as lease:
                    in_client.take()
                    in_daemon.take()
                    list(lease.load())
                    loaded = in_client.take() | in_daemon.take()
                in_client.stop()
        finally:
            daemon.__exit__(None, None, None)
    return {"save": saved, "load": loaded}


if __name__ == "__main__":
    if _IN in os.environ:
        sys.exit(_daemon())
    for operation, files in save_and_load().items():
        print(f"{operation}: {len(files)} files", *sorted(files), sep="\n  ")
