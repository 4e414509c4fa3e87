"""Connectors for vLLM whose hooks write how long they took, into a file that the environment names."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector import LMCacheMPConnector

from kvservice_adapter.connectors.vllm import KVServiceConnector

SCHEDULER = (
    "on_new_request get_num_new_matched_tokens update_state_after_alloc build_connector_meta update_connector_output "
    "request_finished request_finished_all_groups"
).split()
WORKER = (
    "handle_preemptions bind_connector_metadata start_load_kv wait_for_layer_load save_kv_layer wait_for_save "
    "get_transfer_results get_block_ids_with_load_errors build_connector_worker_meta"
).split()


def _timed(hook: Callable[..., Any], role: str) -> Callable[..., Any]:
    @functools.wraps(hook)
    def call(*args: Any, **kwargs: Any) -> Any:
        begin_s = time.perf_counter()
        try:
            return hook(*args, **kwargs)
        finally:
            line = json.dumps([role, hook.__name__, (time.perf_counter() - begin_s) * 1e3])
            with open(os.environ["KVSERVICE_HOOK_TIMES"], "a") as file:
                file.write(line + "\n")

    return call


def _with_times(base: Any, name: str) -> Any:
    hooks = {
        each: _timed(getattr(base, each), role)
        for role, names in (("scheduler", SCHEDULER), ("worker", WORKER))
        for each in names
        if hasattr(base, each)
    }
    return type(name, (base,), hooks)


TimedKVService = _with_times(KVServiceConnector, "TimedKVService")
TimedLMCache = _with_times(LMCacheMPConnector, "TimedLMCache")
