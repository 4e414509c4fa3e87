"""The kernel's limits for this process: memory, by its control groups, open files, and threads.

A process that takes more memory than its control group may have is killed without a message. The DRAM tier is
shared memory, which the kernel cannot take back, so the tier must stay below the limit from the start.
"""

from __future__ import annotations

import os
import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MIB = 2**20

# What a daemon needs beside its DRAM tier: 54 MiB of its own and 34 MiB of programs with 32 idle clients, 82 MiB of its
# own once one of them moves blocks of 32 MiB over gRPC, 217 MiB with eight (docs/container.md).
_RESERVE_BYTES_MIN = 192 * MIB
_RESERVE_SHARE = 16  # Of a large limit, one part in so many: a larger limit allows more clients and more blocks.

# An idle daemon has 33 files open: the store's, gRPC's pollers and sockets. gRPC ends the process by SIGSEGV
# where its poller gets none, so the start is refused well above that.
_OPEN_FILES_MIN = 64
_OPEN_FILES_PER_DRIVE = 2
_OPEN_FILES_ADVISED = 65_536  # Enough for most settings and for thousands of clients.

# An idle daemon on two cores has 27 threads, and on more cores up to 22 more, beside those that read and write drives.
# Where there are none, gRPC ends the process and Python's calls fail, so the start is refused above that.
_THREADS_MIN = 64

_ADDRESS_SPACE_BYTES = 1024 * MIB  # Stacks of the threads, and what the allocator reserves for them.

_NO_LIMIT_BYTES = 2**60  # Version 1 writes the largest number of pages there is where no limit is set.


class HostLimit(RuntimeError):
    """The kernel's limits for the process are too low. The message names the limit and what to change."""


class MemoryLimit(NamedTuple):
    size_bytes: int
    file: Path  # That holds the limit.


def memory_limit(proc: Path = Path("/proc"), root: Path = Path("/")) -> MemoryLimit | None:
    """The smallest memory limit of this process's control groups and of all groups above them; None without any.

    `proc` is where ``self/cgroup`` and ``self/mountinfo`` are read, `root` what mount points are below. Both
    versions of control groups are read. In a container the groups above the container's own may be out of sight.
    """
    groups = _groups("memory", proc, root)
    limits = [limit for folder, top, version in groups for limit in _limits(folder, top, version)]
    return min(limits, key=lambda limit: limit.size_bytes, default=None)


def reserve_bytes(limit_bytes: int) -> int:
    """The part of a memory limit that the process itself needs: its heap, libraries, and clients' streams."""
    return max(_RESERVE_BYTES_MIN, limit_bytes // _RESERVE_SHARE)


def available_memory_bytes(proc: Path = Path("/proc")) -> int | None:
    """Bytes available without swapping (MemAvailable); None if the kernel does not report it."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def raise_open_files_limit(drives: int, bulk_connections: int) -> None:
    """Raise the soft limit of open files to the hard limit. Raises HostLimit if that is too low.

    `bulk_connections` is how many connections the bulk port may have, 0 without one: strangers may open all of them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass  # The present limit may be enough.
    needed = _OPEN_FILES_MIN + _OPEN_FILES_PER_DRIVE * drives + bulk_connections
    if soft != resource.RLIM_INFINITY and soft < needed:
        enough = max(_OPEN_FILES_ADVISED, 2 * needed)
        raise HostLimit(
            f"too few open files are allowed: {soft} (RLIMIT_NOFILE), and the daemon needs at least {needed}, with "
            f"{bulk_connections} for server.bulk_connections_max, and two more per client; raise the limit with "
            f"`ulimit -n {enough}`, or LimitNOFILE={enough} in the systemd unit, or lower server.bulk_connections_max"
        )


def expect_threads(io_threads: int, proc: Path = Path("/proc"), root: Path = Path("/")) -> None:
    """Start as many threads as a daemon needs, and end them. Raises HostLimit if the kernel refuses one.

    Only a trial takes all limits into account: of the user, of the control groups, and of the memory for stacks.
    """
    needed = _THREADS_MIN + io_threads
    end = threading.Event()
    threads: list[threading.Thread] = []
    try:
        while len(threads) < needed:
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError):
        raise HostLimit(
            f"too few threads are allowed: {len(threads)}, and the daemon needs {needed}: {_thread_limit(proc, root)}"
        ) from None
    finally:
        end.set()
        for thread in threads:
            thread.join()


