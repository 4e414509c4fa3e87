"""A daemon that may have little memory, few threads or few open files: a smaller tier or a refusal, never a signal."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from kvservice.config_sources import load_settings
from kvservice.daemon import Daemon
from kvservice_api.errors import DaemonUnavailable
from kvservice_client import Durability
from tests.control_groups import memory_group, threads_group
from tests.daemon import MIB, DaemonProcess, until
from tests.integration.known_blocks import LARGE, new_chain, save, verify

ASKED = 1024 * MIB
TRANSPORTS: tuple[Literal["grpc", "shm"], ...] = ("grpc", "shm")


@pytest.mark.parametrize("transport", ["grpc", pytest.param("shm", marks=pytest.mark.slow)])
def test_a_memory_limit_below_the_dram_tier_makes_a_smaller_tier_which_may_be_filled(
    tmp_path: Path, transport: Literal["grpc", "shm"]
) -> None:
    """Past the limit the kernel would kill the daemon: exit code -9.

    With LRU, because the daemon warns of any other policy that has not answered after 0.1 s, as on a busy machine.
    """
    with (
        memory_group(400 * MIB) as group,
        DaemonProcess(
            tmp_path,
            program=group.program(),
            dram__capacity_bytes=ASKED,
            ssd__capacity_bytes=512 * MIB,
            mover__policy="lru",
        ) as daemon,
        daemon.client(transport=transport) as client,
    ):
        until(lambda: bool(client.admin.status().dram.short_because), timeout_s=60.0)  # The arena is prepared then.
        status = client.admin.status()
        assert 180 * MIB < status.dram.capacity_bytes < 208 * MIB
        assert status.dram.configured_bytes > 1000 * MIB
        assert str(group.limit_file) in status.dram.short_because

        command = [sys.executable, "-c", "from kvctl import main; main()", "status"]
        environment = {**os.environ, "KVCTL_ADDRESS": daemon.address}
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment).stdout
        assert "DRAM is smaller than configured" in " ".join(shown.split())
        assert str(group.limit_file) in "".join(shown.split())

        chains = [new_chain(LARGE, 64) for _ in range(24)]  # 288 MiB: more than the tier has, less than the SSD's.
        for chain in chains:
            assert save(client, LARGE, chain, Durability.SSD, timeout_s=60).stored == 64
        for chain in chains[::4]:  # Of those that DRAM still has, and of those that only the SSD has.
            verify(client, LARGE, chain)
        assert group.peak_bytes <= 400 * MIB

        warnings = [line["event"] for line in daemon.log if line["level"] == "warning"]
        assert len(warnings) == 1, warnings
        for part in ("made smaller", "1024 MiB", "400 MiB", "dram.capacity_bytes", str(group.limit_file)):
            assert part in warnings[0]
        assert daemon.stop() == 0


def test_a_tier_that_a_memory_limit_made_smaller_is_found_again_by_the_next_daemon(tmp_path: Path) -> None:
    with (
        memory_group(400 * MIB) as group,
        DaemonProcess(tmp_path, program=group.program(), dram__capacity_bytes=ASKED, ssd__capacity_bytes=0) as daemon,
    ):
        chain = new_chain(LARGE, 64)
        with daemon.client() as client:
            save(client, LARGE, chain)
        daemon.kill()
        daemon.start()
        assert not daemon.logged("the DRAM tier starts empty")
        with daemon.client() as client:
            verify(client, LARGE, chain)


def test_a_memory_limit_that_leaves_too_little_for_a_dram_tier_is_refused_and_named(tmp_path: Path) -> None:
    with memory_group(200 * MIB) as group:
        daemon = DaemonProcess(tmp_path, program=group.program(), dram__capacity_bytes=ASKED)
        try:
            daemon.launch()
            assert daemon.wait_for_end() == 1
            for part in (str(group.limit_file), "200 MiB", "dram.capacity_bytes", "1024 MiB", "allow at least"):
                assert part in daemon.lines[-1]
            assert not daemon.store.exists()
        finally:
            daemon.remove()


def test_a_memory_limit_that_holds_tier_and_daemon_changes_nothing(tmp_path: Path) -> None:
    with (
        memory_group(400 * MIB) as group,
        DaemonProcess(tmp_path, program=group.program(), dram__capacity_bytes=64 * MIB) as daemon,
        daemon.client() as client,
    ):
        until(lambda: client.admin.status().dram.capacity_bytes == client.admin.status().dram.configured_bytes)
        assert client.admin.status().dram.short_because == ""
        assert not [line for line in daemon.log if line["level"] == "warning"]


@pytest.mark.parametrize("available_mib", [0, 20, 4096])
async def test_a_tier_larger_than_the_memory_that_is_available_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, available_mib: int
) -> None:
    """Only here the kernel's answer is simulated, because a real shortage would affect all other processes."""
    monkeypatch.setattr("kvservice.store_opening.available_memory_bytes", lambda: available_mib * MIB)
    process = DaemonProcess(tmp_path)  # Only for its settings; it is not started.
    try:
        flags = [f"--{name}={value}" for name, value in process.settings.items()]
        daemon = await Daemon.open(load_settings([*flags, "--server.address=127.0.0.1:0"], {}))
        await daemon.close()
    finally:
        process.remove()
    warnings = [record.getMessage() for record in caplog.records if "MemAvailable" in record.getMessage()]
    assert len(warnings) == (available_mib < 60)
    assert all("dram.capacity_bytes" in text and f"{available_mib} MiB available" in text for text in warnings)


