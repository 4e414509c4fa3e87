"""Clients and ``fork``: every call of a child works or raises in time, and the parent notices nothing."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvservice_api.errors import BlockNotFound, DaemonUnavailable, LeaseExpired, NotShared, ScrubRunning
from kvservice_client import Client, Lease, Outcome, RequestReport, TlsFiles
from tests.certificates import Authority
from tests.daemon import DaemonProcess, until
from tests.forking import Forked, adopt_orphans, in_child
from tests.integration.known_blocks import LARGE, SMALL, compare, layers_of, new_chain, save, verify

# Python 3.12 and later warn of forks of processes with threads, which these tests do on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

_TIMEOUT_S = 20.0  # Of a call: on a busy machine a child may wait long for the processor.
STORED = new_chain(LARGE, 4, "stored before all forks")


@pytest.fixture(params=["grpc", "bulk", "shm"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(daemon: DaemonProcess, transport: str) -> Iterator[Client]:
    """An attached client that has made leases, loads and saves."""
    with daemon.client(transport=transport, timeout_s=_TIMEOUT_S) as client:
        save(client, LARGE, STORED)
        verify(client, LARGE, STORED)
        yield client


def use(client: Client) -> str:
    """Every kind of call. Returns by which transport bytes travelled."""
    blocks, mine = client.open_layout(LARGE), new_chain(LARGE, 2, f"of process {os.getpid()}")
    blocks.ping()
    assert client.capabilities().boot_epoch
    assert blocks.contains(STORED) == len(STORED)
    blocks.lookup_local(STORED)
    verify(client, LARGE, STORED)
    with blocks.lookup(STORED) as lease:
        lease.renew(20.0)
        with contextlib.suppress(NotShared), lease.view() as view:
            assert view.slices(1)[0][0].tobytes() == layers_of(LARGE, STORED)[1][0].tobytes()
    save(client, LARGE, mine)
    verify(client, LARGE, mine)
    session = client.session(LARGE, f"session/{os.getpid()}")
    state = session.append(mine)
    with session.lookup() as history:
        assert history.tokens == 2 * LARGE.block_tokens
        assert len(list(history.load())) == LARGE.layers
    session.truncate([(0, 4)], state.revision)
    assert session.end()
    assert client.prefetch(mine.keys).missing == 0
    assert client.evict(mine.keys, "dram").missing == 0
    client.report_request(RequestReport(request_id=f"of {os.getpid()}", outcome=Outcome.DONE))
    assert client.admin.status().state == "serving"
    assert client.admin.pin(STORED.keys, 60.0).missing == 0
    assert client.admin.unpin(STORED.keys).missing == 0
    with contextlib.suppress(ScrubRunning):
        assert [reply.done for reply in client.admin.scrub()][-1]
    with pytest.raises(BlockNotFound):
        client.admin.inspect(bytes(32))
    assert client.admin.discard(mine.keys).missing == 0
    return next(iter(client.stats().loaded_bytes))


def use_new(address: str, transport: str) -> str:
    """As `use`, with a client that is made here."""
    with Client(address, transport=transport, timeout_s=_TIMEOUT_S) as client:  # type: ignore[arg-type]
        return use(client)


class TestInAChild:
    @pytest.mark.parametrize("first", ["child", "parent", "both at once"])
    def test_every_call_of_a_client_from_before_the_fork_works(
        self, client: Client, transport: str, first: str
    ) -> None:
        with Forked(lambda: use(client), waits=True) as child:
            if first == "parent":
                use(client)
            child.go()
            if first == "both at once":
                use(client)
            assert child.result() == transport
            use(client)

    def test_every_call_of_a_client_that_is_made_there_works(
        self, daemon: DaemonProcess, client: Client, transport: str
    ) -> None:
        assert in_child(lambda: use_new(daemon.address, transport)) == transport
        use(client)

    def test_a_client_that_was_made_but_never_called_works_in_both(self, daemon: DaemonProcess, transport: str) -> None:
        unused = daemon.client(transport=transport, timeout_s=_TIMEOUT_S)
        with unused, Forked(lambda: use(unused)) as child:
            use(unused)
            child.result()

    @pytest.mark.parametrize("transport", ["grpc", "shm"])  # Only a host and port lead to the bulk port.
    def test_a_client_on_a_unix_socket_works(self, daemon: DaemonProcess, transport: str) -> None:
        with Client(str(daemon.socket_path), transport=transport, timeout_s=_TIMEOUT_S) as client:  # type: ignore[arg-type]
            save(client, LARGE, STORED)
            with Forked(lambda: use(client)) as child:
                use(client)
                child.result()

    def test_a_client_with_tls_works(self, new_daemon: Callable[..., DaemonProcess], tmp_path: Path) -> None:
        authority = Authority()
        certificate, key = authority.issue("localhost").write(tmp_path)
        daemon = new_daemon(tls__certificate=certificate, tls__key=key)
        tls = TlsFiles(ca=authority.write(tmp_path), server_name="localhost")
        with daemon.client(tls=tls, timeout_s=_TIMEOUT_S) as client:
            save(client, LARGE, STORED)
            with Forked(lambda: use(client)) as child:
                use(client)
                child.result()

    def test_a_client_that_was_closed_before_the_fork_stays_closed(self, client: Client) -> None:
        client.close()
        with pytest.raises(DaemonUnavailable, match="the client is closed"):
            in_child(lambda: client.open_layout(LARGE).lookup(STORED))

    def test_a_grandchild_works_as_well(self, client: Client) -> None:
        def work() -> object:
            use(client)
            with Forked(lambda: in_child(lambda: use(client))) as child:
                use(client)
                return child.result()

        assert in_child(work)
        use(client)

    def test_the_daemon_sees_a_child_as_a_client_of_its_own(self, daemon: DaemonProcess) -> None:
        with daemon.client() as parent:
            save(parent, LARGE, STORED)
            lease = parent.open_layout(LARGE).lookup(STORED)
            clients, leases = (parent.admin.status().clients, parent.admin.status().leases)

            def work() -> tuple[int, int]:
                with parent.open_layout(LARGE).lookup(STORED):
                    return parent.admin.status().clients, parent.admin.status().leases

            assert in_child(work) == (clients + 1, leases + 1)
            until(lambda: parent.admin.status().clients == clients, timeout_s=_TIMEOUT_S)
            assert parent.admin.status().leases == leases
            lease.release()

    def test_where_grpc_cannot_be_loaded_every_call_raises_and_says_what_to_do(self, client: Client) -> None:
        def work() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # No file can be opened, and so no copy made.
            client.open_layout(LARGE).lookup(STORED)

        with pytest.raises(DaemonUnavailable, match=r"forked.*Too many open files.*spawn"):
            in_child(work)
        use(client)


@pytest.mark.parametrize("method", ["fork", "spawn"])
class TestWithMultiprocessing:
    def test_a_client_that_is_made_in_the_process_works(
        self, daemon: DaemonProcess, client: Client, method: str
    ) -> None:
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=use_new, args=(daemon.address, "auto"))
        process.start()
        try:
            use(client)
            process.join(60.0)
            assert process.exitcode == 0
        finally:
            process.kill()
            process.join()

    def test_a_pool_of_them_works(self, daemon: DaemonProcess, client: Client, method: str) -> None:
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.starmap_async(use_new, [(daemon.address, "shm")] * 4).get(60.0) == ["shm"] * 4
        use(client)


class TestAForkWhileTheParentIsBusy:
    def test_from_a_thread(self, client: Client) -> None:
        raised: list[BaseException] = []

        def fork() -> None:
            try:
                in_child(lambda: use(client))
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=fork)
        thread.start()
        use(client)
        thread.join()
        assert not raised

    def test_in_the_middle_of_a_load_the_childs_call_raises_and_the_parents_load_continues(
        self, client: Client
    ) -> None:
        blocks = client.open_layout(LARGE)
        with blocks.lookup(STORED) as lease:
            layers = lease.load()
            first = next(layers)

            def work() -> str:
                with pytest.raises(LeaseExpired, match=r"before fork.*look the prefix up again"):
                    next(layers)
                return use(client)

            in_child(work)
            rest = [first, *layers]
        for layer, expected in zip(rest, layers_of(LARGE, STORED), strict=True):
            assert np.array_equal(layer.data, np.concatenate(expected))

    def test_in_the_middle_of_a_load_that_the_child_only_drops(self, client: Client) -> None:
        with client.open_layout(LARGE).lookup(STORED) as lease:
            layers = [lease.load()]
            next(layers[0])

            def work() -> str:
                layers.clear()
                gc.collect()
                assert not client.stats().loaded_bytes  # The parent counts its load itself.
                return use(client)

            in_child(work)
            assert len(list(layers[0])) == LARGE.layers - 1

    def test_in_the_middle_of_a_stream_for_operators(self, client: Client) -> None:
        scrub = client.admin.scrub()
        next(scrub)

        def work() -> None:
            with pytest.raises(DaemonUnavailable, match="before fork"):
                next(scrub)
            use(client)

        in_child(work)
        assert [each.done for each in scrub] in ([], [True])


class TestWhatTheParentHolds:
    @pytest.fixture
    def lease(self, client: Client) -> Iterator[Lease]:
        with client.open_layout(LARGE).lookup(STORED, lease_ttl_s=60.0) as lease:
            yield lease

    @pytest.mark.parametrize("end", ["release", "close", "drop", "exit"])
    def test_a_lease_stays_valid_after_every_use_by_the_child(self, client: Client, lease: Lease, end: str) -> None:
        def work() -> None:
            assert lease.remaining_s == 0
            for use_it in (lambda: next(lease.load()), lease.view, lease.renew):
                with pytest.raises(LeaseExpired, match=r"before fork.*look the prefix up again"):
                    use_it()
            if end == "release":
                lease.release()
            elif end == "close":
                client.close()
            elif end == "drop":
                client.__dict__.clear()
                lease.__dict__.clear()
                gc.collect()

        in_child(work)
        assert lease.remaining_s > 0
        lease.renew()
        compare(lease, LARGE, STORED)
        use(client)

    def test_a_view_shows_the_same_bytes_in_the_child(self, daemon: DaemonProcess) -> None:
        with daemon.client(transport="shm") as client:
            save(client, LARGE, STORED)
            with client.open_layout(LARGE).lookup(STORED, lease_ttl_s=60.0) as lease, lease.view() as view:

                def work() -> list[bytes]:
                    seen = [b"".join(part.tobytes() for part in parts) for parts in view.slices(0)]
                    view.check()
                    return seen

                expected = [each.tobytes() for each in layers_of(LARGE, STORED)[0]]
                assert in_child(work) == expected

    def test_a_view_ends_in_the_child_too_when_its_blocks_have_left(self, daemon: DaemonProcess) -> None:
        chain = new_chain(LARGE, 2)
        with daemon.client(transport="shm") as client:
            save(client, LARGE, chain)
            with client.open_layout(LARGE).lookup(chain, lease_ttl_s=60.0) as lease:
                view = lease.view()
                with Forked(view.check, waits=True) as child:
                    lease.release()
                    assert client.admin.discard(chain.keys).discarded == len(chain)
                    child.go()
                    with pytest.raises(LeaseExpired, match="moved or evicted"):
                        child.result()

    def test_when_it_is_killed_its_leases_and_its_writer_lock_end_though_its_child_lives(
        self, daemon: DaemonProcess
    ) -> None:
        adopt_orphans()
        source, target = os.pipe()

        def parent() -> None:
            client = daemon.client(transport="shm", timeout_s=_TIMEOUT_S)
            save(client, LARGE, new_chain(LARGE, 1))
            lease = client.open_layout(LARGE).lookup(STORED)
            assert lease.remaining_s
            child = os.fork()
            if not child:
                signal.alarm(180)
                signal.pause()
            os.write(target, child.to_bytes(4, "big"))
            signal.pause()

        with daemon.client(timeout_s=_TIMEOUT_S) as observer:
            save(observer, LARGE, STORED)
            before = observer.admin.status()
            writers = daemon.arena_folder / "writers"
            locks = set(writers.iterdir())
            with Forked(parent) as forked:
                grandchild = int.from_bytes(os.read(source, 4), "big")
                assert grandchild
                try:
                    (lock,) = set(writers.iterdir()) - locks
                    with lock.open("r+b") as file:
                        with pytest.raises(BlockingIOError):
                            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        assert observer.admin.status().leases == before.leases + 1

                        forked.kill()

                        until(lambda: observer.admin.status().leases == before.leases, timeout_s=_TIMEOUT_S)
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    assert os.waitpid(grandchild, os.WNOHANG) == (0, 0), "the child of the child ended too soon"
                finally:
                    os.kill(grandchild, signal.SIGKILL)
                    os.waitpid(grandchild, 0)
        os.close(source)
        os.close(target)

    def test_the_child_does_not_keep_the_writer_lock_that_the_parent_releases(self, daemon: DaemonProcess) -> None:
        with daemon.client(transport="shm") as client:
            locks = set((daemon.arena_folder / "writers").iterdir())
            save(client, LARGE, new_chain(LARGE, 1))
            (lock,) = set((daemon.arena_folder / "writers").iterdir()) - locks
            with lock.open("r+b") as file, Forked(lambda: None, waits=True):
                client.close()
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_BUSY_PROGRAM = """
import sys, threading
from kvservice_client import Client
from tests.forking import in_child
from tests.integration.known_blocks import LARGE, new_chain, save, verify

