"""What the adapter does with a real model: ``python -m benchmarks.adapter NAME... [--write docs/benchmarks.md]``.

A measurement is a module here with a ``measure(quick: bool) -> Section``, named in ``MEASUREMENTS``. Each writes a
section of its own. What several of them need is in ``rig``: a daemon, a model, a cache that waits and hands over.
"""

MEASUREMENTS = ("preload", "saving", "truncation", "ttft", "estimates", "mixed")
