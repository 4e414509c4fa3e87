"""The owner of the space of an upload, from its reservation until it is returned or a record names it."""

from __future__ import annotations

from typing import Protocol

from kvservice.blocks import Extent
from kvservice.tiers.dram import DramTier


class Space(Protocol):
    """The handling of an upload's space: a client that writes in place may still be writing there."""

    def reserved(self, extent: Extent) -> None:
        """The upload owns it from now on."""

    def returned(self, extent: Extent) -> None:
        """The upload does not need it any more, and no record has ever named it."""


class OwnSpace:
    """Space that only the daemon writes: it is free at once."""

    def __init__(self, dram: DramTier) -> None:
        self._dram = dram

    def reserved(self, extent: Extent) -> None:
        pass

    def returned(self, extent: Extent) -> None:
        self._dram.release(extent)
