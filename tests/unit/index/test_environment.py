"""The environment: group commit, order, durability before the commit, and the state after a failure."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice.index.environment import BLOCKS, META, Environment, all_durable, is_older_copy
from kvservice.index.errors import StoreDamaged
from kvservice_api.errors import IndexFull, StorageFailed
from tests.unit.index_samples import some_keys

MIB = 2**20


@contextmanager
def opened(
    path: Path, *, map_bytes: int = 4 * MIB, durable: bool = False, before_commit: Callable[[], None] | None = None
) -> Iterator[Environment]:
    environment = Environment(path, map_bytes=map_bytes, durable=durable, before_commit=before_commit)
    try:
        yield environment
    finally:
        environment.close()


def contents(environment: Environment) -> dict[bytes, bytes]:
    return {key: value for keys, values in environment.read(BLOCKS) for key, value in zip(keys, values, strict=True)}


def put(environment: Environment, *items: tuple[bytes, bytes]) -> asyncio.Future[None]:
    """A put of values that name bytes."""
    return environment.put(BLOCKS, [key for key, _ in items], lambda: [value for _, value in items], all_durable)


class Gate:
    """Holds the committer inside `before_commit`, so that later changes form one batch."""

    def __init__(self) -> None:
        self.passed = 0
        self._reached = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> None:
        self._reached.set()
        assert self._open.wait(60)
        self.passed += 1

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, 10)

    def open(self) -> None:
        self._open.set()


@contextmanager
def failing_writes(path: Path, *, meta: bool, data: bool) -> Iterator[None]:
    """Replace LMDB's own file descriptors by /dev/full: every write fails with ENOSPC."""
    replaced = []
    with open("/dev/full", "r+b", buffering=0) as full:
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            try:
                if os.readlink(f"/proc/self/fd/{fd}") != str(path / "data.mdb"):
                    continue
                flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
            except FileNotFoundError:
                continue  # It was the descriptor of the listing itself.
            is_meta = bool(int(flags, 8) & os.O_DSYNC)  # LMDB writes its meta pages through a synced one.
            if meta if is_meta else data:
                replaced.append((fd, os.dup(fd)))
                os.dup2(full.fileno(), fd)
    assert replaced
    try:
        yield
    finally:
        for fd, original in replaced:
            with suppress(FileNotFoundError):  # It was closed, and its number may be another file's by now.
                if os.readlink(f"/proc/self/fd/{fd}") == "/dev/full":
                    os.dup2(original, fd)
            os.close(original)


@pytest.mark.parametrize("durable", [True, False])
async def test_what_was_put_is_there_after_opening_again(tmp_path: Path, durable: bool) -> None:
    items = [(key, b"value of " + key) for key in some_keys(500)]
    with opened(tmp_path / "index", durable=durable) as environment:
        await put(environment, *items)
        await environment.delete(BLOCKS, [items[0][0], b"was never there"])

    with opened(tmp_path / "index", durable=durable) as environment:
        assert contents(environment) == dict(items[1:])


async def test_many_waiters_share_one_commit(tmp_path: Path) -> None:
    gate = Gate()
    with opened(tmp_path / "index", before_commit=gate) as environment:
        first = put(environment, (b"first", b"1"))
        await gate.reached()
        others = [put(environment, (key, b"x")) for key in some_keys(50)]
        gate.open()
        await asyncio.gather(first, *others)

        assert environment.commits == 2
        assert gate.passed == 2
        assert len(contents(environment)) == 51


async def test_before_commit_runs_while_nothing_is_committed_yet(tmp_path: Path) -> None:
    seen: list[dict[bytes, bytes]] = []
    with opened(tmp_path / "index", before_commit=lambda: seen.append(contents(environment))) as environment:
        await put(environment, (b"a", b"1"))
        await put(environment, (b"b", b"2"))

    assert seen == [{}, {b"a": b"1"}]


async def test_deletes_alone_wait_for_no_bytes(tmp_path: Path) -> None:
    calls: list[int] = []
    with opened(tmp_path / "index", before_commit=lambda: calls.append(1)) as environment:
        await environment.delete(BLOCKS, some_keys(3))

        assert environment.commits == 1
    assert not calls


