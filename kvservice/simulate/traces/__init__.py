"""Reads traces as workloads: one file per format. A line that is not usable is refused with its number."""

from kvservice.simulate.traces.lines import TraceError
from kvservice.simulate.traces.read import FORMATS, read

__all__ = ["FORMATS", "TraceError", "read"]
