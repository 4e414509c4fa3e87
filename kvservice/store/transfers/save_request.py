"""What a client asks to save, and how that ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kvservice.blocks import Extent
from kvservice_api.errors import KVError
from kvservice_api.layout import Layout, Shard

SavePath = Literal["stream", "in_place", "cuda_ipc", "bulk"]  # How the bytes come to their places.


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """The blocks of a save, of one or more chains. A block that several of these have appears once for each."""

    layout_id: int
    layout: Layout
    shard: Shard
    parent_keys: Sequence[bytes]  # Of each block.
    keys: Sequence[bytes]
    token_counts: Sequence[int]


@dataclass(slots=True)
class SaveOutcome:
    """How a save ended, by position in its keys."""

    stored: list[int] = field(default_factory=list)
    already_stored: list[int] = field(default_factory=list)
    refused: dict[int, KVError] = field(default_factory=dict)


class Place(NamedTuple):
    """The offset of a block's image in the arena."""

    position: int  # Its position in the save's keys.
    extent: Extent
