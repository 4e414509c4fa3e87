"""A pod of the manifests that runs by hand, with the daemon's container, and engines that have its arena only."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.certificates import Authority
from tests.control_groups import memory_group
from tests.daemon import MIB, until
from tests.manifests import DaemonPod, Document, containers, workloads
from tests.pod import Container, Pod
from tests.process_starter import python_path

_SMALLER = {"KVSERVICE_DRAM__CAPACITY_BYTES": "64MiB", "KVSERVICE_SSD__CAPACITY_BYTES": "256MiB"}
_ARENA = "96Mi"
_LIMIT_BYTES = 400 * MIB

_ENGINE = """
import sys
from kvservice_client import Client
from tests.integration.known_blocks import LARGE, new_chain, save, tiers_of, verify

with Client(sys.argv[1], transport="shm", timeout_s=30) as client:
    chain = new_chain(LARGE, 8, salt="pod")
    if sys.argv[2] == "save":
        assert save(client, LARGE, chain).stored == 8
    verify(client, LARGE, chain)
    print(*tiers_of(client, LARGE, chain))
"""


class RunningPod:
    """The daemon's container as the manifest says, with smaller tiers, and an engine that has its arena only."""

    def __init__(self, overlay: str, pod: Pod, daemon: DaemonPod, processes: Path, image: Path | None) -> None:
        self._pod, self._daemon, self._processes, self._image = pod, daemon, processes, image
        self._engines = [each for pod in workloads(overlay) for each in containers(pod["spec"]["template"]["spec"])]

    def start(self) -> Container:
        """Returns when the startup probe is answered."""
        started = self._pod.start(
            self._daemon.container,
            ["kvservice", "serve"],
            self._environment,
            joined=self._processes,
            image=self._image,
        )
        until(lambda: started.has_ended() or self.probe(started, "startupProbe") == 0)
        assert not started.has_ended(), started.process.communicate()[0]
        return started

    def probe(self, container: Container, name: str) -> int:
        probe = self._daemon.container[name]
        return container.run(probe["exec"]["command"], timeout_s=probe["timeoutSeconds"] * 4).returncode

    def engine(self, task: str) -> str:
        """Save or load by shared memory, in a container of its own. Returns the tiers of the blocks."""
        (engine,) = [each for each in self._engines if each["name"] == "vllm"]
        container = {**engine, "volumeMounts": [each for each in engine["volumeMounts"] if each["name"] == "arena"]}
        address = str(self._daemon.settings.unix_socket_path)
        process = self._pod.start(
            container,
            [sys.executable, "-c", _ENGINE, address, task],
            {"PYTHONPATH": python_path(), "HOME": "/nowhere"},
        ).process
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return output.strip()

    @property
    def _environment(self) -> dict[str, str]:
        path = f"{self._daemon.environment['PATH'].replace('$PATH', '/usr/bin:/bin')}"
        return {**self._daemon.environment, "PATH": path}


@contextmanager
def running_pod(overlay: str, folder: Path, image: Path | None = None) -> Iterator[RunningPod]:
    """`image` is the root file system of the daemon's container, instead of the host's with this checkout."""
    daemon = DaemonPod(overlay)
    daemon.environment |= _SMALLER
    volumes: dict[str, Document] = copy.deepcopy({name: daemon.volumes[name] for name in daemon.mounts.values()})
    if "emptyDir" in volumes["arena"]:
        volumes["arena"]["emptyDir"]["sizeLimit"] = _ARENA
    authority = Authority()
    server = authority.issue()
    files = {"tls.crt": server.certificate, "tls.key": server.key, "ca.crt": authority.certificate}
    with ExitStack() as opened:
        group = opened.enter_context(memory_group(_LIMIT_BYTES))
        pod = opened.enter_context(Pod(daemon.spec, volumes, folder, {"kvservice-tls": files}))
        yield RunningPod(overlay, pod, daemon, group.limit_file.parent / "cgroup.procs", image)


def end(container: Container) -> None:
    """As kubelet ends a container."""
    os.kill(container.pid, signal.SIGTERM)
    log, _ = container.process.communicate(timeout=60)
    assert container.process.returncode == 0, log
    assert '"stopped"' in log
    assert "smaller" not in log
    assert "is on a disk" not in log
