"""Each hook of vLLM's connector is ours, as vLLM calls it, or is left to vLLM for a reason: drift fails here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from packaging.version import Version
from vllm import __version__
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvservice_adapter.connectors.vllm import KVServiceConnector

pytestmark = pytest.mark.fast

# Hooks of the base that ours does not have, and why vLLM's own are right.
LEFT_TO_VLLM = {
    "role": "what the constructor was given",
    "supports_divergent_local_hybrid_hits": "there is no recurrent state in what is stored",
    "supports_sleep_mode": "nothing is registered with a device",
    "unregister_kv_caches": "the views of the pages are made again by register_kv_caches",
    "restore_kv_caches": "as unregister_kv_caches",
    "get_mem_pool_context": "pages may be in any memory",
    "clear_connector_metadata": "vLLM's state",
    "has_connector_metadata": "vLLM's state",
    "set_host_xfer_buffer_ops": "vLLM's staging memory is not used",
    "finish_forward": "saves begin a step later",
    "reset_capture_state": "no hook changes state while graphs are captured",
    "get_finished": "get_transfer_results has also what failed",
    "request_finished": "request_finished_all_groups is called instead",
    "get_kv_connector_kv_cache_events": "the daemon is asked, no event tells what it has",
    "get_handshake_metadata": "workers do not talk to each other",
    "bind_gpu_block_pool": "called by bind_kv_cache_manager",
    "get_loaded_kv_cache_group_ids": "all groups that vLLM's prefix cache has",
    "get_external_cache_hit_sources": "what _cache_hit_source says",
    "get_required_kvcache_layout": "any layout that page_layouts knows",
    "get_finished_count": "each worker reports each request",
    "has_pending_block_frees": "no page is held after its request",
    "has_pending_push_work": "nothing is pushed to other engines",
    "register_finished_partial_tail": "only for connectors between engines",
    "set_xfer_handshake_metadata": "workers do not talk to each other",
    "set_xfer_handshake_metadata_pp_aware": "workers do not talk to each other",
}


def hooks_of(connector: type) -> dict[str, Any]:
    """The public methods and properties, as they stand in the class."""
    return {name: inspect.getattr_static(connector, name) for name in dir(connector) if not name.startswith("_")}


HOOKS = hooks_of(KVConnectorBase_V1)
OURS = sorted(name for name in HOOKS if inspect.getattr_static(KVServiceConnector, name) is not HOOKS[name])


def parameters_of(hook: Any) -> list[tuple[str, Any]]:
    function: Any = hook.fget if isinstance(hook, property) else getattr(hook, "__func__", hook)
    return [(each.name, each.kind) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", OURS)
def test_our_hook_has_the_parameters_of_vllms(name: str) -> None:
    ours = inspect.getattr_static(KVServiceConnector, name)
    assert type(ours) is type(HOOKS[name])
    assert parameters_of(ours) == parameters_of(HOOKS[name])


def test_our_constructor_has_the_parameters_of_vllms() -> None:
    assert parameters_of(KVServiceConnector.__init__) == parameters_of(KVConnectorBase_V1.__init__)


def test_no_hook_is_abstract() -> None:
    assert not KVServiceConnector.__abstractmethods__


def test_each_hook_is_ours_or_is_left_to_vllm_for_a_reason() -> None:
    assert sorted({*HOOKS} - {*OURS} - {*LEFT_TO_VLLM}) == []
    assert sorted({*OURS} & {*LEFT_TO_VLLM}) == []


@pytest.mark.skipif(Version(__version__) < Version("0.33"), reason="hooks that came with vLLM 0.33 are not here yet")
def test_each_hook_that_is_left_to_vllm_exists() -> None:
    assert sorted({*LEFT_TO_VLLM} - {*HOOKS}) == []
