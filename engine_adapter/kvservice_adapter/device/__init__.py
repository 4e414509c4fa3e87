"""The machine that an engine computes on: streams of work, copies between its pages and stored slices.

* ``base``: what a pipeline needs of it. ``cpu`` does it with threads.
* ``arrays``: where an array of any library has its elements. ``rotation``: rotates keys to other positions.

No module here imports torch (`torch_device` beside it does). ``load`` and ``save`` are written once, on ``base``.
"""
