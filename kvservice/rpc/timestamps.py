"""Times on the wire."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(wall_ms: int) -> Timestamp:
    return Timestamp(seconds=wall_ms // 1000, nanos=wall_ms % 1000 * 1_000_000)


def known_timestamp(wall_ms: int) -> Timestamp | None:
    """None where 0 stands for a time that is not known."""
    return timestamp(wall_ms) if wall_ms else None
