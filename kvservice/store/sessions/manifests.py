"""Changes of a session's manifest. Pure functions: no store, no clock, no I/O.

A history is its slices, one after another: slice i is read at the sum of the token counts before it::

    block        | A: 256 tokens       | B: 256 tokens       | C: 40, open tail |
    truncate keep       0..4, 500..552
    slices       | A 0..4 | B 244..256 | C 0..40 |     tip: the cut's key; C is closed now
    read at      0        4            16
    stored at    0        500          512             keys are rotated by the difference
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvservice.index.session_records import SLICE, Manifest, Positions, Slices
from kvservice_api.errors import InvalidRequest
from kvservice_api.keys import cut_key, kept_ranges
from kvservice_api.layout import Layout

KEEP_RANGES_MAX = 4096  # Per cut: they take a few milliseconds of the event loop.
_POSITION_MAX = 2**62  # So that sums of positions and counts fit into 63 bits.
NO_POSITIONS: Positions = np.empty(0, np.uint64)


class StoredSession(NamedTuple):
    manifest: Manifest
    layout: Layout


@dataclass(frozen=True, slots=True)
class SessionAppend:
    """The blocks of an append: they continue `parent_key`, and all except the last are full.

    Their keys were rotated at the positions from `stored_position` on, or at `stored_positions` (one per token), or,
    with neither, at the positions in the history where they are read.
    """

    parent_key: bytes
    keys: Sequence[bytes]
    last_block_tokens: int = 0  # 0 means full.
    stored_position: int | None = None
    stored_positions: Positions = dataclasses.field(default_factory=lambda: NO_POSITIONS)


@dataclass(frozen=True, slots=True)
class SessionContent:
    """A manifest of another daemon, as a client sends it: without the name, which `restored` adds."""

    revision: int
    tip: bytes
    tail_tokens: int
    cuts: int
    created_at_ms: int
    slices: Slices  # Their `positions_at` are within `positions`.
    positions: Positions


def begun(session_id: str, layout_id: int, layout: Layout, turn: SessionAppend, now_ms: int) -> Manifest:
    """A new session of one turn. Raises InvalidRequest."""
    slices, positions = _slices_of(turn, layout, read_at=0)
    tip, has_tail = _end(turn, slices, layout)
    return Manifest(session_id, layout_id, 1, tip, slices, positions, has_tail, 0, now_ms, now_ms, now_ms)


def appended(manifest: Manifest, layout: Layout, turn: SessionAppend) -> Manifest:
    """The manifest with the turn's blocks at its end; they replace an open tail. Raises InvalidRequest."""
    if turn.parent_key != manifest.tip:
        raise InvalidRequest(
            f"parent_key is {turn.parent_key.hex()}; the session's tip is {manifest.tip.hex()}", field="parent_key"
        )
    before = manifest.slices[:-1] if manifest.has_tail else manifest.slices
    slices, positions = _slices_of(turn, layout, read_at=int(before["token_count"].sum(dtype=np.uint64)))
    if manifest.has_tail:
        tail, first = manifest.slices[-1], slices[0]
        same = tail["key"].tobytes() == first["key"].tobytes()
        if not same and tail["block_tokens"] >= first["block_tokens"]:
            raise InvalidRequest(
                f"the first block has {first['block_tokens']} tokens; it must extend the session's open tail, "
                f"which has {tail['block_tokens']}",
                field="keys",
            )
    kept, kept_positions = _packed(before, manifest.positions)
    moved = slices.copy()
    moved["positions_at"][slices["positions_at"] >= 0] += len(kept_positions)
    tip, has_tail = _end(turn, slices, layout)
    return dataclasses.replace(
        manifest,
        revision=manifest.revision + 1,
        tip=tip,
        slices=np.concatenate([kept, moved]),
        positions=np.concatenate([kept_positions, positions]),
        has_tail=has_tail,
    )


def truncated(manifest: Manifest, keep: Sequence[tuple[int, int]]) -> Manifest:
    """The manifest with only the token ranges `keep`, (first, count) each. Unchanged if that is everything.

    Raises InvalidRequest if there is no range, or if ranges are empty, descending, overlapping, or past the end.
    """
    if not keep:
        raise InvalidRequest("keep is empty: to drop everything, end the session", field="keep")
    ranges = kept_ranges(keep, manifest.token_count)
    firsts, counts = ranges.T
    if len(firsts) == 1 and counts[0] == manifest.token_count:
        return manifest
    slices = manifest.slices
    ends = np.cumsum(slices["token_count"].astype(np.int64))
    starts = ends - slices["token_count"]
    # Each range has the slices from its first token's to its last token's.
    lowest = np.searchsorted(ends, firsts, "right")
    taken = np.searchsorted(starts, firsts + counts, "left") - lowest
    which = np.repeat(lowest - (np.cumsum(taken) - taken), taken) + np.arange(int(taken.sum()))
    first = np.maximum(np.repeat(firsts, taken), starts[which])
    count = np.minimum(np.repeat(firsts + counts, taken), ends[which]) - first
    skipped = first - starts[which]  # The slice's tokens before the kept ones.
    kept = slices[which].copy()
    kept["first_token"] += skipped.astype(np.uint32)
    kept["token_count"] = count
    kept["stored_position"][kept["stored_position"] >= 0] += skipped[kept["stored_position"] >= 0]
    listed = kept["positions_at"] >= 0
    kept["positions_at"][listed] += skipped[listed].astype(np.int32)
    kept, positions = _packed(kept, manifest.positions)
    tip = slices["key"][-1].tobytes() if manifest.has_tail else manifest.tip
    return dataclasses.replace(
        manifest,
        revision=manifest.revision + 1,
        tip=cut_key(tip, ranges),
        slices=kept,
        positions=positions,
        has_tail=False,
        cuts=manifest.cuts + 1,
    )


