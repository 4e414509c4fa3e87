"""What runs inside an engine: it knows the engine's cache, and keeps it in KVService.

* ``connectors``: one module an engine; the only ones that import the engine's package.
* ``demo``: a real conversation whose history comes back from the daemon (`make demo`).
"""
