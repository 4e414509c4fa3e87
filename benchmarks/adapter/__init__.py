"""Measures the adapter with a real model: ``python -m benchmarks.adapter NAME... [--write docs/benchmarks.md]``.

A measurement is a module here with a ``measure(quick: bool) -> Section``, named in ``MEASUREMENTS``. Each writes a
section of its own. ``rig`` has the shared parts: a daemon, a model, and a cache that waits for loads and queues saves.
"""

MEASUREMENTS = ("preload", "saving", "truncation", "ttft", "estimates", "mixed")
