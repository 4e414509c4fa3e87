"""A real vLLM on the CPU that keeps its KV in a daemon, and the model that it serves."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Read by vLLM when it is imported. One compute thread on any core, because tests of two processes share two cores.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

from kvservice_client import BlockCache, Layout, Rotary, block_chain
from tests.daemon import until

# Settings for tests that are not about waits: on a busy machine an answer may take longer than users would wait.
PATIENT = {"lookup_wait_s": 30.0, "wait_s": 30.0, "layer_wait_s": 30.0}
NOT_KEPT: dict[str, Any] = {
    "may_load": False,
    "may_save": False,
}  # A request that vLLM computes as if there were no connector.


def model_layout(*, dtype: str = "float32", revision: str = "test", block_tokens: int = 256) -> Layout:
    """The layout of SmolLM2-135M that the connector must find, written out."""
    return Layout(
        "smollm2",
        dtype,
        layers=30,
        kv_heads=3,
        k_head_dim=64,
        v_head_dim=64,
        model_revision=revision,
        block_tokens=block_tokens,
        rotary=Rotary("default", "half", 64, 100000.0),
    )


def wait_until_stored(stored: BlockCache, token_ids: Sequence[int]) -> None:
    """Saves are sent in the background. The last block is partial."""
    chain = block_chain(stored.layout, token_ids, with_partial=True)
    until(lambda: stored.contains(chain) == len(chain))


def transfer_config(**settings: Any) -> KVTransferConfig:
    """vLLM's configuration with the connector, as users write it. `settings` are the connector's."""
    return KVTransferConfig(
        kv_connector="KVServiceConnector",
        kv_connector_module_path="kvservice_adapter.connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=settings,
    )


class Answer(NamedTuple):
    token_ids: list[int]
    cached_tokens: int  # As vLLM reports them: its own and the connector's.
    first_token_s: float
    request_id: str


class Engine:
    """One engine. Its own prefix cache is emptied before each turn, so hits can come only from the connector."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def answer(self, prompt: Sequence[int], tokens: int = 8, *, keep_own: bool = False, **kept: Any) -> Answer:
        """The answer to one prompt. `kept` are the connector's parameters of the request."""
        return self.answers([prompt], tokens, [kept], keep_own=keep_own)[0]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int = 8,
        kept: Sequence[Mapping[str, Any]] = (),
        *,
        keep_own: bool = False,
    ) -> list[Answer]:
        """The answers to prompts that vLLM computes together. `kept` are the connector's parameters of each."""
        if not keep_own:
            assert self.llm.reset_prefix_cache()  # False if the connector held pages of a finished request.
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                extra_args={"kv_transfer_params": {"kvservice": dict(each)}} if each else None,
            )
            for each in kept or [{}] * len(prompts)
        ]
        given: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self.llm.generate(given, parameters, use_tqdm=False)
        return [
            Answer(
                list(output.outputs[0].token_ids),
                output.num_cached_tokens or 0,
                output.metrics.first_token_latency if output.metrics is not None else 0.0,
                output.request_id,
            )
            for output in outputs
        ]


@contextmanager
def engine(model: Path, transfer: KVTransferConfig | None, **options: Any) -> Iterator[Engine]:
    """A vLLM that serves the model. It takes half a minute to start: share one among tests."""
    llm = LLM(
        str(model),
        enforce_eager=True,
        enable_prefix_caching=True,
        disable_log_stats=False,
        kv_transfer_config=transfer,
        **{"dtype": "float32", "max_model_len": 4096, **options},
    )
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()


def model_folder() -> Path:
    """SmolLM2-135M-Instruct as a folder that vLLM reads, made from its Python package and kept in the environment."""
    folder = Path(sys.prefix) / "smollm2-135m-instruct"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Several processes run tests.
        if not folder.is_dir():
            unfinished = folder.with_suffix(".unfinished")
            _write_model(unfinished)
            unfinished.rename(folder)
    return folder


def _write_model(folder: Path) -> None:
    from examples.models import load_model

    loaded = load_model()
    model = loaded.model
    # Transformers refuses to write a model that it has read from a GGUF file, although its weights are plain now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.quantization_method = False, None
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