def limited(soft: int, hard: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "files", [12, 28, 321, *(pytest.param(each, marks=pytest.mark.slow) for each in (16, 20, 24, 32, 40))]
)
def test_too_few_open_files_are_refused_before_a_store_is_made(tmp_path: Path, files: int) -> None:
    """Without files of its own, gRPC's poller would end the process by SIGSEGV."""
    ended = subprocess.run(
        [sys.executable, "-m", "kvservice", "serve", f"--store.path={tmp_path / 'store'}", f"--dram.path={tmp_path}"],
        preexec_fn=limited(files, files),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    for part in ("too few open files are allowed", str(files), "ulimit -n", "LimitNOFILE="):
        assert part in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_number_of_open_files_to_allow_suffices_for_the_settings() -> None:
    asked = "from kvservice.host_limits import raise_open_files_limit; raise_open_files_limit(1, 100_000)"
    ended = subprocess.run(
        [sys.executable, "-c", asked],
        preexec_fn=limited(1000, 1000),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "needs at least 100066" in ended.stderr
    assert "`ulimit -n 200132`" in ended.stderr and "lower server.bulk_connections_max" in ended.stderr


def test_the_number_of_open_files_is_raised_to_what_the_process_may_have(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 128), hard))
    try:
        with DaemonProcess(tmp_path) as daemon:
            assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_with_as_few_open_files_as_are_accepted_the_daemon_serves(tmp_path: Path) -> None:
    program = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (82, 82))"
    run = "import sys; from kvservice.__main__ import main; sys.exit(main())"
    with (
        DaemonProcess(tmp_path, program=("-c", f"{program}; {run}"), server__bulk_connections_max=16) as daemon,
        daemon.client() as client,
    ):
        chain = new_chain(LARGE, 4)
        save(client, LARGE, chain, Durability.SSD)
        verify(client, LARGE, chain)
        assert len(os.listdir(f"/proc/{daemon.process.pid}/fd")) < 50


def refused(daemon: DaemonProcess) -> str:
    """The last line of a daemon that ended by itself, before it made a store."""
    try:
        daemon.launch()
        assert daemon.wait_for_end() == 1
        assert not daemon.store.exists()
        return daemon.lines[-1]
    finally:
        daemon.remove()


