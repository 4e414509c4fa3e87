"""The pod of the manifests, run by hand: the daemon's container, its probes and hook, and an engine's container."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.control_groups import memory_group
from tests.daemon import MIB, until
from tests.manifests import DaemonPod, Document, containers, workloads
from tests.pod import Container, Pod
from tests.process_starter import python_path

pytestmark = pytest.mark.slow

SMALLER = {"KVSERVICE_DRAM__CAPACITY_BYTES": "64MiB", "KVSERVICE_SSD__CAPACITY_BYTES": "256MiB"}
ARENA = "96Mi"
LIMIT_BYTES = 400 * MIB

ENGINE = """
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

TLS_CLIENT = """
import ssl
from urllib.request import urlopen
from kvservice_client import Client, TlsFiles
from tests.integration.known_blocks import LARGE, new_chain, save, verify

folder = "/etc/kvservice/tls"
files = TlsFiles(ca=f"{folder}/ca.crt", certificate=f"{folder}/tls.crt", key=f"{folder}/tls.key")
with Client("localhost:7070", transport="grpc", tls=files, timeout_s=30) as client:
    chain = new_chain(LARGE, 8)
    save(client, LARGE, chain)
    verify(client, LARGE, chain)
context = ssl.create_default_context(cafile=files.ca)
context.load_cert_chain(files.certificate, files.key)
print(urlopen("https://localhost:9464/metrics", context=context).read().decode())
"""


class RunningPod:
    """The daemon's container as the manifest says, with smaller tiers, and an engine that has its arena only."""

    def __init__(self, overlay: str, pod: Pod, daemon: DaemonPod, processes: Path) -> None:
        self._pod, self._daemon, self._processes = pod, daemon, processes
        self._engines = [each for pod in workloads(overlay) for each in containers(pod["spec"]["template"]["spec"])]

    def start(self) -> Container:
        """Returns when the startup probe is answered."""
        started = self._pod.start(
            self._daemon.container, ["kvservice", "serve"], self._environment, joined=self._processes
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
            [sys.executable, "-c", ENGINE, address, task],
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
def running_pod(overlay: str, folder: Path) -> Iterator[RunningPod]:
    daemon = DaemonPod(overlay)
    daemon.environment |= SMALLER
    volumes: dict[str, Document] = copy.deepcopy({name: daemon.volumes[name] for name in daemon.mounts.values()})
    if "emptyDir" in volumes["arena"]:
        volumes["arena"]["emptyDir"]["sizeLimit"] = ARENA
    authority = Authority()
    server = authority.issue()
    files = {"tls.crt": server.certificate, "tls.key": server.key, "ca.crt": authority.certificate}
    with ExitStack() as opened:
        group = opened.enter_context(memory_group(LIMIT_BYTES))
        pod = opened.enter_context(Pod(daemon.spec, volumes, folder, {"kvservice-tls": files}))
        yield RunningPod(overlay, pod, daemon, group.limit_file.parent / "cgroup.procs")


@pytest.mark.parametrize("overlay", ["vllm-sidecar", "node-shared-memory"])
def test_an_engine_gets_its_tokens_back_over_shared_memory_from_a_pod_of_the_manifest(
    tmp_path: Path, overlay: str
) -> None:
    with running_pod(overlay, tmp_path) as pod:
        daemon = pod.start()
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert "\nUid:\t10001\t10001\t10001\t10001\n" in status
        assert "\nCapEff:\t0000000000000000\n" in status
        root = next(line for line in Path(f"/proc/{daemon.pid}/mounts").read_text().splitlines() if " / " in line)
        assert root.split()[3].split(",")[0] == "ro"
        for task in ("save", "load"):
            assert {tiers.partition("+")[0] for tiers in pod.engine(task).split()} == {"dram"}
        assert pod.probe(daemon, "livenessProbe") == 0

        if "lifecycle" in (container := DaemonPod(overlay).container):  # A sidecar writes after SIGTERM instead.
            hook = daemon.run(container["lifecycle"]["preStop"]["exec"]["command"])
            assert hook.returncode == 0, hook.stderr
            assert pod.probe(daemon, "livenessProbe") == 0, "a daemon that drains is alive"
            assert pod.probe(daemon, "startupProbe") == 1
            assert set(pod.engine("load").split()) == {"dram+ssd"}
        end(daemon)

        again = pod.start()  # The container only: the pod still has its arena.
        assert set(pod.engine("load").split()) == {"dram+ssd"}
        end(again)

    with running_pod(overlay, tmp_path) as pod:  # A new pod with the same claim.
        daemon = pod.start()
        assert "ssd" in pod.engine("load")
        end(daemon)


def test_the_daemon_of_a_node_serves_clients_and_prometheus_over_tls_and_fails_its_probe_when_stuck(
    tmp_path: Path,
) -> None:
    with running_pod("node", tmp_path) as pod:
        daemon = pod.start()
        client = daemon.run([sys.executable, "-c", TLS_CLIENT], more={"PYTHONPATH": python_path()})
        assert client.returncode == 0, client.stderr
        assert "kvservice_blocks 8.0" in client.stdout

        pid = daemon.pid
        os.kill(pid, signal.SIGSTOP)
        assert pod.probe(daemon, "livenessProbe") != 0
        os.kill(pid, signal.SIGCONT)
        assert pod.probe(daemon, "livenessProbe") == 0
        end(daemon)


def end(container: Container) -> None:
    """As kubelet ends a container."""
    os.kill(container.pid, signal.SIGTERM)
    log, _ = container.process.communicate(timeout=60)
    assert container.process.returncode == 0, log
    assert '"stopped"' in log
    assert "smaller" not in log
    assert "is on a disk" not in log