def forked(manifest: Manifest, session_id: str, now_ms: int) -> Manifest:
    """The same history under another id. Slices are shared: they are never changed."""
    return dataclasses.replace(
        manifest, session_id=session_id, revision=1, created_at_ms=now_ms, used_at_ms=now_ms, expires_at_ms=now_ms
    )


def restored(session_id: str, layout_id: int, layout: Layout, content: SessionContent, now_ms: int) -> Manifest:
    """The session of another daemon, used now. Raises InvalidRequest if its numbers contradict each other."""
    slices, last = content.slices, content.slices[-1]
    if not 1 <= content.revision < 2**63:
        raise InvalidRequest(f"revision is {content.revision}; it must be in 1..{2**63 - 1}", field="revision")
    firsts, counts = slices["first_token"].astype(np.int64), slices["token_count"].astype(np.int64)
    wrong = (counts < 1) | (firsts + counts > slices["block_tokens"]) | (slices["block_tokens"] > layout.block_tokens)
    if wrong.any():
        raise InvalidRequest(f"slice {int(wrong.argmax())} is not within its block", field="slices")
    is_whole = last["first_token"] == 0 and last["token_count"] == last["block_tokens"] < layout.block_tokens
    if content.tail_tokens and not (is_whole and last["token_count"] == content.tail_tokens):
        raise InvalidRequest(f"tail_tokens is {content.tail_tokens}; the last slice differs", field="tail_tokens")
    listed = slices["positions_at"] >= 0
    has_position = listed | (slices["stored_position"] >= 0)
    if (has_position != layout.rotated).any() or (listed & (slices["stored_position"] >= 0)).any():
        needed = "one position or one list of positions" if layout.rotated else "no position, as keys are not rotated"
        raise InvalidRequest(f"a slice of this layout has {needed}", field="stored_position")
    highest = max(int(slices["stored_position"].max()), int(content.positions.max(initial=0)))
    if highest >= _POSITION_MAX:
        raise InvalidRequest("a position is too large", field="stored_position")
    created_at_ms = min(content.created_at_ms, now_ms)
    return Manifest(
        session_id,
        layout_id,
        content.revision,
        content.tip,
        slices,
        content.positions,
        bool(content.tail_tokens),
        content.cuts,
        created_at_ms,
        now_ms,
        now_ms,
    )


def is_same_history(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests are equal in everything except their times."""
    return (
        (one.revision, one.tip, one.has_tail, one.cuts) == (other.revision, other.tip, other.has_tail, other.cuts)
        and one.slices.tobytes() == other.slices.tobytes()
        and np.array_equal(one.positions, other.positions)
    )


def partial_keys(manifest: Manifest, layout: Layout) -> set[bytes]:
    """The partial blocks that it names, which only sessions use."""
    slices = manifest.slices
    return set(slices["key"][slices["block_tokens"] < layout.block_tokens].tolist())


def _slices_of(turn: SessionAppend, layout: Layout, *, read_at: int) -> tuple[Slices, Positions]:
    count = len(turn.keys)
    last = turn.last_block_tokens or layout.block_tokens
    if last > layout.block_tokens:
        raise InvalidRequest(
            f"last_block_tokens is {last}; a block has at most {layout.block_tokens}", field="last_block_tokens"
        )
    slices = np.zeros(count, SLICE)
    slices["key"] = np.frombuffer(b"".join(turn.keys), "V32")
    slices["token_count"] = slices["block_tokens"] = layout.block_tokens
    slices["token_count"][-1] = slices["block_tokens"][-1] = last
    slices["positions_at"] = slices["stored_position"] = -1
    starts = np.cumsum(slices["token_count"].astype(np.int64)) - slices["token_count"]
    if not layout.rotated:
        if turn.stored_position is not None or len(turn.stored_positions):
            raise InvalidRequest("keys of this layout are not rotated: they have no position", field="stored_position")
        return slices, NO_POSITIONS
    if len(turn.stored_positions):
        tokens = int(slices["token_count"].sum(dtype=np.uint64))
        if turn.stored_position is not None or len(turn.stored_positions) != tokens:
            raise InvalidRequest(
                f"give stored_position, or one of stored_positions for each of {tokens} tokens; "
                f"{len(turn.stored_positions)} were sent",
                field="stored_positions",
            )
        if int(turn.stored_positions.max()) >= _POSITION_MAX:
            raise InvalidRequest("a position is too large", field="stored_positions")
        slices["positions_at"] = starts
        return slices, turn.stored_positions
    first = read_at if turn.stored_position is None else turn.stored_position
    if first >= _POSITION_MAX:
        raise InvalidRequest("stored_position is too large", field="stored_position")
    slices["stored_position"] = first + starts
    return slices, NO_POSITIONS


def _end(turn: SessionAppend, slices: Slices, layout: Layout) -> tuple[bytes, bool]:
    """The tip after a turn, and whether its last block is an open tail."""
    if slices["block_tokens"][-1] == layout.block_tokens:
        return turn.keys[-1], False
    return (turn.keys[-2] if len(turn.keys) > 1 else turn.parent_key), True


def _packed(slices: Slices, positions: Positions) -> tuple[Slices, Positions]:
    """The slices, with only the positions that they use."""
    listed = slices["positions_at"] >= 0
    if not listed.any():
        return slices, NO_POSITIONS
    counts = slices["token_count"][listed].astype(np.int64)
    ends = np.cumsum(counts)
    starts = ends - counts
    source = np.repeat(slices["positions_at"][listed] - starts, counts) + np.arange(int(ends[-1]))
    packed = slices.copy()
    packed["positions_at"][listed] = starts
    return packed, positions[source]
