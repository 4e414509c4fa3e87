"""A session's manifest as the message that travels: in answers, in lists, and with SESSION_CHANGED."""

from __future__ import annotations

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from kvservice.index.session_records import Manifest
from kvservice_api.layout import Layout
from kvservice_api.v1 import sessions_pb2 as pb


def session_message(manifest: Manifest, layout: Layout, *, bytes_max: int | None = None) -> pb.Session:
    """With its slices, unless the message would have more than `bytes_max` then; 0 leaves them out."""
    message = pb.Session(
        session_id=manifest.session_id,
        layout_fingerprint=layout.fingerprint,
        revision=manifest.revision,
        tip=manifest.tip,
        tail_tokens=manifest.tail_tokens,
        token_count=manifest.token_count,
        slice_count=len(manifest.slices),
        cuts=manifest.cuts,
        created_at=_timestamp(manifest.created_at_ms),
        used_at=_timestamp(manifest.used_at_ms),
        expires_at=_timestamp(manifest.expires_at_ms),
    )
    if bytes_max is not None and len(manifest.slices) * manifest.slices["key"].itemsize >= bytes_max:
        return message
    message.slices.CopyFrom(_slices(manifest, layout))
    if bytes_max is not None and message.ByteSize() > bytes_max:
        message.ClearField("slices")
    return message


def _slices(manifest: Manifest, layout: Layout) -> pb.SessionSlices:
    slices = manifest.slices
    message = pb.SessionSlices(
        keys=slices["key"].tobytes(),
        first_token=slices["first_token"].tolist(),
        token_count=slices["token_count"].tolist(),
        block_tokens=slices["block_tokens"].tolist(),
        stored_position=slices["stored_position"].tolist() if layout.rotated else [],
    )
    for which in np.flatnonzero(slices["positions_at"] >= 0).tolist():
        start, count = int(slices["positions_at"][which]), int(slices["token_count"][which])
        message.positions.add(slice=which, positions=manifest.positions[start : start + count].tolist())
    return message


def _timestamp(wall_ms: int) -> Timestamp:
    return Timestamp(seconds=wall_ms // 1000, nanos=wall_ms % 1000 * 1_000_000)
