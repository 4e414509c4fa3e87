"""Limits of memory and threads of both versions of control groups, read from test trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from kvservice.host_limits import (
    HostLimit,
    MemoryLimit,
    available_memory_bytes,
    expect_threads,
    memory_limit,
    reserve_bytes,
)

MIB = 2**20
V1_NO_LIMIT = 9223372036854771712
V1_MOUNT = "35 31 0:32 {mounted} {at} rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {mounted} {at} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
OTHER_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
"""


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., MemoryLimit | None]:
    """The limit for this content of /proc, and these files below the root."""

    def find(cgroup: str, mounts: str, files: Mapping[str, object]) -> MemoryLimit | None:
        proc = tmp_path / "proc"
        (proc / "self").mkdir(parents=True, exist_ok=True)
        (proc / "self/cgroup").write_text(cgroup)
        (proc / "self/mountinfo").write_text(OTHER_MOUNTS + mounts + "\n")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        found = memory_limit(proc, tmp_path)
        return found and MemoryLimit(found.size_bytes, found.file.relative_to(tmp_path))

    return find


def v1(mounted: str = "/", at: str = "/sys/fs/cgroup/memory") -> str:
    return V1_MOUNT.format(mounted=mounted, at=at)


def v2(mounted: str = "/", at: str = "/sys/fs/cgroup") -> str:
    return V2_MOUNT.format(mounted=mounted, at=at)


Host = Callable[..., MemoryLimit | None]


@pytest.mark.parametrize("smallest", ["", "/kubepods", "/kubepods/pod-7", "/kubepods/pod-7/daemon"])
def test_of_version_2_the_smallest_limit_of_the_group_and_those_above_counts(host: Host, smallest: str) -> None:
    files = {
        f"sys/fs/cgroup{group}/memory.max": "max" if not group else 800 * MIB
        for group in ("", "/kubepods", "/kubepods/pod-7", "/kubepods/pod-7/daemon")
    }
    file = f"sys/fs/cgroup{smallest}/memory.max"
    files[file] = 400 * MIB
    assert host("0::/kubepods/pod-7/daemon\n", v2(), files) == MemoryLimit(400 * MIB, Path(file))


def test_of_version_2_the_size_from_which_the_kernel_throttles_counts_too(host: Host) -> None:
    files = {
        "sys/fs/cgroup/system.slice/kv.service/memory.max": 900 * MIB,
        "sys/fs/cgroup/system.slice/kv.service/memory.high": 700 * MIB,
    }
    found = host("0::/system.slice/kv.service\n", v2(), files)
    assert found == MemoryLimit(700 * MIB, Path("sys/fs/cgroup/system.slice/kv.service/memory.high"))


def test_a_line_of_mounts_without_its_separator_is_left_out(host: Host) -> None:
    broken = "36 35 98:0 / /mnt rw,noatime\n36 35 98:0 / /mnt rw -\n"
    file = "sys/fs/cgroup/a/memory.max"
    assert host("0::/a\n", broken + v2(), {file: 400 * MIB}) == MemoryLimit(400 * MIB, Path(file))


def test_of_version_2_max_is_no_limit(host: Host) -> None:
    files = {"sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/a/memory.high": "max"}
    assert host("0::/a\n", v2(), files) is None


@pytest.mark.parametrize("smallest", ["/docker", "/docker/0c0e"])
def test_of_version_1_the_smallest_limit_of_the_group_and_those_above_counts(host: Host, smallest: str) -> None:
    files = {f"sys/fs/cgroup/memory{group}/memory.limit_in_bytes": V1_NO_LIMIT for group in ("", "/docker/0c0e")}
    file = f"sys/fs/cgroup/memory{smallest}/memory.limit_in_bytes"
    found = host("4:memory:/docker/0c0e\n0::/\n", v1(), files | {file: 300 * MIB})
    assert found == MemoryLimit(300 * MIB, Path(file))


def test_in_version_1_the_number_for_unlimited_is_not_a_limit(host: Host) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NO_LIMIT,
        "sys/fs/cgroup/memory/memory.stat": f"cache 4096\nhierarchical_memory_limit {V1_NO_LIMIT}",
    }
    assert host("4:memory:/\n", v1(), files) is None


