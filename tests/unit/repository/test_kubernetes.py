"""ops/kubernetes: every overlay is rendered by kubectl and checked against schemas, settings and the image."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvservice import __version__
from kvservice.host_limits import reserve_bytes
from kvservice_api.address import parse_listen_address
from tests.dockerfile import ROOT
from tests.manifests import (
    IMAGE,
    KUBERNETES,
    OVERLAYS,
    DaemonPod,
    Document,
    containers,
    mounts,
    of_kind,
    rendered,
    size_bytes,
    workloads,
)

VERSIONS = ["1.29", "1.33", "1.37"]  # 1.29 is the first with sidecars.
RESTRICTED = ["node", "vllm-sidecar"]
WITH_VLLM = ["node-shared-memory", "vllm-sidecar"]

# What a pod may have at the level "restricted", beside a security context (Kubernetes' Pod Security Standards).
VOLUME_KINDS = set("configMap csi downwardAPI emptyDir ephemeral persistentVolumeClaim projected secret".split())

# The fields that the manifests may use, of cert-manager 1.11 and Prometheus Operator 0.60 and later.
CUSTOM_FIELDS = {
    "Issuer": {"selfSigned", "ca"},
    "Certificate": set(
        "isCA commonName secretName duration renewBefore privateKey usages dnsNames ipAddresses issuerRef".split()
    ),
    "ServiceMonitor": {"selector", "endpoints"},
    "PrometheusRule": {"groups"},
}


def not_restricted(pod: Document) -> set[str]:
    """The fields of a pod that the level "restricted" does not allow."""
    wrong = {name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)}
    wrong |= {f"volumes/{kind}" for each in pod.get("volumes", []) for kind in each.keys() - VOLUME_KINDS - {"name"}}
    outer = pod.get("securityContext", {})
    for container in containers(pod):
        inner = container.get("securityContext", {})
        context = {**outer, **inner}
        has = {
            "privileged": not inner.get("privileged"),
            "allowPrivilegeEscalation": inner.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": context.get("runAsNonRoot") is True,
            "runAsUser": context.get("runAsUser") != 0,
            "seccompProfile": context.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities/drop": "ALL" in inner.get("capabilities", {}).get("drop", []),
            "capabilities/add": set(inner.get("capabilities", {}).get("add", [])) <= {"NET_BIND_SERVICE"},
            "procMount": inner.get("procMount", "Default") == "Default",
            "sysctls": not outer.get("sysctls"),
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
        }
        wrong |= {name for name, is_allowed in has.items() if not is_allowed}
    return wrong


def matches(selector: Document, labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    rendered(request.param)  # Skips the test where it cannot be.
    return str(request.param)


@pytest.fixture
def daemon(overlay: str) -> DaemonPod:
    return DaemonPod(overlay)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_for_kubernetes(overlay: str, version: str) -> None:
    kubernetes_validate: Any = pytest.importorskip("kubernetes_validate")
    for document in rendered(overlay):
        if document["kind"] in CUSTOM_FIELDS:
            assert set(document["spec"]) <= CUSTOM_FIELDS[document["kind"]]
        else:
            kubernetes_validate.validate(document, version, strict=True)


def test_an_object_with_an_unknown_field_is_found(overlay: str) -> None:
    kubernetes_validate: Any = pytest.importorskip("kubernetes_validate")
    workload = copy.deepcopy(workloads(overlay)[0])
    workload["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1

    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(workload, VERSIONS[-1], strict=True)


def test_pods_have_the_security_level_that_their_namespace_demands(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    wrong = set().union(*(not_restricted(each["spec"]["template"]["spec"]) for each in workloads(overlay)))

    assert (level, wrong) == (("restricted", set()) if overlay in RESTRICTED else ("privileged", {"volumes/hostPath"}))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda pod: pod.update(hostIPC=True), "hostIPC"),
        (lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "volumes/hostPath"),
        (lambda pod: pod.pop("securityContext"), "runAsNonRoot"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccompProfile"),
        (lambda pod: pod["securityContext"].update(runAsUser=0), "runAsUser"),
        (lambda pod: pod["containers"][0]["securityContext"].pop("capabilities"), "capabilities/drop"),
        (
            lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
            "allowPrivilegeEscalation",
        ),
        (lambda pod: pod["containers"][0]["ports"][0].update(hostPort=1), "hostPort"),
    ],
)
def test_a_pod_that_is_not_restricted_is_found(spoil: Callable[[Document], object], found: str) -> None:
    pod = copy.deepcopy(DaemonPod("node").spec)
    spoil(pod)

    assert found in not_restricted(pod)


def test_the_root_of_the_daemons_container_is_read_only_and_its_user_is_the_images(daemon: DaemonPod) -> None:
    user, group = map(int, IMAGE.only("USER").value.split(":"))
    context = daemon.spec["securityContext"]

    assert daemon.container["securityContext"]["readOnlyRootFilesystem"] is True
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group)
    assert not daemon.spec["automountServiceAccountToken"]


def test_the_image_is_that_of_this_version(daemon: DaemonPod) -> None:
    assert daemon.container["image"] == f"registry.example.com/kvservice:{__version__}"


def test_paths_in_settings_are_in_mounted_volumes(daemon: DaemonPod) -> None:
    settings = daemon.settings  # Every variable is a setting, or this raises.
    arena, store = daemon.volume_at(settings.dram.path), daemon.volume_at(settings.store.path)

    assert set(daemon.mounts) >= set(IMAGE.only("VOLUME").words)
    assert arena.get("emptyDir", {}).get("medium") == "Memory" or arena["hostPath"]["path"].startswith("/dev/shm/")
    assert store.keys() & {"ephemeral", "hostPath"}
    assert settings.unix_socket_path is not None
    assert daemon.volume_at(settings.unix_socket_path) == arena
    assert daemon.environment["KVCTL_ADDRESS"] == str(settings.unix_socket_path)
    for path in filter(None, (settings.tls.certificate, settings.tls.key, settings.tls.client_ca)):
        assert "secret" in daemon.volume_at(Path(path))
    assert all(daemon.volumes[name] for name in daemon.mounts.values())


def test_the_memory_limit_holds_the_arena_and_what_the_daemon_keeps_for_itself(daemon: DaemonPod) -> None:
    check_memory(daemon)


def check_memory(daemon: DaemonPod) -> None:
    settings, resources = daemon.settings, daemon.container["resources"]
    limit = size_bytes(resources["limits"]["memory"])
    volume = daemon.volume_at(settings.dram.path).get("emptyDir")
    in_memory = int(settings.dram.capacity_bytes) + int(settings.dram.directory_bytes_max)

    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert in_memory + reserve_bytes(int(limit)) <= limit, "the daemon would make its DRAM tier smaller"
    if volume is not None:
        assert in_memory <= size_bytes(volume["sizeLimit"]) <= limit - reserve_bytes(int(limit))


def test_the_claimed_disk_is_larger_than_the_ssd_tier(daemon: DaemonPod) -> None:
    settings = daemon.settings
    claim = daemon.volume_at(settings.ssd_directories[0]).get("ephemeral")
    if claim is None:
        pytest.skip("the store is in a folder of the node")
    storage = size_bytes(claim["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"])

    assert storage >= 1.04 * settings.ssd.capacity_bytes, "a file system takes some percent"


def timeout_s(command: list[str]) -> float:
    """That of a command of kvctl."""
    return float(command[command.index("--timeout") + 1])


def test_blocks_that_only_dram_has_are_written_within_the_grace_period(daemon: DaemonPod) -> None:
    server, hook_s = daemon.settings.server, 0.0
    if "restartPolicy" in daemon.container:
        assert "lifecycle" not in daemon.container, "a hook would refuse the last saves of the engine"
    else:
        hook_s = timeout_s(daemon.container["lifecycle"]["preStop"]["exec"]["command"])

    assert hook_s + server.write_timeout_s > 0
    needed_s = hook_s + server.drain_timeout_s + server.write_timeout_s
    assert daemon.spec["terminationGracePeriodSeconds"] >= needed_s + 10


def test_probes_give_kvctl_the_time_that_it_takes_itself(daemon: DaemonPod) -> None:
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        if name == "readinessProbe" and "restartPolicy" in daemon.container:
            assert name not in daemon.container, "an engine is ready while its daemon drains"
            continue
        probe = daemon.container[name]
        command = probe["exec"]["command"]
        assert command[0] == "kvctl"
        assert probe["timeoutSeconds"] > timeout_s(command) + 1, "kvctl itself takes time to start"
        assert (name == "readinessProbe") == ("terminationGracePeriodSeconds" not in probe)
        assert probe["periodSeconds"] >= 5, "each takes half a second of a processor"


def test_the_sidecar_is_the_container_of_the_daemonset() -> None:
    sidecar, expected = (copy.deepcopy(DaemonPod(overlay).container) for overlay in ("vllm-sidecar", "node"))
    del expected["envFrom"], sidecar["envFrom"]  # The name of each ConfigMap has a hash.
    del expected["readinessProbe"], expected["lifecycle"]
    expected["ports"] = [each for each in expected["ports"] if each["name"] == "metrics"]

    assert sidecar == {**expected, "restartPolicy": "Always"}


def test_other_hosts_reach_ports_with_tls_only(daemon: DaemonPod) -> None:
    settings = daemon.settings
    ports = {each["name"]: each["containerPort"] for each in daemon.container["ports"]}
    grpc_host, grpc_port = parse_listen_address(settings.server.address)
    assert not settings.server.bulk_address, "it is beside gRPC"
    places = {
        "grpc": (grpc_host, grpc_port),
        "bulk": (grpc_host, grpc_port + 1),
        "metrics": parse_listen_address(settings.server.metrics_address),
    }
    for name, (host, port) in places.items():
        assert ports.get(name, port) == port
        if host != "127.0.0.1":
            assert name in ports
            assert settings.tls.certificate
            assert settings.tls.client_ca


def test_services_policies_and_budgets_select_pods_and_ports_that_exist(overlay: str) -> None:
    pods = [each["spec"]["template"] for each in workloads(overlay)]
    for kind, path in {
        "Service": "selector",
        "PodDisruptionBudget": "selector",
        "NetworkPolicy": "podSelector",
    }.items():
        for document in of_kind(overlay, kind):
            selector = document["spec"][path]
            chosen = [pod for pod in pods if matches(selector.get("matchLabels", selector), pod["metadata"]["labels"])]
            assert chosen, document["metadata"]["name"]
            numbers = {
                port["containerPort"] for pod in chosen for each in containers(pod["spec"]) for port in each["ports"]
            }
            # Before Kubernetes 1.32 a Service finds no named port of an init container.
            names = {
                port["name"] for pod in chosen for each in pod["spec"]["containers"] for port in each.get("ports", [])
            }
            if kind == "Service":
                assert {port["targetPort"] for port in document["spec"]["ports"]} <= names | numbers
            if kind == "NetworkPolicy":
                assert {port["port"] for rule in document["spec"]["ingress"] for port in rule["ports"]} <= numbers


def test_every_secret_is_made_by_a_certificate_of_the_same_ca(overlay: str) -> None:
    made = {each["spec"]["secretName"] for each in of_kind(overlay, "Certificate")}
    used = set(re.findall(r'"(?:keyS|s)ecret(?:Name)?": (?:{[^}]*"name": )?"([^"]+)"', json.dumps(rendered(overlay))))
    issuers = {each["metadata"]["name"] for each in of_kind(overlay, "Issuer")}

    assert used == made
    assert {each["spec"]["issuerRef"]["name"] for each in of_kind(overlay, "Certificate")} <= issuers
    assert bool(made) == bool(DaemonPod(overlay).settings.tls.certificate)


@pytest.mark.parametrize("overlay", RESTRICTED)
def test_the_daemons_certificate_has_the_names_that_clients_and_prometheus_use(overlay: str) -> None:
    (server,) = [each for each in of_kind(overlay, "Certificate") if "server auth" in each["spec"].get("usages", [])]
    (monitor,) = of_kind(overlay, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    services = {each["metadata"]["name"]: each for each in of_kind(overlay, "Service")}
    (scraped,) = [
        each
        for each in services.values()
        if matches(monitor["spec"]["selector"]["matchLabels"], each["metadata"].get("labels", {}))
    ]

    assert endpoint["tlsConfig"]["serverName"] in server["spec"]["dnsNames"]
    assert endpoint["port"] in {port["name"] for port in scraped["spec"]["ports"]}
    if (service := services.get("kvservice")) is not None:
        name = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
        assert {name, f"{name}.cluster.local"} <= set(server["spec"]["dnsNames"])


@pytest.mark.parametrize("overlay", WITH_VLLM)
def test_vllm_runs_as_the_daemons_user_and_finds_its_socket_and_arena(overlay: str) -> None:
    daemon = DaemonPod(overlay)
    ((workload, vllm),) = [
        (each, container)
        for each in workloads(overlay)
        for container in each["spec"]["template"]["spec"]["containers"]
        if container["name"] == "vllm"
    ]
    pod = workload["spec"]["template"]["spec"]
    (config,) = vllm["args"]
    address = Path(json.loads(config)["kv_connector_extra_config"]["address"])
    quick_start = (ROOT / "docs" / "vllm.md").read_text().partition("--kv-transfer-config '")[2].partition("'")[0]
    expected = {**json.loads(quick_start), "kv_connector_extra_config": {"address": str(address)}}

    assert json.loads(config) == expected
    assert address == daemon.settings.unix_socket_path
    arena = {each["name"]: each for each in pod["volumes"]}[mounts(vllm)[str(address.parent)]]
    assert arena == daemon.volume_at(address)
    assert pod["securityContext"]["runAsUser"] == daemon.spec["securityContext"]["runAsUser"]


def test_the_folders_of_a_node_are_those_that_systemd_makes_for_the_images_user(tmp_path: Path) -> None:
    if shutil.which("systemd-tmpfiles") is None:
        pytest.skip("systemd-tmpfiles is not installed")
    rules = KUBERNETES / "components" / "host-paths" / "kvservice.tmpfiles.conf"
    user, group = map(int, IMAGE.only("USER").value.split(":"))
    done = subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", rules], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"this user may not make folders for others: {done.stderr.strip()}")
    paths = {each["hostPath"]["path"] for each in DaemonPod("node-shared-memory").volumes.values()}

    assert {str(path) for path in paths} == {"/dev/shm/kvservice", "/var/lib/kvservice"}
    for path in paths:
        status = (tmp_path / path.lstrip("/")).stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (user, group, 0o700)


def test_the_overlay_of_the_page_has_its_images_and_its_setting(tmp_path: Path) -> None:
    page = (KUBERNETES / "README.md").read_text()
    overlay, setting = (textwrap.dedent(each) for each in re.findall(r"(?s)```yaml\n(.*?)```", page))
    (tmp_path / "kustomization.yaml").write_text(
        overlay.replace("../ops/kubernetes", os.path.relpath(KUBERNETES, tmp_path.resolve())) + setting
    )
    documents = rendered(str(tmp_path))
    (changed,) = [each for each in documents if each["kind"] == "ConfigMap"]
    (workload,) = [each for each in documents if each["kind"] == "StatefulSet"]
    used = list(containers(workload["spec"]["template"]["spec"]))

    assert changed["data"]["KVSERVICE_DRAM__CAPACITY_BYTES"] == "64GiB"
    check_memory(DaemonPod(str(tmp_path)))
    assert used[0]["envFrom"] == [{"configMapRef": {"name": changed["metadata"]["name"]}}]
    assert {each["image"] for each in used} == {
        f"registry.my.org/{name}:{__version__}" for name in ("kvservice", "vllm-with-kvservice")
    }


def test_the_page_names_every_overlay_component_and_setting() -> None:
    page = (KUBERNETES / "README.md").read_text()
    components = {each.name for each in (KUBERNETES / "components").iterdir()}
    variables = {
        name for overlay in OVERLAYS for name in DaemonPod(overlay).environment if name not in IMAGE.environment
    }

    for name in {*OVERLAYS, *components, *variables}:
        assert f"`{name}`" in page, name
