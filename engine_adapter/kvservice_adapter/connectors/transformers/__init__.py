"""Hugging Face transformers: its models' KV is restored before a turn, layer by layer, and saved while it is computed.

* ``connector``: restore, save, truncate.
* ``cache``: the cache that a model computes with. It waits for each layer, and tells what is new.
* ``forwards``: tells the cache which tokens a forward computes.
* ``history``: the layers on their way; ``recompute``: what becomes of them where they do not come.
* ``finding``, ``restoring``: what of a prompt is stored, and the cache that is made of it.
* ``writing``, ``saving``, ``remembering``: the blocks that a forward completes are saved meanwhile, the rest at
  the end, and what a session is to know.
* ``requests``: what is learned from each request, and reported. ``rows``: batches.
* ``generation``: where the rows of a batch end, and which tokens `generate` hides.
* ``model_layout``, ``model_probe``: which models, decided by their configuration and by what they compute.
"""

from kvservice_adapter.connectors.transformers.connector import TransformersConnector
from kvservice_adapter.connectors.transformers.model_layout import UnsupportedModel, layout_of
from kvservice_adapter.connectors.transformers.restoring import Restored
from kvservice_adapter.connectors.transformers.saving import Saved

__all__ = ["Restored", "Saved", "TransformersConnector", "UnsupportedModel", "layout_of"]
