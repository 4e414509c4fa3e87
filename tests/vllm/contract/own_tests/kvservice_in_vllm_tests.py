"""A pytest plugin for vLLM's own tests: they run on the CPU platform, with our connector wherever one is configured.

It runs in a process where `tests` are vLLM's: no file of ours imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from unittest.mock import Mock

import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms.current_platform = CpuPlatform()  # The released vLLM was built for CUDA, and would look for it.

from vllm.config import KVTransferConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.v1.kv_cache_interface import KVCacheGroupSpec  # noqa: E402

_LAYER = "model.decoder.layers.0.self_attn.attn"  # vLLM's tests call it "layer", which is no layer of their model.

_check_config = KVTransferConfig.__post_init__
_make_group = KVCacheGroupSpec.__init__
_create_connector = KVConnectorFactory.create_connector
_created: list[Any] = []


def _configure_ours(self: Any) -> None:
    if self.kv_connector is not None:
        self.kv_connector = "KVServiceConnector"
        self.kv_connector_module_path = "kvservice_adapter.connectors.vllm"
        self.kv_connector_extra_config = {}
    _check_config(self)


def _name_layer(self: Any, layer_names: list[str], *args: Any, **kwargs: Any) -> None:
    _make_group(self, [_LAYER] if layer_names == ["layer"] else layer_names, *args, **kwargs)


def _remember(*args: Any, **kwargs: Any) -> Any:
    _created.append(_create_connector(*args, **kwargs))
    return _created[-1]


KVTransferConfig.__post_init__ = _configure_ours
KVCacheGroupSpec.__init__ = _name_layer
KVConnectorFactory.create_connector = _remember

_utils: Any = import_module("tests.v1.kv_connector.unit.utils")
_create_mock = _utils.create_mock_connector


def _mock_around_ours() -> Mock:
    """vLLM's mock answers what its test says. All other hooks reach the connector that it replaces."""
    mock = Mock(wraps=_created[-1])
    mock.get_external_cache_hit_sources.side_effect = _create_mock().get_external_cache_hit_sources.side_effect
    return mock


_utils.create_mock_connector = _mock_around_ours  # Before a test file imports it.
