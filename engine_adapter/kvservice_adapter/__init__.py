"""What runs inside an engine: it knows the engine's cache, and keeps it in KVService.

* ``connectors``: one module an engine; the only ones that import the engine's package.
* ``load``, ``save``: layers come in, and are saved, while the engine computes; ``schedule`` says how far ahead.
* ``device``: what these need of the machine, one class a kind of device.
* ``bench``: what they do with a real model (`make bench-adapter`).
* ``demo``: a real conversation whose history comes back from the daemon (`make demo`).
"""