@pytest.mark.parametrize("error", [StorageFailed("the drive is gone"), OSError(5, "Input/output error")])
async def test_bytes_that_cannot_be_made_durable_fail_the_puts_and_nothing_else(
    tmp_path: Path, error: Exception
) -> None:
    gate = Gate()
    failures: list[Exception] = []

    def before_commit() -> None:
        gate()
        if failures:
            raise failures[0]

    with opened(tmp_path / "index", before_commit=before_commit) as environment:
        first = put(environment, (b"old", b"1"), (b"kept", b"1"))
        await gate.reached()
        failures.append(error)
        deleted = environment.delete(BLOCKS, [b"old"])
        refused = put(environment, (b"new", b"2"))
        gate.open()

        with pytest.raises(StorageFailed):
            await first
        with pytest.raises(StorageFailed, match=r"drive is gone|Input/output error"):
            await refused
        await deleted
        assert contents(environment) == {}

        await environment.put(META, [b"names"], lambda: [b"no bytes"])
        elsewhere = environment.put(BLOCKS, [b"elsewhere"], lambda: [b"4"], lambda failure: None)
        with pytest.raises(StorageFailed):
            await put(environment, (b"new", b"2"))
        await elsewhere
        assert contents(environment) == {b"elsewhere": b"4"}
        await environment.delete(BLOCKS, [b"elsewhere"])

        failures.clear()
        await put(environment, (b"again", b"3"))
        assert contents(environment) == {b"again": b"3"}


async def test_the_last_change_of_a_key_wins_within_a_batch(tmp_path: Path) -> None:
    gate = Gate()
    with opened(tmp_path / "index", before_commit=gate) as environment:
        first = put(environment, (b"a", b"0"), (b"b", b"0"))
        await gate.reached()
        changes = [
            put(environment, (b"a", b"1"), (b"c", b"1")),
            environment.delete(BLOCKS, [b"a", b"b", b"c"]),
            put(environment, (b"b", b"2")),
            put(environment, (b"b", b"3"), (b"d", b"3")),
            environment.delete(BLOCKS, [b"d"]),
        ]
        gate.open()
        await asyncio.gather(first, *changes)

        assert environment.commits == 2
        assert contents(environment) == {b"b": b"3"}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.sampled_from(some_keys(6)), min_size=1, max_size=4), st.booleans()),
        max_size=30,
    )
)
def test_changes_take_effect_in_the_order_of_submission(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[bool, list[bytes], bool]]
) -> None:
    async def play() -> None:
        model: dict[bytes, bytes] = {}
        pending = []
        with opened(tmp_path_factory.mktemp("order") / "index") as environment:
            for number, (is_put, keys, waits) in enumerate(changes):
                value = b"%d" % number
                if is_put:
                    pending.append(put(environment, *((key, value) for key in keys)))
                    model.update(dict.fromkeys(keys, value))
                else:
                    pending.append(environment.delete(BLOCKS, keys))
                    for key in keys:
                        model.pop(key, None)
                if waits:
                    await pending[-1]
                    assert contents(environment) == model
            await asyncio.gather(*pending)
            assert contents(environment) == model

    asyncio.run(play())


async def fill(environment: Environment, per_put: int = 50) -> list[bytes]:
    """Put records until the environment refuses; the keys that are in it."""
    stored: list[bytes] = []
    while True:
        keys = some_keys(per_put, first=len(stored))
        try:
            await put(environment, *((key, bytes(120)) for key in keys))
        except IndexFull:
            await environment.delete(BLOCKS, keys)  # As the store does: some of a failed put may be stored.
            return stored
        stored += keys


@pytest.mark.parametrize("map_bytes", [MIB, 4 * MIB])
async def test_a_full_map_refuses_puts_and_never_deletes(tmp_path: Path, map_bytes: int) -> None:
    with opened(tmp_path / "index", map_bytes=map_bytes) as environment:
        stored = await fill(environment)

        assert environment.used_bytes > 0.85 * map_bytes, "it is used before it refuses"
        assert environment.used_bytes <= 0.9 * map_bytes
        await put(environment, (stored[0], b"y" * 120))  # The index does not grow, so times of use are still written.
        refused = some_keys(500, first=10**6)
        with pytest.raises(IndexFull, match="kept for deletes"):
            await put(environment, *((key, bytes(120)) for key in refused))
        await environment.delete(BLOCKS, [*refused, *stored[::2]])
        assert sorted(contents(environment)) == sorted(stored[1::2])
        await put(environment, (b"new", bytes(120)))

        await environment.delete(BLOCKS, [*stored[1::2], b"new"])
        assert contents(environment) == {}
        assert len(await fill(environment)) == len(stored), "no space is lost"


