"""An observer of the daemon's arena in a client's process. Imports no torch: a test starts a process that uses it."""

from __future__ import annotations

from kvservice_api.errors import KVError
from kvservice_client import BlockCache, Layout
from kvservice_client.buffers import Bytes

LAYOUT = Layout("observed", "float16", layers=2, kv_heads=1, k_head_dim=8, v_head_dim=8, block_tokens=8)


class Observer:
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.aliases: list[tuple[Bytes, Bytes]] = []
        self.parts: list[tuple[int, int]] = []  # Of the newest mapping.
        self.size_bytes = 0
        self.forgotten: list[int] = []  # Addresses.

    def alias(self, memory: Bytes, of: Bytes) -> None:
        self.aliases.append((memory, of))
        self.parts, self.size_bytes = [], of.size

    def register(self, memory: Bytes, begin: int, end: int) -> None:
        self.parts.append((begin, end))

    def forget(self, memory: Bytes) -> None:
        memory[:1].copy()  # It is mapped still.
        self.forgotten.append(memory.ctypes.data)

    @property
    def has_all(self) -> bool:
        """Whether all of the newest mapping is registered, from its beginning on without a gap."""
        end = 0
        for begin, part_end in self.parts:
            assert begin == end
            end = part_end
        return 0 < end == self.size_bytes


def answers(blocks: BlockCache) -> bool:
    try:
        blocks.ping()
    except KVError:
        return False
    return True
