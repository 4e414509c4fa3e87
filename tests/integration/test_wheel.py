"""The wheel that users install: its contents, and the message of ``kvctl bench`` there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
    assert folders == {"kvctl.py", "kvservice", "kvservice_adapter", "kvservice_api", "kvservice_client"}
    assert not [name for name in names if {"bench", "demo", "examples", "experiments", "tests"} & set(name.split("/"))]
    assert {"kvservice_client/py.typed", "kvservice_api/cuda/pages.cu"} <= set(names)


def test_the_wheel_has_the_c_extension_where_it_can_be_compiled_and_says_for_which_platform(wheel: Path) -> None:
    if not (shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()):
        pytest.skip("there is no C compiler here, or Python has no headers")
    assert wheel.name.endswith(f"-cp311-abi3-{sysconfig.get_platform().replace('-', '_')}.whl")
    archive = zipfile.ZipFile(wheel)
    assert "kvservice_api/_copying.abi3.so" in archive.namelist()
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: false" in archive.read(metadata).decode()


def test_without_a_compiler_the_wheel_is_for_every_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    from hatchling.builders.wheel import WheelBuilder

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    wheel = Path(next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))

    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.mark.parametrize("hindrance", ["no compiler", "not wanted", "read-only"])
def test_an_editable_install_without_the_extension_keeps_none_of_an_older_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hindrance: str
) -> None:
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    from hatch_build import ExtensionBuildHook

    folder = tmp_path / "proto/kvservice_api"
    folder.mkdir(parents=True)
    sources = [each for each in (ROOT / "proto/kvservice_api").iterdir() if each.suffix in (".c", ".h")]
    for source in sources:
        shutil.copy(source, folder)
    (folder / "_copying.abi3.so").write_bytes(b"older")
    if hindrance == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    elif hindrance == "not wanted":
        monkeypatch.setenv("KVS_PURE_PYTHON", "1")
    else:

        def read_only(source: Path, target: Path) -> None:
            raise PermissionError(30, "Read-only file system", str(target))

        monkeypatch.setattr("os.replace", read_only)
    warnings = list[str]()
    app: Any = SimpleNamespace(display_warning=warnings.append)
    metadata: Any = None
    hook = ExtensionBuildHook(str(tmp_path), {}, None, metadata, str(tmp_path), "wheel", app)

    hook.initialize("editable", {"force_include": {}})
    hook.finalize("editable", {}, "")

    assert {each.name for each in folder.iterdir()} == {each.name for each in sources}
    assert len(warnings) == (hindrance != "not wanted")


def test_kvctl_bench_of_the_wheel_says_where_the_measures_are(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The checkout is left out of the search path, so that Python finds the wheel's packages alone.
    program = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if not p.startswith({str(ROOT)!r}) "
        "or 'site-packages' in p)]; sys.argv = ['kvctl', 'bench', '--quick']; "
        "from kvctl import main; main()"
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
