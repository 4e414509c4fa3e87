"""The part of KVService that runs inside an engine: it loads the engine's KV cache from the daemon, and saves it there.

* ``connectors``: one module per engine; the only ones that import the engine's package.
* ``engine``: what every connector needs, and no engine.
* ``load``, ``save``: layers are loaded, and saved, while the engine computes; ``schedule`` says how far ahead.
* ``layer_source``: where the layers of a load come from.
* ``device``: streams and copies, one class per kind of device.
"""
