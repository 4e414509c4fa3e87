"""The machine that an engine computes on: streams of work, copies between its pages and stored slices.

``base`` says what a pipeline needs of it, ``cpu`` does it with threads. ``load`` and ``save`` are
written once, on ``base``.
"""