client = Client(sys.argv[1], transport=sys.argv[2], timeout_s=20.0)
blocks, chain = client.open_layout(LARGE), new_chain(LARGE, 4, "of a busy parent")
save(client, LARGE, chain)
over, raised = threading.Event(), []

def repeat(call):
    try:
        while not over.is_set():
            call()
    except BaseException as error:
        raised.append(error)

calls = [
    lambda: verify(client, LARGE, chain),
    lambda: verify(client, LARGE, chain),
    lambda: save(client, LARGE, new_chain(LARGE, 2)),
    lambda: blocks.contains(chain),
    lambda: client.admin.status(),
]
threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
for thread in threads:
    thread.start()
try:
    for _ in range(5):
        in_child(lambda: (verify(client, LARGE, chain), save(client, LARGE, new_chain(LARGE, 1))))
    for _ in range(int(sys.argv[3])):
        in_child(lambda: None)
finally:
    over.set()
    for thread in threads:
        thread.join()
assert not raised, raised
print("undisturbed")
"""


@pytest.mark.parametrize("forks", ["30", pytest.param("1000", marks=pytest.mark.slow)])
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_while_threads_are_within_calls_children_work_and_the_calls_continue(
    daemon: DaemonProcess, transport: str, forks: str
) -> None:
    ended = _run(_BUSY_PROGRAM, daemon.address, transport, forks)
    assert (ended.returncode, ended.stdout) == (0, "undisturbed\n"), ended.stderr


_PROGRAM = """
import os, sys, threading
import numpy as np
from kvservice_client import Client, Layout, block_chain
layout = Layout("m", "float16", layers=2, kv_heads=2, k_head_dim=16, v_head_dim=16, block_tokens=16)
chain = block_chain(layout, np.arange(64))
client = Client(sys.argv[1], timeout_s=20.0)
blocks = client.open_layout(layout)
blocks.save(chain, [bytes(layout.slice_bytes(2, 64))] * 2)
layers = blocks.lookup(chain).load()
next(layers)
child = os.fork()
with blocks.lookup(chain) as lease:
    assert lease.hit_blocks == 4 and len(list(lease.load())) == 2
if child:
    pid, status = os.waitpid(child, 0)
    assert status == 0, status
    assert len(list(layers)) == 1
    print("both ended")
"""  # The child ends as programs do: the interpreter destroys all inherited objects.


@pytest.mark.parametrize("support", ["", "0", "1"], ids=["unset", "off", "on"])
def test_a_forked_program_ends_by_itself_with_and_without_grpc_fork_support(
    daemon: DaemonProcess, support: str
) -> None:
    ended = _run(_PROGRAM, daemon.address, support=support)
    assert (ended.returncode, ended.stdout) == (0, "both ended\n"), ended.stderr


def _run(program: str, *arguments: str, support: str = "") -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, in which gRPC is loaded as in an engine."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("GRPC_ENABLE_FORK_SUPPORT", None)
    if support:
        environment["GRPC_ENABLE_FORK_SUPPORT"] = support
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_small_slices_travel_too(client: Client) -> None:
    chain = new_chain(SMALL, 3)

    def work() -> None:
        save(client, SMALL, chain)
        verify(client, SMALL, chain)

    in_child(work)
    verify(client, SMALL, chain)
