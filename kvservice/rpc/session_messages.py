"""A session's manifest as a message: in answers, in lists, and with SESSION_CHANGED."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvservice.rpc.messages import timestamp
from kvservice.store.types import POSITIONS_MAX, SLICE, Manifest, SessionContent, StoredSession
from kvservice_api.errors import InvalidRequest, SessionChanged
from kvservice_api.keys import KEY_BYTES, split_keys
from kvservice_api.layout import Layout
from kvservice_api.v1 import sessions_pb2 as pb

_STATUS_BYTES_MAX = 5120  # For a session in an error: with base64 and the other fields, a status may have 8 KiB.


@contextmanager
def change_refused() -> Iterator[None]:
    """Attaches the session's message to a SessionChanged that is raised inside."""
    try:
        yield
    except SessionChanged as error:
        error.attached = session_message(error.now, bytes_max=_STATUS_BYTES_MAX)
        raise


def session_message(session: StoredSession, *, bytes_max: int | None = None) -> pb.Session:
    """With its slices, unless the message would exceed `bytes_max` bytes; 0 leaves them out."""
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


def session_content(message: pb.Session, slices_max: int) -> SessionContent:
    """The manifest in a message with slices. Raises InvalidRequest, for example if columns differ in length."""
    if len(message.tip) != KEY_BYTES:
        raise InvalidRequest(f"tip has {len(message.tip)} bytes, not {KEY_BYTES}", field="tip")
    columns = message.slices
    keys = split_keys(columns.keys, field="slices", count_max=slices_max)
    slices = np.zeros(len(keys), SLICE)
    slices["key"] = np.frombuffer(columns.keys, f"V{KEY_BYTES}")
    slices["positions_at"] = slices["stored_position"] = -1
    for name in ("first_token", "token_count", "block_tokens", "stored_position"):
        values = getattr(columns, name)
        if len(values) == len(keys):
            slices[name] = values
        elif values or name != "stored_position":
            raise InvalidRequest(f"{name} has {len(values)} entries for {len(keys)} slices", field=name)
    positions: list[int] = []
    last = -1
    for each in columns.positions:
        if not last < each.slice < len(keys) or len(each.positions) != slices["token_count"][each.slice]:
            raise InvalidRequest(f"positions of slice {each.slice} are not one per token", field="positions")
        last = each.slice
        slices["positions_at"][last] = len(positions)
        positions += each.positions
        if len(positions) > POSITIONS_MAX:
            raise InvalidRequest(f"there are more than {POSITIONS_MAX} positions", field="positions")
    tokens = int(slices["token_count"].sum(dtype=np.uint64))
    if (message.token_count, message.slice_count) != (tokens, len(keys)):
        raise InvalidRequest(f"the slices are {len(keys)} with {tokens} tokens", field="token_count")
    try:
        created_at_ms = max(0, message.created_at.ToMilliseconds())
    except ValueError as error:
        raise InvalidRequest(f"created_at is no time: {error}", field="created_at") from error
    content = np.array(positions, np.uint64)
    return SessionContent(
        message.revision, message.tip, message.tail_tokens, message.cuts, created_at_ms, slices, content
    )
