"""The measurements of ``kvctl bench``: KVService's speed beside this machine's limits.

Every figure of ours is beside the limit it is compared with, measured in the same run, before
and after: ``rounds``. Limits are in ``limits``, ours over the wire in ``wire``, the disk and the
index are measured by ``benchmarks.daemon`` (``parts``), and ``report`` puts it all together.
"""
