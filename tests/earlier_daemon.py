"""The daemon of commit 39a1547, which knows schemas up to 3: the contents of ``tests/data/daemon-39a1547.tar.xz``.

Tests run it on stores of the daemon of today, as an operator does who goes back. How the archive was made::

    git archive 39a1547 LICENSE kvservice proto/kvservice_api ':!kvservice/simulate' ':!*.pyi' ':!*.proto' \
        | xz -9 > tests/data/daemon-39a1547.tar.xz
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

from tests.daemon import DaemonProcess
from tests.process_starter import python_path

ARCHIVE = Path(__file__).parent / "data" / "daemon-39a1547.tar.xz"
SCHEMA = 3


def unpack(folder: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


class TwoVersions(DaemonProcess):
    """A daemon process of today or of the earlier commit, which is unpacked in `code`, on the same store and arena."""

    def __init__(self, folder: Path, code: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self._code = code

    def launch_version(self, *, earlier: bool) -> None:
        # With -P Python looks for the daemon on PYTHONPATH only, and not in the current folder.
        self.program = ("-P", "-m", "kvservice") if earlier else ("-m", "kvservice")
        path = os.pathsep.join(map(str, (self._code, self._code / "proto"))) if earlier else python_path()
        self.launch(environment={"PYTHONPATH": path})

    def start_version(self, *, earlier: bool) -> None:
        """Returns once it serves."""
        self.launch_version(earlier=earlier)
        self.port = self.wait_for_log("serving")["port"]
