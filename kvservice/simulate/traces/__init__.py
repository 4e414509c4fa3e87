"""Traces as workloads: one reader a format, each with its own file. What cannot be used is refused by line."""

from kvservice.simulate.traces.lines import TraceError
from kvservice.simulate.traces.read import FORMATS, read

__all__ = ["FORMATS", "TraceError", "read"]