async def test_a_map_that_was_made_smaller_takes_deletes_only(tmp_path: Path) -> None:
    with opened(tmp_path / "index", map_bytes=4 * MIB) as environment:
        stored = await fill(environment)

    with opened(tmp_path / "index", map_bytes=2 * MIB) as environment:
        with pytest.raises(IndexFull):
            await put(environment, *((key, bytes(120)) for key in some_keys(50, first=10**6)))
        await environment.delete(BLOCKS, [*stored[: len(stored) * 3 // 4], *some_keys(50, first=10**6)])
        assert sorted(contents(environment)) == sorted(stored[len(stored) * 3 // 4 :])
        await put(environment, (b"new", bytes(120)))


async def test_deletes_in_a_batch_with_refused_puts_go_through(tmp_path: Path) -> None:
    gate = Gate()
    gate.open()
    with opened(tmp_path / "index", map_bytes=MIB, before_commit=gate) as environment:
        stored = await fill(environment)
        gate._open.clear()
        gate._reached.clear()
        held = put(environment, (stored[0], b"y" * 120))
        await gate.reached()
        deleted = environment.delete(BLOCKS, stored[1:3])
        refused = put(environment, *((key, bytes(120)) for key in some_keys(200, first=10**6)))
        gate.open()
        await held

        with pytest.raises(IndexFull):
            await refused
        await deleted
        assert stored[1] not in contents(environment)


async def test_a_change_too_large_for_one_transaction_is_carried_out_in_parts(tmp_path: Path) -> None:
    with opened(tmp_path / "index") as environment:
        keys: list[bytes] = []
        while environment.used_bytes < 0.7 * environment.map_bytes:
            more = some_keys(100, first=len(keys))
            await put(environment, *((key, bytes(120)) for key in more))
            keys += more
        commits = environment.commits

        await put(environment, *((key, b"1" * 120) for key in keys))  # All pages change at once: twice the space.

        assert environment.commits > commits + 1
        assert set(contents(environment).values()) == {b"1" * 120}


@pytest.mark.parametrize(("meta", "data"), [(True, False), (False, True), (True, True)])
async def test_a_failed_commit_fails_its_waiters_and_leaves_the_environment_usable(
    tmp_path: Path, meta: bool, data: bool
) -> None:
    path = tmp_path / "index"
    with opened(path, durable=True) as environment:
        await put(environment, (b"before", b"1"), (b"gone", b"1"))
        with failing_writes(path, meta=meta, data=data):
            failures = await asyncio.gather(
                put(environment, (b"before", b"2"), (b"lost", b"2")),
                environment.delete(BLOCKS, [b"before"]),
                return_exceptions=True,
            )
        assert isinstance(failures[0], StorageFailed)
        if isinstance(failures[1], BaseException):  # Its retry may have met the repaired file.
            assert isinstance(failures[1], StorageFailed)
            assert contents(environment) == {b"before": b"1", b"gone": b"1"}

        await environment.delete(BLOCKS, [b"gone"])
        await put(environment, (b"after", b"3"))
        expected = contents(environment)
        assert expected[b"after"] == b"3"
        assert b"gone" not in expected
        assert b"lost" not in expected

    with opened(path, durable=True) as environment:
        assert contents(environment) == expected


async def test_an_index_that_cannot_be_opened_again_is_tried_at_every_change(tmp_path: Path) -> None:
    path, aside = tmp_path / "index", tmp_path / "aside"
    with opened(path, durable=True) as environment:
        await put(environment, (b"before", b"1"))
        path.rename(aside)
        path.write_bytes(b"in the way")
        with failing_writes(aside, meta=True, data=True), pytest.raises(StorageFailed):
            await put(environment, (b"lost", b"2"))
        with pytest.raises(StorageFailed):
            await put(environment, (b"lost", b"3"))
        with pytest.raises(StorageFailed):
            contents(environment)

        path.unlink()
        aside.rename(path)
        await put(environment, (b"after", b"4"))

        assert contents(environment) == {b"before": b"1", b"after": b"4"}


@pytest.mark.parametrize("instead", ["nothing", "an empty folder", "another index"])
async def test_an_index_that_is_away_is_not_created_again(tmp_path: Path, instead: str) -> None:
    """As if its drive were unmounted: the next start must find all acknowledged records."""
    path, aside = tmp_path / "index", tmp_path / "aside"
    with opened(path, durable=True) as environment:
        await put(environment, (b"before", b"1"))
        path.rename(aside)
        if instead == "an empty folder":
            path.mkdir()
        elif instead == "another index":
            with opened(path, durable=True):
                pass
        found = sorted(tmp_path.rglob("*"))
        with failing_writes(aside, meta=True, data=True), pytest.raises(StorageFailed):
            await put(environment, (b"lost", b"2"))
        for _ in range(2):
            with pytest.raises(StorageFailed, match=r"cannot be used|was replaced since the start"):
                await put(environment, (b"lost", b"3"))
        assert sorted(tmp_path.rglob("*")) == found, "nothing was made"

        if instead != "nothing":
            shutil.rmtree(path)
        aside.rename(path)
        await put(environment, (b"after", b"4"))

    with opened(path) as environment:
        assert contents(environment) == {b"before": b"1", b"after": b"4"}


async def test_an_index_that_was_damaged_under_the_daemon_fails_each_change_as_a_disk_does(tmp_path: Path) -> None:
    path = tmp_path / "index"
    with opened(path, durable=True) as environment:
        await put(environment, (b"before", b"1"))
        with failing_writes(path, meta=True, data=True):
            with (path / "data.mdb").open("r+b") as file:  # It stays the same file.
                file.write(b"\xff" * 65536)
            with pytest.raises(StorageFailed):
                await put(environment, (b"lost", b"2"))
        for _ in range(2):
            with pytest.raises(StorageFailed):
                await put(environment, (b"lost", b"3"))
            with pytest.raises(StorageFailed):
                await environment.delete(BLOCKS, [b"before"])


async def test_a_cancelled_waiter_disturbs_no_other_waiter(tmp_path: Path) -> None:
    gate = Gate()
    with opened(tmp_path / "index", before_commit=gate) as environment:
        first = put(environment, (b"a", b"1"))
        await gate.reached()
        given_up = put(environment, (b"b", b"2"))
        third = put(environment, (b"c", b"3"))
        given_up.cancel()
        gate.open()
        await asyncio.gather(first, third)

        assert sorted(contents(environment)) == [b"a", b"b", b"c"]


async def test_a_value_that_cannot_be_made_fails_its_batch_and_not_the_thread(tmp_path: Path) -> None:
    def broken() -> list[bytes]:
        raise AssertionError("a bug of the caller")

    with opened(tmp_path / "index") as environment:
        with pytest.raises(AssertionError, match="a bug"):
            await environment.put(BLOCKS, [b"a"], broken)
        await put(environment, (b"b", b"1"))

        assert contents(environment) == {b"b": b"1"}


async def test_closing_commits_what_is_pending(tmp_path: Path) -> None:
    gate = Gate()
    environment = Environment(tmp_path / "index", map_bytes=4 * MIB, durable=False, before_commit=gate)
    pending = [put(environment, (b"a", b"1"))]
    await gate.reached()
    pending += [put(environment, (key, b"x")) for key in some_keys(5)]
    gate.open()
    environment.close()
    await asyncio.gather(*pending)

    with opened(tmp_path / "index") as environment:
        assert len(contents(environment)) == 6


async def test_a_change_of_nothing_is_done_at_once(tmp_path: Path) -> None:
    with opened(tmp_path / "index") as environment:
        await put(environment)
        await environment.delete(BLOCKS, [])

        assert environment.commits == 0


async def test_databases_do_not_mix(tmp_path: Path) -> None:
    with opened(tmp_path / "index") as environment:
        await asyncio.gather(put(environment, (b"a", b"block")), environment.put(META, [b"a"], lambda: [b"meta"]))
        await environment.delete(META, [b"a"])

        assert contents(environment) == {b"a": b"block"}


def test_the_space_of_the_whole_map_is_claimed_when_it_is_made(tmp_path: Path) -> None:
    with opened(tmp_path / "index"):
        found = (tmp_path / "index" / "data.mdb").stat()

    assert found.st_size == 4 * MIB
    assert found.st_blocks * 512 >= 4 * MIB


@pytest.mark.parametrize("after", ["a put", "a delete of what is not there", "nothing"])
async def test_notes_tell_an_older_copy_from_the_newest_file(tmp_path: Path, after: str) -> None:
    folder, notes = tmp_path / "index", tmp_path / "notes"
    with opened(folder) as environment:
        environment.keep_notes(notes)
        await put(environment, (b"key", b"value"))
    shutil.copytree(folder, tmp_path / "older")
    with opened(folder) as environment:
        environment.keep_notes(notes)
        if after == "a put":
            await put(environment, (b"other", b"value"))
        elif after != "nothing":
            await environment.delete(BLOCKS, [b"never stored"])  # LMDB writes no transaction for it.

    assert not is_older_copy(folder, notes)
    assert is_older_copy(tmp_path / "older", notes) == (after == "a put")


def test_a_file_that_is_not_lmdbs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(os.urandom(65536))

    with pytest.raises(StoreDamaged, match=str(tmp_path)):
        Environment(tmp_path, map_bytes=4 * MIB, durable=True)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StorageFailed, match="file"):
        Environment(tmp_path / "file" / "index", map_bytes=4 * MIB, durable=True)
