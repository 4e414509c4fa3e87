"""A session's manifest as the message that travels: in answers, in lists, and with SESSION_CHANGED."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvservice.rpc.messages import timestamp
from kvservice.store.types import Manifest, StoredSession
from kvservice_api.errors import SessionChanged
from kvservice_api.layout import Layout
from kvservice_api.v1 import sessions_pb2 as pb

_STATUS_BYTES_MAX = 5120  # Of a session in an error: with base64 and the rest, a status may have 8 KiB.


@contextmanager
def change_refused() -> Iterator[None]:
    """A SessionChanged that is raised inside takes the session's message along."""
    try:
        yield
    except SessionChanged as error:
        error.attached = session_message(error.now, bytes_max=_STATUS_BYTES_MAX)
        raise


def session_message(session: StoredSession, *, bytes_max: int | None = None) -> pb.Session:
    """With its slices, unless the message would have more than `bytes_max` then; 0 leaves them out."""
    manifest, layout = session
    message = pb.Session(
        session_id=manifest.session_id,
        layout_fingerprint=layout.fingerprint,
        revision=manifest.revision,
        tip=manifest.tip,
        tail_tokens=manifest.tail_tokens,
        token_count=manifest.token_count,
        slice_count=len(manifest.slices),
        cuts=manifest.cuts,
        created_at=timestamp(manifest.created_at_ms),
        used_at=timestamp(manifest.used_at_ms),
        expires_at=timestamp(manifest.expires_at_ms),
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