def expect_address_space(mapped_bytes: int) -> None:
    """Raises HostLimit if the process may not map `mapped_bytes` and what it needs beside them."""
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    needed_bytes = used_bytes + mapped_bytes + _ADDRESS_SPACE_BYTES
    if limit_bytes != resource.RLIM_INFINITY and needed_bytes > limit_bytes:
        raise HostLimit(
            f"RLIMIT_AS allows {limit_bytes // MIB} MiB of mappings, and the daemon needs {needed_bytes // MIB}: "
            "raise it with `ulimit -v unlimited`, or set dram.capacity_bytes lower"
        )


def _thread_limit(proc: Path, root: Path) -> str:
    """The limit that has refused a thread, and how to raise it."""
    for folder, top, _ in _groups("pids", proc, root):
        for group in _up_to(top, folder):
            most, now = _number(group / "pids.max"), _number(group / "pids.current")
            if most is not None and now is not None and now >= most:
                return f"{group / 'pids.max'} is {most}; raise it, or TasksMax= in the systemd unit"
    for name, option in (("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d")):  # Each thread has a stack.
        if (size := resource.getrlimit(getattr(resource, name))[0]) != resource.RLIM_INFINITY:
            return f"{name} is {size} bytes; raise it with `ulimit {option} unlimited`"
    most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    return (
        f"RLIMIT_NPROC is {most} for user {os.getuid()}; raise it with `ulimit -u`, or LimitNPROC= in the systemd unit"
    )


def _groups(controller: str, proc: Path, root: Path) -> Iterator[tuple[Path, Path, int]]:
    """(the process's group, the highest group in sight, version) per hierarchy that may have the controller."""
    try:
        memberships = (proc / "self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        mounts = (proc / "self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    paths: dict[int, str] = {}  # Version -> the group's path in its hierarchy.
    for line in memberships:
        number, _, rest = line.partition(":")  # 4:memory:/path, and of version 2 0::/path.
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    for line in mounts:
        # 36 35 98:0 /root /mount/point options [tags ...] - kind source options
        fields = line.split(" ")
        if "-" not in fields[:-1]:
            continue  # Not such a line.
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and controller in options else 0
        if version not in paths:
            continue
        top = root / _unescaped(fields[4]).lstrip("/")
        yield _folder_of(paths[version], _unescaped(fields[3]), top), top, version


def _folder_of(path: str, mounted: str, top: Path) -> Path:
    """Where the group `path` is, when the group `mounted` is mounted at `top`."""
    parts, base = Path(path).parts, Path(mounted).parts
    if parts[: len(base)] == base and ".." not in parts[len(base) :]:
        folder = top.joinpath(*parts[len(base) :])
        if folder.is_dir():
            return folder
    # The path is not in sight, as in a container that has the host's /proc names: what is mounted is its own group.
    return top


def _limits(folder: Path, top: Path, version: int) -> Iterator[MemoryLimit]:
    """The limits of a group and of those above it, up to `top`."""
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    for group in _up_to(top, folder):
        for name in names:
            if (size := _number(group / name)) is not None:
                yield MemoryLimit(size, group / name)
    if version == 1 and (size := _number(folder / "memory.stat", "hierarchical_memory_limit")) is not None:
        yield MemoryLimit(size, folder / "memory.stat")  # Groups that are not in sight count here too.


def _up_to(top: Path, folder: Path) -> Iterator[Path]:
    """The folder and those above it, up to `top`."""
    for group in (folder, *folder.parents):
        yield group
        if group == top:
            break


def _number(file: Path, field: str = "") -> int | None:
    """The number that a file, or a line of it, holds; None if there is none, or no limit."""
    try:
        text = file.read_text()
    except OSError:
        return None
    if field:
        text = next((line[len(field) :] for line in text.splitlines() if line.startswith(f"{field} ")), "")
    text = text.strip()
    return int(text) if text.isdecimal() and int(text) < _NO_LIMIT_BYTES else None


def _unescaped(text: str) -> str:
    """A path of mountinfo, where spaces and such are written as ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
