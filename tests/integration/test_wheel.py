"""The wheel that users install: its contents, and the message of ``kvctl bench`` there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.dockerfile import ROOT, stages


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it, without a network."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))


def test_the_wheel_holds_the_four_packages_and_no_benchmark_example_or_test(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    folders = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert folders == {"kvservice", "kvservice_adapter", "kvservice_api", "kvservice_client"}
    assert not [name for name in names if {"bench", "demo", "examples", "experiments", "tests"} & set(name.split("/"))]
    assert "kvservice_client/py.typed" in names


def test_kvctl_bench_of_the_wheel_says_where_the_measures_are(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The checkout is left out of the search path, so that Python finds the wheel's packages alone.
    program = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if not p.startswith({str(ROOT)!r}) "
        "or 'site-packages' in p)]; sys.argv = ['kvctl', 'bench', '--quick']; "
        "from kvservice_client.cli import main; main()"
    )

    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kvctl: bench runs in a checkout of KVService's repository only, which has benchmarks/.\n"


@pytest.mark.slow
def test_the_commands_for_vllms_image_add_client_and_connector_and_keep_the_packages_that_are_there(
    tmp_path: Path,
) -> None:
    _, build, image = stages("ops/compose/vllm.Dockerfile")
    python = tmp_path / "venv/bin/python3"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy==2.2.6"], check=True)  # As vLLM's image may have.

    for stage in (build, image):
        line = re.sub(r"(?:/tmp)?/wheels", str(tmp_path / "wheels"), stage.only("RUN").value)
        line = line.replace("/src", str(ROOT)).replace("python3", str(python))
        subprocess.run(line, shell=True, check=True, cwd=tmp_path, env=without_python_variables())

    program = "import numpy, kvservice_client, importlib.util; print(numpy.__version__, kvservice_client.__file__)"
    found = "assert importlib.util.find_spec('kvservice_adapter.connectors.vllm')"
    command = [str(python), "-c", f"{program}; {found}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=without_python_variables(), capture_output=True, text=True, check=True
    )
    version, _, file = done.stdout.strip().partition(" ")
    assert version == "2.2.6"
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert not (tmp_path / "wheels").exists()


def without_python_variables() -> dict[str, str]:
    """By which Python would find this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
