"""Finds blocks in the daemon's files from outside, and damages them.

A block's bytes follow from its key, so a search for the bytes finds its place.
"""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Callable
from pathlib import Path

from kvservice_api.image import Trailer
from kvservice_client import Layout
from tests.daemon import DaemonProcess
from tests.integration.known_blocks import slice_bytes, slice_of


class Medium:
    """A file that holds blocks, seen from outside."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def flip(self, position: int, bit: int) -> None:
        with self._path.open("r+b") as file:
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 1 << bit]))

    def find(self, pattern: bytes) -> int:
        """The offset of these bytes in the file, which must have them once."""
        with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as whole:
            position = whole.find(pattern)
            assert position >= 0, "the bytes are not in the file"
            assert whole.find(pattern, position + 1) < 0, "the bytes are in the file twice"
            return position


Flip = Callable[[Medium, Layout, bytes, random.Random], None]


def flip_data(medium: Medium, layout: Layout, key: bytes, chooser: random.Random) -> None:
    layer, place = chooser.randrange(layout.layers), chooser.randrange(slice_bytes(layout))
    start = medium.find(slice_of(key, layer, slice_bytes(layout)).tobytes())
    medium.flip(start + place, chooser.randrange(8))


def flip_bit_of(medium: Medium, layout: Layout, key: bytes, layer: int) -> None:
    """Damage one layer of a block."""
    medium.flip(medium.find(slice_of(key, layer, slice_bytes(layout)).tobytes()) + 5, 0)


def flip_trailer(medium: Medium, layout: Layout, key: bytes, chooser: random.Random) -> None:
    # With the trailer's bytes before the key, because the next block's descriptor has the key too, as its parent.
    start = medium.find(b"KVTR" + struct.pack("<HH", 1, layout.layers) + key)
    medium.flip(start + chooser.randrange(Trailer.size_bytes(layout.layers)), chooser.randrange(8))


def ssd_file(daemon: DaemonProcess) -> Medium:
    return Medium(daemon.store / "ssd-000.kv")


def arena(daemon: DaemonProcess) -> Medium:
    return Medium(daemon.arena_folder / "arena")
