"""KVService as vLLM's external KV cache.

    vllm serve MODEL --kv-transfer-config '{
      "kv_connector": "KVServiceConnector", "kv_connector_module_path": "kvservice_adapter.connectors.vllm",
      "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"address": "127.0.0.1:7070"}}'

* ``connector``: the class that vLLM makes, once per process. It guards each hook and hands it to a role.
* ``scheduler_role``: what of a request is stored, what to load, and what to save. ``request_keys``: a request's keys.
* ``request_parameters``: what a request asks of the connector. ``request_progress``: how it goes, for `kvctl explain`.
* ``session_updates``: the sessions of conversations, updated in the background.
* ``worker_role``: copies KV between vLLM's pages and the daemon. ``page_layouts``: where pages have keys and values.
* ``metadata``: the messages between the roles. ``model_layout``: the model's identity. ``settings``: the configuration.
"""

from kvservice_adapter.connectors.vllm.connector import KVServiceConnector

__all__ = ["KVServiceConnector"]
