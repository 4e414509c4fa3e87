"""The image without Docker: runs the Dockerfile's own lines on folders of the test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import until
from tests.dockerfile import ROOT, stages

pytestmark = pytest.mark.slow

_, BUILD, IMAGE = stages()


class Built:
    """The result of the first stage, with the image's folders moved below `root`."""

    def __init__(self, root: Path, arena: Path) -> None:
        self._moved = {
            "/wheels": str(root / "wheels"),
            "/opt/kvservice": str(root / "opt"),
            "/var/lib/kvservice": str(root / "store"),
            "/run/kvservice": str(arena),
        }
        self._source = root / "src"
        self._source.mkdir()
        for copy in BUILD.all("COPY"):
            *sources, target = copy.words
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, self._source / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, self._source / target)
        self._python = root / "python"  # The base image's interpreter.
        subprocess.run([sys.executable, "-m", "venv", self._python], check=True)
        subprocess.run([self._python / "bin" / "pip", "install", "-q", "pip>=23.3"], check=True)
        (root / "store").mkdir()

    def build(self) -> None:
        path = f"{self._python / 'bin'}{os.pathsep}{os.environ['PATH']}"
        for run in BUILD.all("RUN"):
            environment = {**_outer_environment(), **BUILD.environment, "PATH": path}
            subprocess.run(self.moved(run.value), shell=True, check=True, cwd=self._source, env=environment)

    def moved(self, text: str) -> str:
        for there, here in self._moved.items():
            text = text.replace(there, here)
        return text

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": self.moved(IMAGE.environment["PATH"]).replace("$PATH", os.environ["PATH"]),
            **{name: self.moved(value) for name, value in IMAGE.environment.items() if name != "PATH"},
        }


def _outer_environment() -> dict[str, str]:
    """Our environment without the variables by which the build would find this working tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    arena = Path(tempfile.mkdtemp(prefix="kvservice-test-", dir="/dev/shm"))
    try:
        built = Built(tmp_path_factory.mktemp("image"), arena)
        built.build()
        yield built
    finally:
        shutil.rmtree(arena)


def test_the_image_has_no_torch_and_no_pip(built: Built) -> None:
    for absent in ("torch", "pip", "kvservice_adapter.connectors.transformers"):
        program = f"import {absent}"
        done = subprocess.run(
            [built.moved("/opt/kvservice/bin/python"), "-c", program], env=_outer_environment(), capture_output=True
        )
        assert done.returncode == 1, absent


def test_the_daemon_starts_becomes_healthy_and_drains_when_stopped(built: Built) -> None:
    environment = {**_outer_environment(), **built.environment}
    environment |= {"KVSERVICE_SSD__CAPACITY_BYTES": "64MiB", "KVSERVICE_DRAM__CAPACITY_BYTES": "64MiB"}
    environment |= {"KVSERVICE_SERVER__ADDRESS": "127.0.0.1:0", "KVSERVICE_SERVER__METRICS_ADDRESS": ""}

    def health() -> int:
        words = IMAGE.only("HEALTHCHECK").words
        return subprocess.run(_found(words, environment), env=environment, capture_output=True, timeout=60).returncode

    assert health() == 1
    command = _found(IMAGE.only("ENTRYPOINT").words + IMAGE.only("CMD").words, environment)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            until(lambda: health() == 0, timeout_s=60)
            daemon.send_signal(signal.Signals[IMAGE.only("STOPSIGNAL").value])
            _, log = daemon.communicate(timeout=60)
        finally:
            daemon.kill()
    assert daemon.returncode == 0, log
    assert '"event": "draining"' in log
    assert "is on a disk" not in log
    assert health() == 1


def _found(words: list[str], environment: dict[str, str]) -> list[str]:
    program = shutil.which(words[0], path=environment["PATH"])
    assert program, words[0]
    return [program, *words[1:]]
