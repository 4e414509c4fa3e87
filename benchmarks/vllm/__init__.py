"""Measurements with vLLM, in its environment: `.venv-vllm/bin/python -m benchmarks.vllm.hooks`, `.ttft`."""
