"""KVService beside other stores on this machine: ``make bench-peers``, or ``python -m benchmarks.peers``.

* ``environments``: a virtual environment for each peer, with pinned packages, in ``.peers/``.
* ``systems``: what is compared, in three groups: between hosts, on one host, and from a cold disk.
* ``drivers``: a program for each system, run in its environment; ``processes`` runs them, and ends them.
* ``rounds``: all systems in turns, in an order that rotates; ``report``: the figures, the table and the plot.
"""
