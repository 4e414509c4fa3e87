"""Measurements and experiments. They are run from a checkout and are not in the wheel.

* ``client``: the measures of ``kvctl bench`` (``make bench``); ``daemon``: those that need the daemon's own parts.
* ``adapter``: the adapter on a real model (``make bench-adapter``).
* ``peers``: KVService beside other stores (``make bench-peers``).
* ``gpu``: the GPU path (``make gpu-bench``), and a rehearsal of it without a GPU.
* ``policies``: the placement policies in the simulator (``make simulate``).
* ``report``: writes the results into a Markdown page; ``leftovers``: a program that is ended leaves nothing behind.
"""
