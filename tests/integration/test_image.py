"""The image, built with buildah, and run in a pod of the manifests. Needs root, buildah, debootstrap and packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.dockerfile import stages
from tests.manifests import DaemonPod
from tests.running_pod import end, running_pod
from tools.build_image import build
from tools.image_contents import Image

pytestmark = pytest.mark.slow

IMAGE = stages()[-1]


class Built(NamedTuple):
    image: Image
    software: Path
    root: Path  # The image's root file system, unpacked.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if os.geteuid() != 0:
        pytest.skip("an image's files belong to several users, which takes root")
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("image")
    image, software = build(folder)
    root = folder / "root"
    root.mkdir(mode=0o755)
    with tarfile.open(image.archive) as archive:
        for layer in image.layers:
            archive.extract(layer, folder, filter="data")
            subprocess.run(["tar", "-C", root, "--numeric-owner", "-xf", folder / layer], check=True)
    return Built(image, software, root)


def test_it_runs_in_a_pod_of_the_manifest_keeps_tokens_and_drains(built: Built, tmp_path: Path) -> None:
    with running_pod("vllm-sidecar", tmp_path, built.root) as pod:
        daemon = pod.start()
        assert Path(f"/proc/{daemon.pid}/exe").readlink().match("pod/root-0/usr/bin/python3*"), "the image's own"
        for task in ("save", "load"):
            assert {tiers.partition("+")[0] for tiers in pod.engine(task).split()} == {"dram"}
        assert daemon.run(built.image.config["config"]["Healthcheck"]["Test"][1:]).returncode == 0
        assert pod.probe(daemon, "livenessProbe") == 0
        start_s = time.monotonic()
        end(daemon)
        assert time.monotonic() - start_s < DaemonPod("vllm-sidecar").spec["terminationGracePeriodSeconds"]

    with running_pod("vllm-sidecar", tmp_path, built.root) as pod:  # A new pod with the same claim.
        daemon = pod.start()
        assert set(pod.engine("load").split()) == {"dram+ssd"}
        end(daemon)


def test_its_configuration_is_that_of_the_dockerfile(built: Built) -> None:
    config = built.image.config["config"]

    given = dict(pair.split("=", 1) for pair in config["Env"])
    expected = {name: value.replace("$PATH", "") for name, value in IMAGE.environment.items()}
    assert given.pop("PATH").startswith(expected.pop("PATH"))
    assert given == expected
    assert config["User"] == IMAGE.only("USER").value
    assert config["Entrypoint"] + config["Cmd"] == IMAGE.only("ENTRYPOINT").words + IMAGE.only("CMD").words
    assert set(config["Volumes"]) == set(IMAGE.only("VOLUME").words)
    assert config["StopSignal"] == IMAGE.only("STOPSIGNAL").value


def test_it_has_the_extension_no_torch_no_pip_of_its_own_and_nothing_of_the_host_that_built_it(built: Built) -> None:
    (packages,) = built.root.glob("opt/kvservice/lib/python*/site-packages")
    names = {each.name for each in packages.iterdir()}

    assert {"kvservice", "opentelemetry"} <= names
    assert not names & {"torch", "pip", "transformers"}
    assert (packages / "kvservice_api" / "_copying.abi3.so").exists()
    assert not list(built.root.glob("usr/bin/*gcc*")), "the compiler is of the stage that builds"
    for path in ("etc/pip.conf", "etc/xdg/pip", "root/.cache", "src", "wheels"):
        assert not (built.root / path).exists(), path
    for path in ("etc/hostname", "etc/hosts", "etc/resolv.conf"):  # buildah leaves empty ones.
        assert not (built.root / path).exists() or not (built.root / path).read_bytes()
    own = list(Path("/usr/local/share/ca-certificates").rglob("*.crt"))
    bundle = (built.root / "etc/ssl/certs/ca-certificates.crt").read_text()
    assert not [each for each in own if each.read_text().strip() in bundle]
    assert all((each.lstat().st_uid, each.lstat().st_gid) == (0, 0) for each in (built.root / "opt").rglob("*"))


def test_the_list_of_its_software_is_valid_and_has_its_packages_with_their_versions(built: Built) -> None:
    text = built.software.read_text()
    components = {each["purl"].partition("@")[0]: each["version"] for each in json.loads(text)["components"]}

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    for package in ("grpcio", "kvservice", "lmdb", "numpy", "typer"):
        assert f"pkg:pypi/{package}" in components
    assert {"pkg:deb/debian/libc6", "pkg:generic/python"} <= components.keys()
    assert "pkg:pypi/hatchling" not in components, "it is needed to build only"
