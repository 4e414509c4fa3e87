"""The tests with vLLM run in environments of their own, by `make test-vllm`. Elsewhere each file is skipped."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest


class _ModuleWithVLLM(pytest.Module):
    """A test file that may import vLLM, whose own warnings are no failures."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        if find_spec("vllm") is None:
            pytest.skip("vLLM is not installed here: `make test-vllm` runs this file in an environment that has it")
        self.add_marker(pytest.mark.filterwarnings("default"))
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            return list(super().collect())


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module: pytest.Module = _ModuleWithVLLM.from_parent(parent, path=module_path)
    return module
