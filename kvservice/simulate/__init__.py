"""Runs placement policies, the very classes of `kvservice.policy`, on traces and generated load.

``engine`` is the main loop and ``simulate``; ``server`` says whose turn it is, ``sessions`` and ``prefixes`` what a
turn reads, ``mover`` on ``residency``, ``space`` and ``channel`` what moves; ``account`` writes down the ``result``.
``bounds`` and ``clairvoyant`` are what no policy can do.
"""
