"""What is compared: the groups, and the systems of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20
SIZES = (1 * MIB, 4 * MIB, 8 * MIB, 32 * MIB)
CLIENTS = (1, 4)


@dataclass(frozen=True)
class System:
    """One row of the table. `name` is the one for `--only`; `environment` is None for this interpreter."""

    name: str
    title: str
    driver: str  # A module of `benchmarks.peers.drivers`.
    environment: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "peer"  # Or `ours`, or `limit`.
    is_stopped_between_turns: bool = False  # By SIGSTOP: its idle threads would take time from the others.

    @property
    def is_in_place(self) -> bool:
        """Whether its gets leave the bytes where they are: it is compared with others that do."""
        return bool(self.options.get("view"))


@dataclass(frozen=True)
class Group:
    """Systems that are compared with each other. `bytes_moved` are those of all clients in one put or get."""

    name: str
    title: str
    bytes_moved: int
    systems: tuple[System, ...]

    @property
    def stored_bytes(self) -> int:
        """The most that is stored at a time: four clients have a block of the largest size at least."""
        return max(self.bytes_moved, max(CLIENTS) * max(SIZES))

    def bytes_per_client(self, clients: int) -> int:
        return max(self.bytes_moved // clients, max(SIZES))

    def blocks_per_client(self, block_bytes: int, clients: int) -> int:
        return max(1, self.bytes_moved // clients // block_bytes)


def _ours(name: str, title: str, **options: Any) -> System:
    return System(name, f"KVService, {title}", "kvservice_daemon", None, options, "ours")


def _limit(name: str, title: str, driver: str, **options: Any) -> System:
    return System(name, title, driver, None, options, "limit")


GROUPS = (
    Group(
        "remote",
        "Between hosts (TCP on loopback)",
        128 * MIB,
        (
            _limit("tcp-1", "raw TCP, 1 connection a client", "raw_tcp", connections=1),
            _limit("tcp-2", "raw TCP, 2 connections a client", "raw_tcp", connections=2),
            _ours("bulk", "bulk", transport="bulk"),
            _ours("grpc", "grpc", transport="grpc"),
            System("redis", "Redis", "redis_server", "redis"),
            System("lm", "LMCache server (lm://)", "lmcache_server", "lmcache"),
            System("mp-tcp", "LMCache multi-process, TCP", "lmcache_mp", "lmcache", {"mode": "pickle"}),
            System("mooncake", "Mooncake Store, TCP", "mooncake_store", "mooncake"),
            System("nixl-ucx", "NIXL, UCX over TCP", "nixl_ucx", "nixl", is_stopped_between_turns=True),
        ),
    ),
    Group(
        "same-host",
        "On one host",
        256 * MIB,
        (
            _limit("memcpy-1", "memcpy, 1 thread a client", "raw_memory", threads=1),
            _limit("memcpy-2", "memcpy, 2 threads a client", "raw_memory", threads=2),
            _ours("shm", "shm", transport="shm"),
            _ours("view", "shm, in place, viewed before, every page touched", transport="shm", view=True),
            _ours(
                "first-view", "shm, in place, first view, every page touched", transport="shm", view=True, first=True
            ),
            System("mp-shm", "LMCache multi-process, shm", "lmcache_mp", "lmcache", {"mode": "shm"}),
            System("local-cpu", "LMCache local CPU, copied out", "lmcache_local", "lmcache", {"tier": "cpu"}),
            System(
                "local-view",
                "LMCache local CPU, in place, every page touched",
                "lmcache_local",
                "lmcache",
                {"tier": "cpu", "view": True},
            ),
        ),
    ),
    Group(
        "ssd",
        "From SSD, cold",
        128 * MIB,
        (
            _limit("direct-1", "O_DIRECT, 1 thread a client", "raw_disk", threads=1),
            _limit("direct-2", "O_DIRECT, 2 threads a client", "raw_disk", threads=2),
            _limit("direct-4", "O_DIRECT, 4 threads a client", "raw_disk", threads=4),  # As many as the daemon has.
            _ours("ssd", "SSD to shm", transport="shm", ssd=True),
            System("local-disk", "LMCache local disk", "lmcache_local", "lmcache", {"tier": "disk"}),
            System(
                "local-direct",
                "LMCache local disk, O_DIRECT",
                "lmcache_local",
                "lmcache",
                {"tier": "disk", "direct": True},
            ),
            System("nixl-posix", "NIXL, POSIX", "nixl_posix", "nixl"),
        ),
    ),
)


def named(names: Iterable[str]) -> set[str]:
    """Raises ValueError for a name that no system has."""
    known = {system.name for group in GROUPS for system in group.systems}
    if unknown := set(names) - known:
        raise ValueError(f"no system is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return set(names)