def test_too_few_threads_of_the_control_group_are_refused_and_named(tmp_path: Path) -> None:
    with threads_group(40) as group:
        line = refused(DaemonProcess(tmp_path, program=group.program()))
    for part in ("too few threads are allowed", f"{group.limit_file} is 40", "TasksMax="):
        assert part in line


@pytest.mark.parametrize(
    ("limit", "value", "part"),
    [
        ("RLIMIT_NPROC", 30, "LimitNPROC="),
        pytest.param("RLIMIT_AS", 600 * MIB, "`ulimit -v unlimited`", marks=pytest.mark.slow),
    ],
)
def test_too_few_threads_of_the_user_and_too_little_space_for_stacks_are_refused_and_named(
    tmp_path: Path, limit: str, value: int, part: str
) -> None:
    """As another user: root has as many processes and threads as it wants."""
    become = "os.geteuid() == 0 and (os.setgroups([]), os.setgid(12345), os.setuid(12345))"
    program = (
        "import os, resource, sys, uvloop, kvservice.config_sources, kvservice.daemon, kvservice.logs; "
        "from kvservice.__main__ import main; "
        f"resource.setrlimit(resource.{limit}, ({value}, {value})); {become}; sys.exit(main())"
    )
    line = refused(DaemonProcess(tmp_path, program=("-c", program)))
    for each in ("too few threads are allowed", f"{limit} is {value}", part):
        assert each in line


def test_an_address_space_that_is_too_small_for_the_dram_tier_is_refused_and_named(tmp_path: Path) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({3000 * MIB}, {3000 * MIB}))"
    run = "import sys; from kvservice.__main__ import main; sys.exit(main())"
    line = refused(DaemonProcess(tmp_path, program=("-c", f"{limit}; {run}"), dram__capacity_bytes=2048 * MIB))
    for part in ("RLIMIT_AS allows 3000 MiB of mappings", "ulimit -v unlimited", "dram.capacity_bytes"):
        assert part in line


def test_a_daemon_that_gets_no_more_threads_serves_with_those_it_has(tmp_path: Path) -> None:
    with threads_group("max") as group, DaemonProcess(tmp_path) as daemon:
        group.add(daemon.process.pid)
        group.limit_file.write_text(str(group.threads))
        for transport in TRANSPORTS:
            with daemon.client(transport=transport) as client:
                for durability in Durability:
                    chain = new_chain(LARGE, 8)
                    save(client, LARGE, chain, durability)
                    verify(client, LARGE, chain)
        assert not [line for line in daemon.log if line["level"] in ("warning", "error")]


def test_a_daemon_that_may_start_no_thread_any_more_ends_without_an_error(tmp_path: Path) -> None:
    with threads_group("max") as group, DaemonProcess(tmp_path) as daemon:
        group.add(daemon.process.pid)
        group.limit_file.write_text("1")
        assert daemon.stop() == 0
        assert daemon.log[-1]["event"] == "stopped"


def test_connections_that_take_the_last_file_keep_out_new_clients_and_no_others(tmp_path: Path) -> None:
    program = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))"
    run = "import sys; from kvservice.__main__ import main; sys.exit(main())"
    with (
        DaemonProcess(tmp_path, program=("-c", f"{program}; {run}"), server__bulk_address="off") as daemon,
        daemon.client() as client,
    ):
        chain = new_chain(LARGE, 4)
        save(client, LARGE, chain, Durability.SSD)
        with contextlib.ExitStack() as opened:
            for _ in range(1000):
                connection = opened.enter_context(socket.socket())
                connection.setblocking(False)
                connection.connect_ex(("127.0.0.1", daemon.port))
            until(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) == 100)
            verify(client, LARGE, chain)
            more = new_chain(LARGE, 4)
            save(client, LARGE, more, Durability.SSD)

        def admits_another() -> bool:
            with contextlib.suppress(DaemonUnavailable), daemon.client(timeout_s=5) as another:
                verify(another, LARGE, more)
                return True
            return False

        until(admits_another)
        assert daemon.stop() == 0
