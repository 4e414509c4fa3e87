from __future__ import annotations

import warnings
from importlib.util import find_spec

if find_spec("vllm"):  # Elsewhere the tests are skipped.
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        from tests.vllm.contract.cpu_platform import use_cpu

        use_cpu()
