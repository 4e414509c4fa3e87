"""What policies have learned, in one small file, so that it survives a restart.

The file has a header, for each policy its name and its bytes, and a checksum of all that. It is replaced as a whole. A
file that is damaged, of a newer version or of another kind is not used: policies then learn again.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from pathlib import Path

from kvservice.durable_files import write_durably

log = logging.getLogger(__name__)

LEARNED_NAME = "learned"  # In the store's folder.
_MARK, _VERSION = b"KVLEARND", 1
_HEADER = struct.Struct("<8sII")  # The mark, the version, and the number of entries.
_ENTRY = struct.Struct("<II")  # Bytes of the name, which follows, and of what the policy has learned, which comes next.
_CHECKSUM_BYTES = 32
_FILE_BYTES_MAX = 4 << 20


class LearnedCounts:
    """By the names of policies. Call it on one thread, except `write`."""

    def __init__(self, path: Path | None) -> None:
        """Reads the file, if there is one. Without a path, nothing survives the process."""
        self._path = path
        self._states = {} if path is None else _read(path)

    def of(self, name: str) -> bytes:
        """What the policy of this name had learned; empty if nothing is known."""
        return self._states.get(name, b"")

    def keep(self, name: str, state: bytes) -> bytes | None:
        """Remember it instead of the last one. Returns what `write` should write; None if nothing has changed."""
        if not state or self._states.get(name) == state:
            return None
        self._states[name] = state
        return packed(self._states)

    def write(self, data: bytes) -> None:
        """Replace the file. May be called on any thread. Raises OSError; the old file is then whole."""
        if self._path is not None:
            write_durably(self._path, data)


def packed(states: dict[str, bytes]) -> bytes:
    """The bytes of the file."""
    parts = [_HEADER.pack(_MARK, _VERSION, len(states))]
    for name, state in states.items():
        parts += [_ENTRY.pack(len(name.encode()), len(state)), name.encode(), state]
    data = b"".join(parts)
    return data + hashlib.sha256(data).digest()


def unpacked(data: bytes) -> dict[str, bytes]:
    """What `packed` was given. Raises ValueError, which says what is wrong with the bytes."""
    content, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if len(content) < _HEADER.size or not content.startswith(_MARK):
        raise ValueError("it is not a file of this kind")
    _, version, count = _HEADER.unpack_from(content)
    if version > _VERSION:
        raise ValueError(f"it is of the newer version {version}")
    if hashlib.sha256(content).digest() != checksum:
        raise ValueError("it is damaged")
    states, at = {}, _HEADER.size
    for _ in range(count):
        name_bytes, state_bytes = _ENTRY.unpack_from(content, at)
        begin = at + _ENTRY.size + name_bytes
        states[content[at + _ENTRY.size : begin].decode()] = content[begin : begin + state_bytes]
        at = begin + state_bytes
    return states


def _read(path: Path) -> dict[str, bytes]:
    try:
        with open(path, "rb") as file:
            return unpacked(file.read(_FILE_BYTES_MAX))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("what policies had learned is not used, they learn again: %s: %s", path, error)
        return {}
