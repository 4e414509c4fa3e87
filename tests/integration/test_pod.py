"""The pod of the manifests, run by hand: the daemon's container, its probes and hook, and an engine's container."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.manifests import DaemonPod
from tests.process_starter import python_path
from tests.running_pod import end, running_pod

pytestmark = pytest.mark.slow

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
