"""ops/compose: the file agrees with the image, the daemon's settings and the page on vLLM."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvservice.config_sources import load_settings
from kvservice.host_limits import reserve_bytes
from tests.dockerfile import ROOT, stages

yaml: Any = pytest.importorskip("yaml")

FILE = ROOT / "ops" / "compose" / "compose.yaml"
COMPOSE = yaml.safe_load(FILE.read_text())
DAEMON, VLLM = COMPOSE["services"]["kvservice"], COMPOSE["services"]["vllm"]
IMAGE = stages()[-1]
USER = IMAGE.only("USER").value
SETTINGS = load_settings([], {**IMAGE.environment, **DAEMON["environment"]})
OPTIONS = dict(each.split("=") for each in COMPOSE["volumes"]["arena"]["driver_opts"]["o"].split(","))


def gigabytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)g", text)
    assert found
    return int(found[1]) * 2**30


def mounts(service: Any) -> dict[str, str]:
    """The sources by the paths where they are mounted."""
    return {path: source for source, path in (each.split(":") for each in service["volumes"])}


def test_the_volumes_are_those_of_the_image_and_the_arena_is_memory_of_its_user() -> None:
    assert mounts(DAEMON) == {str(SETTINGS.dram.path): "arena", str(SETTINGS.store.path): "store"}
    assert set(mounts(DAEMON)) == set(IMAGE.only("VOLUME").words)
    assert set(mounts(DAEMON).values()) == set(COMPOSE["volumes"])
    assert COMPOSE["volumes"]["arena"]["driver_opts"]["type"] == "tmpfs"
    assert f"{OPTIONS['uid']}:{OPTIONS['gid']}" == USER
    assert (FILE.parent / DAEMON["build"] / "Dockerfile").samefile(ROOT / "Dockerfile")


def test_the_memory_limit_holds_the_arena_and_what_the_daemon_keeps_for_itself() -> None:
    limit, volume = gigabytes(DAEMON["mem_limit"]), gigabytes(OPTIONS["size"])

    assert SETTINGS.dram.capacity_bytes + SETTINGS.dram.directory_bytes_max <= volume
    assert volume + reserve_bytes(limit) <= limit


def test_a_stop_gives_the_daemon_the_time_of_its_drain_and_of_its_writes() -> None:
    server = SETTINGS.server

    assert server.write_timeout_s > 0, "the arena goes with the containers"
    assert int(DAEMON["stop_grace_period"].removesuffix("s")) > server.drain_timeout_s + server.write_timeout_s


def test_vllm_waits_for_a_healthy_daemon_and_shares_its_user_socket_and_arena() -> None:
    page = (ROOT / "docs" / "vllm.md").read_text().partition("--kv-transfer-config '")[2].partition("'")[0]
    (config,) = VLLM["command"]

    assert json.loads(config) == {
        **json.loads(page),
        "kv_connector_extra_config": {"address": str(SETTINGS.unix_socket_path)},
    }
    assert VLLM["entrypoint"][:2] == ["vllm", "serve"]
    assert VLLM["user"] == USER
    assert mounts(VLLM)[str(Path(SETTINGS.unix_socket_path or "").parent)] == "arena"
    assert VLLM["environment"]["HOME"] in mounts(VLLM)
    assert VLLM["depends_on"]["kvservice"]["condition"] == "service_healthy"
    assert IMAGE.all("HEALTHCHECK")


def test_docker_compose_accepts_the_file() -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    done = subprocess.run([program, "-f", FILE, "config", "--quiet"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_network_the_daemon_listens_where_it_can() -> None:
    assert DAEMON["network_mode"] == "none"
    assert SETTINGS.server.address.startswith("127.0.0.1:")
    assert SETTINGS.server.metrics_address.startswith("127.0.0.1:")
