"""The connector with methods of its roles that raise, or stop the daemon. A file chooses: one engine has all cases."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvservice_adapter.connectors.vllm import KVServiceConnector

# The environment variable that names the file: `{method} {moment}`, `{method} {signal} {process}`, or empty.
FAULT = "CONNECTOR_FAULT_FILE"

LONG_S = 0.02  # Calls that take longer are listed beside the file.
LOADS_LATER_S = 0.3  # Loads between steps take at least this long: steps of others, and their errors, come between.

# By method: what vLLM's hook of it is called.
SCHEDULER_HOOKS = {
    "on_new": "on_new_request",
    "matched_tokens": "get_num_new_matched_tokens",
    "allocated": "update_state_after_alloc",
    "orders_of_step": "build_connector_meta",
    "on_output": "update_connector_output",
    "finished": "request_finished",
}
WORKER_HOOKS = {
    "before_step": "bind_connector_metadata",
    "start_loads": "start_load_kv",
    "wait_for_layer": "wait_for_layer_load",
    "end_step": "wait_for_save",
    "take_finished": "get_transfer_results",
    "take_bad_pages": "get_block_ids_with_load_errors",
    "take_report": "build_connector_worker_meta",
}
# Each method raises before it does anything, or after all that it does. What a `take_...` method has taken is in its
# answer: an error after it is no error of that method.
CASES = [
    (method, moment)
    for method in (*SCHEDULER_HOOKS, *WORKER_HOOKS, "take_stats")
    for moment in ("before", "after")
    if moment == "before" or not (method.startswith("take_") or method == "orders_of_step")
]


class InjectedError(Exception):
    """Not of a kind that the connector expects."""


class RaisingConnector(KVServiceConnector):
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        for each, methods in ((self._scheduler, SCHEDULER_HOOKS), (self._worker, WORKER_HOOKS)):
            if each is not None:
                for name in (*methods, "take_stats"):
                    setattr(each, name, _raising(name, getattr(each, name), Path(os.environ[FAULT])))
        if self._worker is not None:
            self._worker._load_between_steps = _delayed(self._worker._load_between_steps)  # type: ignore[method-assign]


def _delayed(load: Callable[..., None]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        time.sleep(LOADS_LATER_S)
        load(*args)

    return call


def _raising(name: str, method: Callable[..., Any], fault: Path) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any) -> Any:
        chosen, _, moment = fault.read_text().partition(" ")
        if chosen == name and moment == "before":
            _raise(name, fault)
        if chosen == name and moment.startswith("SIG"):
            signal_name, _, process = moment.partition(" ")
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.Signals[signal_name])
        began_s = time.monotonic()
        answer = method(*args)
        if (waited_s := time.monotonic() - began_s) > LONG_S:
            with fault.with_suffix(".waited").open("a") as file:
                file.write(f"{name} {waited_s:.3f}\n")
        if chosen == name and moment == "after":
            _raise(name, fault)
        return answer

    return call


def _raise(name: str, fault: Path) -> None:
    with fault.with_suffix(".raised").open("a") as file:
        file.write(f"{name}\n")
    raise InjectedError(f"{name} raises")
