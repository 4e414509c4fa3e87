"""Hugging Face transformers: its models' KV is restored before a turn, layer by layer, and saved while it is computed.

* ``connector``: restore, save, truncate.
* ``prompt_queue``: prompts that wait for a batch, those first whose history is in DRAM.
* ``cache``: the cache that a model computes with. It waits for each layer, and reports what is new.
* ``model_hooks``: report the tokens of each forward to its cache.
* ``history``: the layers that are loaded; ``recompute``: computes them if they do not arrive.
* ``cache_builder``: makes the cache of what of a prompt is stored.
* ``forward_saver``: saves the blocks that a forward completes. ``turns``: what is left to save at the end.
* ``mask_record``: which tokens the attention masks have hidden. ``rows``: batches.
* ``generation``: where the rows of a batch end, and which tokens `generate` hides.
* ``model_layout``, ``model_probe``: which models, decided by their configuration and by what they compute.
"""

from kvservice_adapter.connectors.transformers.cache_builder import Restored
from kvservice_adapter.connectors.transformers.connector import TransformersConnector
from kvservice_adapter.connectors.transformers.model_layout import UnsupportedModel, layout_of
from kvservice_adapter.connectors.transformers.prompt_queue import PromptQueue, QueuedPrompt
from kvservice_adapter.engine.turn_saver import Saved

__all__ = [
    "PromptQueue",
    "QueuedPrompt",
    "Restored",
    "Saved",
    "TransformersConnector",
    "UnsupportedModel",
    "layout_of",
]
