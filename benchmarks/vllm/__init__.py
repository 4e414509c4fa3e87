"""Measurements with vLLM, in its environment: `.venv-vllm/bin/python -m benchmarks.vllm.hooks`, `.ttft`, `.peers`."""

from importlib.util import find_spec

if find_spec("vllm") is None:
    raise SystemExit("vLLM is not installed here. Run `make vllm-env`, and use .venv-vllm/bin/python")
