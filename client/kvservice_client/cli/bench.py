"""``kvctl bench``: its measures are in ``benchmarks/`` of a checkout, which the wheel does not hold."""

from benchmarks.client.command import bench as bench
