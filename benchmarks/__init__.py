"""Measurements and experiments. They are run from a checkout and are not in the wheel.

* ``client``: the measures of ``kvctl bench`` (``make bench``); ``daemon``: those that need the daemon's own parts.
* ``adapter``: the adapter on a real model (``make bench-adapter``).
* ``policies``: the placement policies in the simulator (``make simulate``).
* ``report``: writes the results into a Markdown page.
"""
