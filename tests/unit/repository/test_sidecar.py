"""The sidecar examples of the page on vLLM agree with the image, the daemon's settings and the page on containers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from kvservice.config_sources import load_settings
from tests.dockerfile import ROOT, stages

yaml: Any = pytest.importorskip("yaml")

_, _, IMAGE = stages()
PAGE = (ROOT / "docs" / "vllm.md").read_text()
POD = yaml.safe_load(PAGE.partition("```yaml\n")[2].partition("```")[0])
(DAEMON,), (VLLM,) = POD["spec"]["initContainers"], POD["spec"]["containers"]
VOLUMES = {each["name"]: each for each in POD["spec"]["volumes"]}
DOCKER = shlex.split(PAGE.partition("docker run -d --name vllm")[2].partition("```")[0])
SOCKET = Path(IMAGE.environment["KVSERVICE_SERVER__UNIX_SOCKET"])


def size_bytes(quantity: str) -> float:
    """A quantity of Kubernetes."""
    number = re.fullmatch(r"([0-9.]+)Gi", quantity)
    assert number
    return float(number[1]) * 2**30


def mounts(container: Any) -> dict[str, str]:
    """The volumes by the paths where they are mounted."""
    return {each["mountPath"]: each["name"] for each in container["volumeMounts"]}


def option(name: str) -> str:
    """Of the command for Docker."""
    return DOCKER[DOCKER.index(name) + 1]


def test_the_daemon_is_configured_by_settings_that_exist_and_fits_into_its_memory() -> None:
    given = {each["name"]: each["value"] for each in DAEMON["env"]}
    settings = load_settings([], {**IMAGE.environment, **given})
    arena = size_bytes(VOLUMES["arena"]["emptyDir"]["sizeLimit"])

    assert settings.dram.capacity_bytes < arena < size_bytes(DAEMON["resources"]["limits"]["memory"])
    assert settings.server.write_timeout_s > 0, "the arena goes with the pod"
    needed_s = settings.server.drain_timeout_s + settings.server.write_timeout_s
    assert POD["spec"]["terminationGracePeriodSeconds"] > needed_s


def test_docker_gives_the_daemon_the_time_of_its_drain_and_of_its_writes() -> None:
    page = (ROOT / "docs" / "container.md").read_text()
    words = shlex.split(page.partition("docker run -d --name kvservice")[2].partition("```")[0])
    given = dict(word.split("=", 1) for word in words if word.startswith("KVSERVICE_"))
    server = load_settings([], {**IMAGE.environment, **given}).server

    assert int(words[words.index("--stop-timeout") + 1]) > server.drain_timeout_s + server.write_timeout_s


def test_both_containers_run_as_the_user_of_the_image_and_share_the_arena_and_the_socket() -> None:
    user, group = IMAGE.only("USER").value.split(":")
    context = POD["spec"]["securityContext"]

    assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))
    assert "runAsUser" not in {**DAEMON["securityContext"], **VLLM.get("securityContext", {})}
    assert option("--user") == f"{user}:{group}"
    assert mounts(DAEMON)[str(SOCKET.parent)] == mounts(VLLM)[str(SOCKET.parent)] == "arena"
    assert set(mounts(DAEMON)) == set(IMAGE.only("VOLUME").words)
    assert f"kv-arena:{SOCKET.parent}" in DOCKER
    assert {*mounts(DAEMON).values(), *mounts(VLLM).values()} == set(VOLUMES)


def test_vllm_is_started_as_in_the_quick_start_with_the_daemons_socket() -> None:
    command = shlex.split(PAGE[PAGE.index("vllm serve MODEL") :].partition("```")[0])
    config = json.loads(command[-1])
    config["kv_connector_extra_config"]["address"] = str(SOCKET)

    assert [*VLLM["command"], json.loads(*VLLM["args"])] == [*command[:-1], config]
    assert [option("--entrypoint"), *DOCKER[DOCKER.index("serve") : -1]] == command[:-1]
    assert json.loads(DOCKER[-1]) == config


@pytest.mark.parametrize("variable", ["HOME", "USER"])
def test_a_user_without_a_home_in_vllms_image_gets_one(variable: str) -> None:
    given = {each["name"]: each["value"] for each in VLLM["env"]}

    assert f"{variable}={given[variable]}" in DOCKER
    assert variable != "HOME" or given["HOME"] in mounts(VLLM)