def test_of_version_1_a_group_out_of_sight_counts_by_what_the_kernel_sums_up(host: Host) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 900 * MIB,
        "sys/fs/cgroup/memory/memory.stat": f"cache 1\nhierarchical_memory_limit {200 * MIB}\ntotal_cache 1",
    }
    found = host("9:memory:/docker/0c0e\n", v1(mounted="/docker/0c0e"), files)
    assert found == MemoryLimit(200 * MIB, Path("sys/fs/cgroup/memory/memory.stat"))


@pytest.mark.parametrize(
    ("cgroup", "mounted"),
    [
        ("0::/\n", "/"),  # A namespace of its own.
        ("0::/system.slice/docker-0c0e.scope\n", "/system.slice/docker-0c0e.scope"),  # The host's names.
        ("0::/system.slice/docker-0c0e.scope\n", "/elsewhere"),  # Names that contradict each other.
        ("0::/../other\n", "/"),  # The process was moved out of its namespace.
        ("0::/../../system.slice/x\n", "/../.."),
    ],
)
def test_in_a_container_the_limit_of_what_is_mounted_counts(host: Host, cgroup: str, mounted: str) -> None:
    files = {"sys/fs/cgroup/memory.max": 256 * MIB}
    assert host(cgroup, v2(mounted=mounted), files) == MemoryLimit(256 * MIB, Path("sys/fs/cgroup/memory.max"))


def test_a_part_of_the_tree_that_is_mounted_is_followed_down_to_the_group(host: Host) -> None:
    files = {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/b/memory.max": 64 * MIB}
    assert host("0::/a/b\n", v2(mounted="/a"), files) == MemoryLimit(64 * MIB, Path("sys/fs/cgroup/b/memory.max"))


def test_of_both_versions_at_once_the_smaller_limit_counts(host: Host) -> None:
    files = {
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 300 * MIB,
        "sys/fs/cgroup/unified/b/memory.max": 200 * MIB,
    }
    mounts = v1() + "\n" + v2(at="/sys/fs/cgroup/unified")
    found = host("4:cpu,memory:/a\n0::/b\n", mounts, files)
    assert found == MemoryLimit(200 * MIB, Path("sys/fs/cgroup/unified/b/memory.max"))


def test_a_mount_point_with_a_space_is_found(host: Host) -> None:
    files = {"my groups/a/memory.max": 100 * MIB}
    assert host("0::/a\n", v2(at="/my\\040groups"), files) == MemoryLimit(100 * MIB, Path("my groups/a/memory.max"))


@pytest.mark.parametrize("text", ["", "many", "-1", "12 34"])
def test_a_file_that_holds_no_size_is_no_limit(host: Host, text: str) -> None:
    assert host("0::/a\n", v2(), {"sys/fs/cgroup/a/memory.max": text}) is None


def test_without_proc_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path, tmp_path) is None
    assert available_memory_bytes(tmp_path) is None


def test_available_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       24684092 kB\nMemAvailable:   1024 kB\nSwapTotal: 0 kB\n")
    assert available_memory_bytes(tmp_path) == MIB


def test_the_daemon_keeps_192_mib_or_a_sixteenth_of_the_limit_whichever_is_more() -> None:
    assert reserve_bytes(400 * MIB) == 192 * MIB
    assert reserve_bytes(16384 * MIB) == 1024 * MIB


class NoThread:
    def __init__(self, **_: object) -> None:
        pass

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


V1_PIDS = "36 31 0:33 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids"


@pytest.mark.parametrize(
    ("cgroup", "mount", "file"),
    [
        ("4:pids:/a\n0::/\n", V1_PIDS, "sys/fs/cgroup/pids/a/pids.max"),
        ("0::/a/b\n", v2(), "sys/fs/cgroup/a/pids.max"),
    ],
)
def test_the_control_group_that_refuses_a_thread_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, mount: str, file: str
) -> None:
    monkeypatch.setattr("threading.Thread", NoThread)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    (tmp_path / "proc/self/mountinfo").write_text(f"{mount}\n")
    limit = tmp_path / file
    (limit.parent / "b").mkdir(parents=True)
    limit.write_text("30\n")
    limit.with_name("pids.current").write_text("30\n")

    with pytest.raises(HostLimit) as refused:
        expect_threads(4, tmp_path / "proc", tmp_path)
    why = f"{limit} is 30; raise it, or TasksMax= in the systemd unit"
    assert str(refused.value) == f"too few threads are allowed: 0, and the daemon needs 68: {why}"
