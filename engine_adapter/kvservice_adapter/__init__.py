"""What runs inside an engine: it knows the engine's cache, and keeps it in KVService.

* ``connectors``: one module per engine; the only ones that import the engine's package.
* ``engine``: what every connector needs, and no engine.
* ``load``, ``save``: layers are loaded, and saved, while the engine computes; ``schedule`` says how far ahead.
* ``layer_source``: where the layers of a load come from.
* ``device``: what these need of the machine, one class per kind of device.
* ``bench``: what they do with a real model (`make bench-adapter`).
* ``demo``: a real conversation whose history comes back from the daemon (`make demo`).
"""
