"""Tests of CUDA: on a GPU (`make gpu-test`), or on a simulation of CUDA (`make cudasim-test`), where a module `cudasim`
controls it. Those marked `sim` need the simulation: they inject faults and delays. Elsewhere all of them are skipped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvservice_api.cuda.page_kernels import PageKernels
from kvservice_api.cuda.runtime import Gpu
from kvservice_client import Client
from tests.daemon import DaemonProcess
from tests.gpu.ipc_engine import Engine, layout_of


@cache
def simulation() -> Any:
    """The module `cudasim` where this process is on the simulated device, or None."""
    try:
        import cudasim
    except ImportError:
        return None
    return cudasim if cudasim.active() else None


@cache
def missing() -> str:
    """What these tests lack here; empty if nothing."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"there is no CUDA device: {error}"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        if reason := missing():
            item.add_marker(pytest.mark.skip(reason=reason))
        elif item.get_closest_marker("sim") and simulation() is None:
            item.add_marker(pytest.mark.skip(reason="it needs the simulated device"))


@pytest.fixture(autouse=True)
def simulated_device() -> Iterator[None]:
    """No test inherits a fault or a delay of the simulation from the one before, and none loses data by a use of memory
    that CUDA allows.
    """
    if simulation() is None:
        yield
        return
    simulation().reset()
    gc.disable()  # cudaFree waits for the device. Of an earlier test's garbage, while a stream is held, it hangs.
    yield
    gc.enable()
    findings = simulation().findings()
    simulation().reset()
    assert findings == []


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for all tests of a file. `tests/integration` has the like, with imports of the command line."""
    process = DaemonProcess(tmp_path_factory.mktemp("daemon")).start()
    yield process
    process.remove()


@pytest.fixture
def new_daemon(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Starts a daemon of the test's own, with the settings given."""
    made: list[DaemonProcess] = []

    def start(**settings: Any) -> DaemonProcess:
        made.append(DaemonProcess(tmp_path / f"daemon-{len(made)}", **settings))
        return made[-1].start()

    yield start
    for process in made:
        process.remove()


@pytest.fixture
def slow_daemon(tmp_path: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Starts a daemon with settings of the simulation, such as delays and faults."""
    made: list[DaemonProcess] = []

    def start(settings: Mapping[str, Any] | None = None, **simulated: str) -> DaemonProcess:
        made.append(DaemonProcess(tmp_path / f"daemon-{len(made)}", **(settings or {})))
        return made[-1].start(environment={f"CUDASIM_{name.upper()}": value for name, value in simulated.items()})

    yield start
    for process in made:
        process.remove()


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The first device."""
    return Gpu(0)


@pytest.fixture(scope="session")
def kernels(gpu: Gpu) -> PageKernels:
    """Compiled once, in seconds."""
    return PageKernels(gpu)


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with daemon.client("engine") as made:
        yield made


@pytest.fixture
def engine(cupy: Any, client: Client) -> Iterator[Engine]:
    made = Engine(cupy, client, layout_of("bfloat16"))
    assert made.memory.register(), client.stats().cuda_ipc_refused_because
    yield made
    made.memory.close()
