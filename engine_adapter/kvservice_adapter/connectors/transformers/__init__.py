"""Hugging Face transformers: its models' KV is restored before a turn, layer by layer, and saved while it is computed.

* ``connector``: restore, save, truncate.
* ``cache``: the cache that a model computes with. It waits for each layer, and tells what is new.
* ``forwards``: tells the cache which tokens a forward computes.
* ``history``: the layers on their way; ``recompute``: what becomes of them where they do not come.
* ``writing``: the blocks that a forward completes are saved meanwhile.
* ``finding``, ``remembering``: what of a prompt is stored; what a session is to know.
* ``rows``: batches. ``model_layout``: which models, and how their KV lies.
"""

from kvservice_adapter.connectors.transformers.connector import Restored, Saved, TransformersConnector
from kvservice_adapter.connectors.transformers.model_layout import UnsupportedModel, layout_of

__all__ = ["Restored", "Saved", "TransformersConnector", "UnsupportedModel", "layout_of"]
