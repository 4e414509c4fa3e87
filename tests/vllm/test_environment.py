"""KVService beside vLLM, in one environment: what each of them needs agrees."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from kvservice_client import Layout, block_chain
from tests.daemon import DaemonProcess

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("package", ["kvservice_client", "kvservice_adapter"])
def test_each_package_imports_beside_vllm_without_a_warning(package: str) -> None:
    """protobuf warns where the generated code and the runtime are too far apart."""
    subprocess.run([sys.executable, "-W", "error", "-c", f"import {package}"], check=True, timeout=120)


def test_the_extra_for_vllm_asks_for_no_more_than_the_base() -> None:
    """So that ``pip install '.[vllm]'`` leaves every package of a vLLM that works as it is."""
    required = [Requirement(line) for line in requires("kvservice") or []]
    base = {each.name for each in required if each.marker is None}
    with_extra = {each.name for each in required if each.marker is None or each.marker.evaluate({"extra": "vllm"})}
    assert with_extra == base


def test_every_requirement_of_ours_is_met() -> None:
    for each in map(Requirement, requires("kvservice") or []):
        if each.marker is None:
            assert version(each.name) in each.specifier, each


def test_a_daemon_of_this_environment_stores_and_returns_a_block(tmp_path: Path) -> None:
    layout = Layout("numbers", "float32", layers=2, kv_heads=1, k_head_dim=4, v_head_dim=4)
    chain = block_chain(layout, range(layout.block_tokens))
    layers = np.arange(2 * 2 * layout.block_tokens * 4, dtype=np.float32).reshape(2, -1)
    with DaemonProcess(tmp_path) as daemon, daemon.client() as client:
        blocks = client.open_layout(layout)
        blocks.save(chain, list(layers))
        with blocks.lookup(chain) as lease:
            assert [bytes(layer.data) for layer in lease.load()] == [each.tobytes() for each in layers]
