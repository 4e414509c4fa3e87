"""Reads traces as workloads: one file per format. A line that is not usable is refused with its number."""

from kvservice.simulate.traces.lines import TraceError
from kvservice.simulate.traces.read import FORMATS, WITH_BLOCKS, WITHOUT_CLOCK, format_of, read

__all__ = ["FORMATS", "WITHOUT_CLOCK", "WITH_BLOCKS", "TraceError", "format_of", "read"]
